"""The train step: sharded, accumulating, and lean, since only what is trained has a gradient, a moment or an update."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from peftjax import optim, sharding
from peftjax.core import variables
from peftjax.losses import Loss, Totals
from peftjax.methods import Method
from peftjax.nn.attention import use_kernel


class TrainState(NamedTuple):
    """All that changes from step to step; a checkpoint holds exactly this and the position in the data."""

    step: jax.Array  # int32 [], updates done
    trainable: variables.FlatTree
    optimizer: optax.OptState
    key: jax.Array  # uint32 [2], the same all the time: step t draws from fold_in(key, t)


def first_state(trainable: variables.FlatTree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. The trainable leaves are copied: the train step donates its state, and the model
    keeps its own."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(trainable, optimizer))
    return jax.jit(partial(_make_state, optimizer, seed), out_shardings=shardings)(trainable)


def abstract_state(trainable: variables.FlatTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and places of the state, from arrays or from their shapes (`jax.ShapeDtypeStruct` with a sharding).
    A moment lies where its parameter lies, anything else on every device."""
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(trainable))
    everywhere = sharding.spec((), (), mesh)

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = trainable.get(getattr(path[-1], "key", ""))
        where = owner.sharding if owner is not None and owner.shape == leaf.shape else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(partial(_make_state, optimizer, 0), trainable))


def _make_state(optimizer: optax.GradientTransformation, seed: int, trainable: variables.FlatTree) -> TrainState:
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trainable), optimizer.init(trainable), key)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    dropout_keys: tuple[str, ...],
    loss: Loss,
    state: TrainState,
    penalty: Callable[[Any], jax.Array | None] = lambda model: None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted (state, frozen, batch of arrays [A, B, ...]) -> (state, metrics). The frozen tree is an argument: never
    donated, never differentiated. Microbatches add up sums of losses and gradients; dividing once by the number of tokens makes
    the result that of one large batch, however the tokens fall. penalty: what a method adds to the mean loss that is
    minimised, from the model; the loss that is reported is without it."""

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    options = sharding.compiler_options(next(leaf.sharding.mesh for leaf in jax.tree.leaves(state.trainable)))

    def minimised(trainable: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Totals]:
        model = variables.merge(graph, trainable, frozen)
        totals = loss(model, batch)
        extra = penalty(model)
        return totals.loss if extra is None else totals.loss + totals.tokens * extra, totals

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    def train_step(
        state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def microbatch(sums: Any, part: Any) -> tuple[Any, None]:
            index, batch = part
            keyed = variables.with_dropout_keys(frozen, dropout_keys, jax.random.fold_in(key, index))
            (_, totals), gradients = jax.value_and_grad(minimised, has_aux=True)(state.trainable, keyed, batch)
            return jax.tree.map(jnp.add, sums, (optax.tree.cast(gradients, jnp.float32), totals)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        none = Totals(*(jnp.zeros((), jnp.float32) for _ in Totals._fields))
        count = len(next(iter(batch.values())))
        (gradients, totals), _ = jax.lax.scan(microbatch, (zeros, none), (jnp.arange(count), batch))
        gradients = jax.tree.map(lambda g: g / totals.tokens, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), state.trainable, updates)
        measured = {
            "loss": totals.loss / totals.tokens,
            "grad_norm": optax.tree.norm(gradients),
            "tokens": totals.tokens,
        }
        return TrainState(state.step + 1, trainable, optimizer_state, state.key), measured

    return train_step


def prepare(
    config: Any,
    model: Any,
    method: Method,
    loss: Loss,
    state_of: Callable[[variables.FlatTree, optax.GradientTransformation], TrainState],
) -> tuple[Callable[..., tuple[TrainState, dict[str, jax.Array]]], TrainState, variables.FlatTree]:
    """The train step that `config` describes, its first state, and what is frozen, of a model in training with its
    method attached. state_of: `first_state`, or `abstract_state` of a model that is shapes alone.

    Raises:
        ValueError: model.attention cannot compute what this run needs.
    """
    if (kernel := config.model.attention) != "xla" and config.data.pack:
        raise ValueError(
            f"model.attention={kernel!r} sees one document a sequence, data.pack puts several; choose 'xla'"
        )
    use_kernel(model, kernel)
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split(model, variables.trainable_mask(leaves, method.trains))
    decayed = optim.decay_mask(trainable, {path: leaf.axes for path, leaf in leaves.items()})
    optimizer = method.optimizer(optim.make_optimizer(config.optim, config.train.steps, decayed), leaves)
    state = state_of(trainable, optimizer)
    dropout = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    return make_train_step(graph, optimizer, dropout, loss, state, method.penalty), state, frozen


def flatten(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a state by name, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
