"""Dropout whose random key is part of the model's state."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.fingerprint import mix
from peftjax.core.variables import DropoutKey, PeftConstant, PeftParam

ModelT = TypeVar("ModelT")  # an nnx.Module; not bound, so that protocols fit too


class Dropout(nnx.Module):
    """Zero each element of x with probability `rate` and divide the rest by 1 - rate; in evaluation mode return x.

    The key is part of the state, one per layer of a stack. A scan slices it, and rematerialization draws the same mask
    again. Padding changes no mask: for x [B, T, D], a position's mask does not depend on T, and for attention probabilities
    [B, ..., T, S], the mask of a query and a key depends on neither T nor S. `with_dropout_keys` replaces the keys
    before each training step; `training_view` does so for a single evaluation of a loss. A new module is in evaluation
    mode; `model.train()` and `model.eval()` switch it.

    Attributes:
        rate: The probability that an element is dropped, in [0, 1]; after `vary`, a variable that holds it, float32 [].
        deterministic: True in evaluation mode.
        key: Key data, uint32 [*stack, 2]; None if the rate is 0 and not a variable.
        number: The number from which a step draws the key, int32 []; None if it is the position among all keys of the model.

    Raises:
        UserError: The rate is outside [0, 1].
    """

    def __init__(self, rate: float, stack: tuple[int, ...] = ()) -> None:
        if not 0.0 <= rate <= 1.0:
            raise UserError(f"dropout must be between 0 and 1, got {rate}")
        self.rate: Any = float(rate)
        self.stack, self.deterministic = stack, True
        self.key = nnx.data(self._make_key() if rate > 0 else None)
        self.number: Any = nnx.data(None)

    def _make_key(self) -> DropoutKey:
        axes = ("layers", None) if self.stack else (None,)
        return DropoutKey(jnp.zeros((*self.stack, 2), jnp.uint32), axes=axes)

    def vary(self) -> None:
        """Hold the rate in a variable, so that one program can run modules with different rates, 0 included."""
        self.rate = nnx.data(PeftConstant(jnp.float32(self.rate), axes=()))
        if self.key is None:
            self.key = nnx.data(self._make_key())

    def hold_number(self, number: int) -> None:
        """Hold the number from which the key is drawn, so that a model with other dropout modules draws the same masks."""
        self.number = nnx.data(PeftConstant(jnp.int32(number), axes=()))

    @property
    def idle(self) -> bool:
        """True if the output equals the input: in evaluation mode, or with rate 0."""
        return self.deterministic or self.key is None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or self.key is None:
            return x
        if isinstance(self.rate, float) and self.rate == 1.0:  # nothing to divide by
            return jnp.zeros_like(x)
        key = jax.random.wrap_key_data(self.key.get_value())
        keep = share = 1 - (self.rate.get_value() if isinstance(self.rate, nnx.Variable) else self.rate)
        if isinstance(share, jax.Array):
            share = jnp.where(share > 0, share, 1.0).astype(x.dtype)
        return jnp.where(_kept(key, keep, x.shape), x / share, jnp.zeros_like(x))


def _kept(key: jax.Array, keep: Any, shape: tuple[int, ...]) -> jax.Array:
    """Random booleans of a shape, True with probability `keep`. A longer shape begins with the values of a shorter one."""
    if len(shape) < 3:
        return jax.random.bernoulli(key, keep, shape)
    if len(shape) == 3:  # drawn as [T, B, D]
        batch, length, width = shape
        return jax.random.bernoulli(key, keep, (length, batch, width)).swapaxes(0, 1)
    *lead, queries, keys = shape  # drawn for each query as [S, B, ...]
    of_queries = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(queries))
    drawn = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (keys, *lead)))(of_queries)
    return jnp.moveaxis(drawn, (0, 1), (-2, -1))


def with_dropout_keys(tree: variables.FlatTree, paths: tuple[str, ...], key: jax.Array) -> variables.FlatTree:
    """The tree with the dropout keys at `paths`, each uint32 [*stack, 2], redrawn from `key`, one per layer.

    The number from which a key is drawn is its position in `paths`, or what its module holds (`Dropout.hold_number`).
    """
    fresh = {}
    for index, path in enumerate(paths):
        stack = tree[path].shape[:-1]
        own = jax.random.fold_in(key, tree.get(f"{path.removesuffix('key')}number", index))
        fresh[path] = jax.random.key_data(jax.random.split(own, stack or ())).astype(jnp.uint32)
    return {**tree, **fresh}


def remove_dropout(model: nnx.Module) -> None:
    """Switch to evaluation mode and set all rates to 0; models that differ only in their rates then have the same structure."""
    model.eval()
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Dropout):
            module.rate, module.key, module.number = 0.0, nnx.data(None), nnx.data(None)


def training_view(model: ModelT, batch: Mapping[str, Any], key: jax.Array | None = None) -> ModelT:
    """The model with dropout active and fresh keys, one for each dropout module of each layer.

    The random streams of Flax's layers, such as nnx.Dropout, get fresh keys, too. The view shares every other variable with
    `model`, so gradients with respect to the model pass through it. `model` itself keeps its mode and its keys. Call this
    inside the function that is differentiated:

        def loss(model, batch):
            logits = peftjax.losses.training_view(model, batch)(batch["tokens"])
            ...

    Args:
        model: Any NNX module with peftjax adapters or dropout.
        batch: The arrays of this step.
        key: A JAX random key. By default it is derived from the keys stored in the model, the batch and the current
            values of the trainable parameters (`PeftParam`, or `nnx.Param` if there are none), bit by bit. It changes
            from step to step, the same values give the same masks, and nothing has to be counted or stored. Because
            the last bit of a parameter changes the masks, pass a key where they must agree between programs or devices
            that round differently, or where the loss has to be a continuous function of the parameters.

    Returns:
        The view, of the same class as `model`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from peftjax import losses
        >>> dropout = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), dropout)
        >>> view = losses.training_view(model, {"x": jnp.ones((1, 2))})
        >>> model.layers[1].deterministic, view.layers[1].deterministic
        (True, False)
    """
    assert isinstance(model, nnx.Module)
    graph, state = nnx.split(model)
    leaves = nnx.to_flat_state(state)
    named = {variables.dotted(path): leaf for path, leaf in leaves if isinstance(leaf, nnx.Variable)}
    named = dict(sorted(named.items()))
    keys = {path: leaf.get_value() for path, leaf in named.items() if isinstance(leaf, DropoutKey)}
    streams = {path: leaf.get_value() for path, leaf in named.items() if isinstance(leaf, nnx.RngKey)}
    if keys or streams:
        key = _key_of(named, batch) if key is None else key
        fresh = with_dropout_keys(keys, tuple(keys), key)
        fresh |= {path: _refreshed(stream, key) for path, stream in streams.items()}
        counts = {path: leaf for path, leaf in named.items() if isinstance(leaf, nnx.RngCount)}
        # A draw increments its counter, which Flax refuses inside of jit for one made outside.
        fresh |= {path: leaf.get_value() for path, leaf in counts.items() if not leaf._can_update}
        named |= {path: named[path].replace(value) for path, value in fresh.items()}
    view = nnx.from_flat_state([(path, named.get(variables.dotted(path), leaf)) for path, leaf in leaves])
    return _with_mode(nnx.merge(graph, view), deterministic=False)


def _refreshed(stream: jax.Array, key: jax.Array) -> jax.Array:
    """The keys of a random stream of Flax, of any shape, changed by another key."""
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return fold(stream.reshape(-1), jax.random.bits(key)).reshape(stream.shape)


def evaluation_view(model: ModelT) -> ModelT:
    """The model with dropout inactive. The view shares all variables with `model`, which keeps its mode."""
    return _with_mode(nnx.merge(*nnx.split(model)), deterministic=True)


def _with_mode(view: ModelT, deterministic: bool) -> ModelT:
    assert isinstance(view, nnx.Module)
    view.set_attributes(deterministic=deterministic, raise_if_not_found=False)
    return view


def _key_of(leaves: Mapping[str, nnx.Variable], batch: Mapping[str, Any]) -> jax.Array:
    """A random key that depends on the stored keys, the trainable parameters and the batch."""
    trainable = {type(leaf) for leaf in leaves.values()} & {PeftParam} or {nnx.Param}
    hashed = [leaf.get_value() for leaf in leaves.values() if isinstance(leaf, DropoutKey) or type(leaf) in trainable]
    return jax.random.fold_in(jax.random.key(0), _hash(jax.tree.leaves((hashed, dict(batch)))))


def _hash(arrays: Iterable[jax.Array]) -> jax.Array:
    """A hash of all bits of some arrays, uint32 []. A sum over elements, so that sharded arrays stay where they are."""
    total = jnp.zeros((), jnp.uint32)
    for array in arrays:
        bits = _bits(jax.lax.stop_gradient(jnp.asarray(array)))
        place = jnp.zeros(bits.shape, jnp.uint32)  # differs between the elements of an array
        for axis in range(bits.ndim):
            place = mix(place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
        total = mix(total + jnp.sum(mix(bits ^ place), dtype=jnp.uint32))
    return total


def _bits(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32 (of 64, the lower ones)."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return array.astype(jnp.uint32)
