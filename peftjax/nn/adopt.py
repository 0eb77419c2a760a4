"""Add slots to the layers of a user's own NNX model.

A layer keeps its identity, path and variables. Only its class changes, to a subclass of both our layer and Flax's. The
layer's own computation is still Flax's.
"""

# mypy: disable-error-code="misc, override"
# an adopted layer has two base classes, whose attributes have different declared types
import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.core.errors import UserError, shown
from peftjax.core.variables import dotted
from peftjax.nn.embedding import Embedding
from peftjax.nn.linear import Linear
from peftjax.nn.residual import Residual
from peftjax.nn.slot import Slot

M = TypeVar("M", bound=nnx.Module)

ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)  # values with axes


def adopt(model: M, *, sublayers: Mapping[str, int] = MappingProxyType({})) -> M:
    """Give every nnx.Linear, nnx.LinearGeneral, nnx.Einsum and nnx.Embed of a model a slot for adapters.

    This includes the layers inside nnx.MultiHeadAttention. The kernel and bias of a LinearGeneral or Einsum are kept as a
    matrix and a vector from then on. Layers that do not multiply the last axes of their input by a matrix are left as they
    are: a LinearGeneral with batch axes, and an Einsum with another order of letters or without its own einsum string.

    With a soft prompt, the output of an adopted nnx.Embed begins with the prompt's vectors, so the sequence becomes longer.

    Args:
        model: The model; it is changed in place.
        sublayers: {path: features} of modules x -> f(x), [..., features] -> [..., features], in a residual connection
            x + f(x). They get a slot for bottleneck adapters.

    Returns:
        The model.

    Raises:
        UserError: The model is a single layer, a path of `sublayers` does not exist, or a layer holds a stack of kernels
            (made by vmap). The model is unchanged.

    Examples:
        >>> import jax.numpy as jnp
        >>> import peftjax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> network = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs))
        >>> network = peftjax.attach(peftjax.adopt(network), peftjax.Lora(rank=2), rngs=rngs)
        >>> network(jnp.ones((3, 4))).shape
        (3, 2)
    """
    if not isinstance(model, nnx.Module):
        raise UserError(f"adopt: the model must be an nnx.Module, not {shown(model)}")
    if not isinstance(sublayers, Mapping) or not all(isinstance(width, int) for width in sublayers.values()):
        raise UserError(
            f'adopt: sublayers must give the width of each sublayer, such as {{"attention": 64}}, not {sublayers!r}'
        )
    if type(model) in (*_ADOPTED, nnx.Embed):
        raise UserError(f"adopt: the model is itself a {type(model).__name__}; wrap it in an nnx.Module")
    modules: dict[str, Any] = {dotted(path): module for path, module in nnx.iter_modules(model)}
    if missing := [path for path in sublayers if path not in modules or not path]:
        raise UserError(f"adopt: the model has no module {missing[0]!r}; it has {', '.join(filter(None, modules))}")
    matrices = {path: _matrix(module) for path, module in modules.items() if type(module) in _ADOPTED}
    for path, shapes in matrices.items():
        if shapes is not None:
            _require_shape(f"{path}.kernel", modules[path].kernel, (*shapes[0], *shapes[1]))
    tables = [path for path, module in modules.items() if type(module) is nnx.Embed]
    for path in tables:
        _require_shape(
            f"{path}.embedding", modules[path].embedding, (modules[path].num_embeddings, modules[path].features)
        )
    for path, module in modules.items():
        if isinstance(module, AdoptedSublayer):
            continue  # from an earlier call; it may have adapters
        if path in sublayers:
            module.__class__ = _sublayer_class(type(module))
            module.adapters, module.width = Slot(), sublayers[path]
        elif (shapes := matrices.get(path)) is not None:
            _adopt_linear(module, *shapes)
        elif path in tables:
            _adopt_embed(module)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Variable):
            continue  # an array that is an attribute of a module
        value = variable.get_value()
        if variable.get_metadata().get("axes") is None and isinstance(value, ARRAYS):
            variable.set_metadata(axes=(None,) * value.ndim)
    return model


