"""The train step: sharded, accumulating, and lean, since only what is trained has a gradient, a moment or an update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from peftjax import sharding
from peftjax.adapters import Method
from peftjax.core import variables
from peftjax.losses import Loss, Totals
from peftjax.models.kernels import use_kernel
from peftjax.training import optim


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


Gradients = Callable[[TrainState, variables.FlatTree, Mapping[str, jax.Array]], tuple[variables.FlatTree, Totals]]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a train step is made of. gradients: of (state, frozen, batch of arrays [A, B, ...]), of the mean loss, and the
    totals it was made of; looks at no moment of the state. optimizer: what makes updates of them."""

    gradients: Gradients
    optimizer: optax.GradientTransformation

    def jitted(self, state: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
        """A jitted (state, frozen, batch) -> (state, metrics), of states that lie where `state` does. The state is donated;
        the frozen tree is an argument: never donated, never differentiated."""

        def train_step(
            state: TrainState, frozen: variables.FlatTree, batch: Mapping[str, jax.Array]
        ) -> tuple[TrainState, Metrics]:
            return self.updated(state, *self.gradients(state, frozen, batch))

        return _jitted(train_step, state.trainable, (_places(state), None))

    def updated(self, state: TrainState, gradients: variables.FlatTree, totals: Totals) -> tuple[TrainState, Metrics]:
        """The state after one update, and what a log says of it."""
        updates, optimizer_state = self.optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), state.trainable, updates)
        measured = {
            "loss": totals.loss / totals.tokens,
            "grad_norm": optax.tree.norm(gradients),
            "tokens": totals.tokens,
        }
        return TrainState(state.step + 1, trainable, optimizer_state, state.key), measured


def jitted_together(
    steps: Sequence[Step], states: Sequence[TrainState]
) -> Callable[..., list[tuple[TrainState, Metrics]]]:
    """A jitted (states, shared, own, batches) -> [(state, metrics) of each], one step of models that differ in their leaves
    alone: gradients under vmap, then each optimizer's update. shared: the frozen leaves that all of them have, such as
    the base, which is there, read and decoded once; own: the other frozen leaves of each. The states are donated."""

    def train_step(
        states: Sequence[TrainState],
        shared: variables.FlatTree,
        own: Sequence[variables.FlatTree],
        batches: Sequence[Mapping[str, jax.Array]],
    ) -> list[tuple[TrainState, Metrics]]:
        def gradients(
            state: TrainState, own: variables.FlatTree, batch: Mapping[str, jax.Array]
        ) -> tuple[variables.FlatTree, Totals]:
            return steps[0].gradients(state, {**shared, **own}, batch)

        without_moments = [state._replace(optimizer=()) for state in states]
        stacked = [
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *members) for members in (without_moments, own, batches)
        ]
        together = jax.vmap(gradients)(*stacked)
        return [
            step.updated(state, *jax.tree.map(lambda leaf, index=index: leaf[index], together))
            for index, (step, state) in enumerate(zip(steps, states, strict=True))
        ]

    return _jitted(train_step, states[0].trainable, [(_places(state), None) for state in states])


def _places(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _jitted(step: Callable[..., Any], trainable: variables.FlatTree, results: Any) -> Callable[..., Any]:
    """The function compiled for the mesh of what is trained, its first argument donated; results: where they lie."""
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(trainable))
    return jax.jit(step, donate_argnums=0, out_shardings=results, compiler_options=sharding.compiler_options(mesh))


def make_gradients(
    graph: nnx.GraphDef,
    dropout_keys: tuple[str, ...],
    loss: Loss,
    penalty: Callable[[Any], jax.Array | None] = lambda model: None,
) -> Gradients:
    """`Step.gradients` of a model. Microbatches add up sums of losses and gradients; dividing once by the number of tokens
    makes the result that of one large batch, however the tokens fall. penalty: what a method adds to the mean loss that is
    minimised, from the model; the loss that is reported is without it."""

    def minimised(trainable: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Totals]:
        model = variables.join(graph, trainable, frozen)
        totals = loss(model, batch)
        extra = penalty(model)
        return totals.loss if extra is None else totals.loss + totals.tokens * extra, totals

    def gradients(
        state: TrainState, frozen: variables.FlatTree, batch: Mapping[str, jax.Array]
    ) -> tuple[variables.FlatTree, Totals]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def microbatch(sums: Any, part: Any) -> tuple[Any, None]:
            index, batch = part
            keyed = variables.with_dropout_keys(frozen, dropout_keys, jax.random.fold_in(key, index))
            (_, totals), gradients = jax.value_and_grad(minimised, has_aux=True)(state.trainable, keyed, batch)
            return jax.tree.map(jnp.add, sums, (optax.tree.cast(gradients, jnp.float32), totals)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        none = Totals(*(jnp.zeros((), jnp.float32) for _ in Totals._fields))
        count = len(next(iter(batch.values())))
        (sums, totals), _ = jax.lax.scan(microbatch, (zeros, none), (jnp.arange(count), batch))
        return jax.tree.map(lambda g: g / totals.tokens, sums), totals

    return gradients


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    dropout_keys: tuple[str, ...],
    loss: Loss,
    state: TrainState,
    penalty: Callable[[Any], jax.Array | None] = lambda model: None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`Step.jitted` of a model and an optimizer; the arguments are those of `make_gradients`."""
    return Step(make_gradients(graph, dropout_keys, loss, penalty), optimizer).jitted(state)


def prepare(
    config: Any,
    model: Any,
    method: Method,
    loss: Loss,
    state_of: Callable[[variables.FlatTree, optax.GradientTransformation], TrainState],
) -> tuple[Step, TrainState, variables.FlatTree]:
    """The step that `config` describes, its first state, and what is frozen, of a model in training with its
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
    return Step(make_gradients(graph, dropout, loss, method.penalty), optimizer), state, frozen


def flatten(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a state by name, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