class AdoptedLinear(Linear):
    """A Flax layer with a slot: [..., *in_shape] -> [..., *out_shape]."""

    original: type[nnx.Module]
    dtype: Any
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def __call__(self, inputs: jax.Array, *, out_sharding: Any = None, **parameters: jax.Array) -> jax.Array:
        lead = inputs.shape[: inputs.ndim - len(self.in_shape)]
        compute = partial(self.dense, out_sharding=out_sharding)
        x = inputs.reshape(*lead, self.in_features)
        if self.dtype is not None:  # the base computes in this dtype, and so do the adapters
            x = x.astype(self.dtype)
        y = self.adapters(self, compute, x, **parameters)
        return y.reshape(*lead, *self.out_shape)

    def dense(
        self, x: jax.Array, kernel: jax.Array | None = None, bias: jax.Array | None = None, *, out_sharding: Any = None
    ) -> jax.Array:
        """The base computation, by Flax: [..., in] -> [..., out]; `kernel` and `bias` replace the layer's own."""
        assert self.kernel is not None
        kernel = self.kernel.get_value() if kernel is None else kernel
        twin = _twin(self, kernel=kernel.reshape(*self.in_shape, *self.out_shape))
        if self.bias is not None:
            vars(twin)["bias"] = nnx.Param((self.bias.get_value() if bias is None else bias).reshape(self.out_shape))
        y = twin(x.reshape(*x.shape[:-1], *self.in_shape), out_sharding=out_sharding)
        return y.reshape(*x.shape[:-1], self.out_features)


class AdoptedEmbed(Embedding, nnx.Embed):
    """nnx.Embed with a slot: int [...] -> [..., D], or [B, T] -> [B, P + T, D] with a soft prompt.

    A network whose output layer is the transposed table calls `attend`, where adapters change the table, too.
    """

    original = nnx.Embed

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = self.adapters(self, partial(self.lookup, out_sharding=out_sharding), inputs)
        if not self.adapters.virtual:
            return y
        prompt = self.soft_prompt().astype(y.dtype)
        return jnp.concatenate([jnp.broadcast_to(prompt, (*y.shape[:-2], *prompt.shape)), y], axis=-2)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """query table^T: [..., D] -> [..., V]."""
        table = self.embedding.get_value()
        for adapter in self.adapters.active_adapters():
            if not adapter.virtual:  # a soft prompt changes no table
                table = adapter.merged(embedding=table)["embedding"]
        return _twin(self, embedding=table).attend(query, out_sharding=out_sharding)

    def lookup(self, tokens: jax.Array, embedding: jax.Array | None = None, *, out_sharding: Any = None) -> jax.Array:
        """The base computation, by Flax; `embedding` replaces the layer's own table."""
        table = self.embedding.get_value() if embedding is None else embedding
        return _twin(self, embedding=table)(tokens, out_sharding=out_sharding)


class AdoptedSublayer(Residual):
    """A user's module f in a residual connection. Adapters wrap it; they see only its first input."""

    original: type[nnx.Module]
    width: int

    def __call__(self, x: jax.Array, *inputs: Any, **options: Any) -> Any:
        own = super(Residual, self).__call__
        return self.adapters(self, lambda x: own(x, *inputs, **options), x)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_sublayer, (self.original,), vars(self).copy()  # pickle finds a class by its name in a file


class _AdoptedDense(AdoptedLinear, nnx.Linear):
    original = nnx.Linear


class _AdoptedGeneral(AdoptedLinear, nnx.LinearGeneral):
    original = nnx.LinearGeneral


class _AdoptedEinsum(AdoptedLinear, nnx.Einsum):
    original = nnx.Einsum


_ADOPTED: dict[type, type[AdoptedLinear]] = {
    nnx.Linear: _AdoptedDense,
    nnx.LinearGeneral: _AdoptedGeneral,
    nnx.Einsum: _AdoptedEinsum,
}


_ADOPTED_SUBLAYERS: dict[type[nnx.Module], type[AdoptedSublayer]] = {}


def _sublayer_class(kind: type[nnx.Module]) -> type[AdoptedSublayer]:
    """The class of an adopted module of class `kind`; one for all of them, so that their models share compiled programs."""
    if kind not in _ADOPTED_SUBLAYERS:
        _ADOPTED_SUBLAYERS[kind] = type(f"Adopted{kind.__name__}", (AdoptedSublayer, kind), {"original": kind})
    return _ADOPTED_SUBLAYERS[kind]


def _empty_sublayer(kind: type[nnx.Module]) -> Any:
    """An adopted module of class `kind` without its attributes."""
    return object.__new__(_sublayer_class(kind))


def _require_shape(name: str, parameter: nnx.Param, shape: tuple[int, ...]) -> None:
    if parameter.shape != shape:
        raise UserError(
            f"adopt: {name} has shape {parameter.shape}, but its layer one of {shape}: stacks of layers made by vmap cannot be "
            "adopted; make the layers one by one"
        )


def _reshape(parameter: nnx.Param, *groups: tuple[int, ...]) -> None:
    """Join each group of axes of a parameter, given by their sizes, to one axis."""
    value, shape = parameter.get_value(), tuple(map(math.prod, groups))
    abstract = isinstance(value, jax.ShapeDtypeStruct)
    parameter.set_value(jax.ShapeDtypeStruct(shape, value.dtype) if abstract else value.reshape(shape))
    parameter.set_metadata(axes=(None,) * len(shape))
    if (names := parameter.get_metadata().get("out_sharding")) is not None:  # Flax's names of mesh axes, one per axis
        each = iter(tuple(names) + (None,) * (sum(map(len, groups)) - len(tuple(names))))
        parameter.set_metadata(out_sharding=tuple(_joined([next(each) for _ in group]) for group in groups))


def _joined(names: list[Any]) -> Any:
    """The mesh axis of joined axes: the first one's; None if another one is sharded, too."""
    return names[0] if not any(names[1:]) else None


def _adopt_linear(module: Any, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    module.__class__ = _ADOPTED[type(module)]
    module.features = (vars(module).get("in_features"), vars(module).get("out_features"))  # as Flax has them
    module.in_shape, module.out_shape = in_shape, out_shape
    module.in_features, module.out_features, module.axes = math.prod(in_shape), math.prod(out_shape), (None, None)
    _reshape(module.kernel, in_shape, out_shape)
    if module.bias is not None:
        _reshape(module.bias, out_shape)
    module.adapters = Slot()


def _adopt_embed(module: Any) -> None:
    module.__class__ = AdoptedEmbed
    module.in_features, module.out_features, module.axes = module.num_embeddings, module.features, ("vocab", "embed")
    module.adapters = Slot()


def _twin(module: Any, **parameters: jax.Array) -> Any:
    """Return a layer of Flax's own class with other parameters, for one call."""
    twin = object.__new__(module.original)
    vars(twin).update(vars(module))
    if "features" in vars(module) and module.original is not nnx.Embed:
        vars(twin)["in_features"], vars(twin)["out_features"] = module.features
    vars(twin).update({leaf: nnx.Param(value) for leaf, value in parameters.items()})
    return twin


def _matrix(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The input and output axes of a layer that is a matrix product over its last input axes; else None."""
    if isinstance(module, nnx.Linear):
        return (module.in_features,), (module.out_features,)
    if isinstance(module, nnx.LinearGeneral):
        axis = module.axis if isinstance(module.axis, tuple) else (module.axis,)
        last = tuple(range(-len(axis), 0))
        return None if module.batch_axis or axis != last else (tuple(module.in_features), tuple(module.out_features))
    if not module.einsum_str:
        return None
    inputs, kernel, made = module.einsum_str.replace(" ", "").replace("->", ",").split(",")
    count = len([letter for letter in kernel if letter not in made])
    contracted, free = kernel[:count], kernel[count:]
    fits = inputs.endswith(contracted) and made == inputs[: len(inputs) - count] + free and not set(free) & set(inputs)
    shape = tuple(module.kernel_shape)
    biased = module.bias is None or tuple(module.bias_shape) == shape[count:]
    return (tuple(shape[:count]), tuple(shape[count:])) if count and free and fits and biased else None
