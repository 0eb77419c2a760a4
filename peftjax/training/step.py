"""The pieces of a train step: accumulated gradients, one update, and the logged metrics.

Only trainable leaves have a gradient, a moment or an update. Inside a step there is plain `jax.value_and_grad` and
`jax.lax.scan` over split state.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.one_cpu import compiler_options, on_one_cpu
from peftjax.models.base import Model
from peftjax.nn.dropout import with_dropout_keys
from peftjax.totals import Batch, Totals
from peftjax.training.integer_stacks import with_integer_stacks

T = TypeVar("T")
Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", variables.FlatTree, Batch], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """Everything that changes from step to step. A checkpoint holds exactly this and the position in the data.

    Attributes:
        step: int32 [], the number of updates done.
        trainable: The trainable parameters by path.
        optimizer: The state of the optimizer.
        key: uint32 [2], the same in all steps: step t draws from fold_in(key, t).
    """

    step: jax.Array
    trainable: variables.FlatTree
    optimizer: optax.OptState
    key: jax.Array


def init_state(trainable: variables.FlatTree, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step.

    The trainable leaves are copied, because a train step donates its state and the model keeps its own.
    """
    out_shardings = shardings(abstract_state(trainable, tx))
    return jax.jit(partial(_make_state, tx, seed), out_shardings=out_shardings)(trainable)


def abstract_state(trainable: variables.FlatTree, tx: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the state, from arrays or from `jax.ShapeDtypeStruct`s with a sharding.

    A moment is sharded as its parameter; everything else is replicated.
    """
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(trainable))
    everywhere = sharding.spec((), (), mesh)

    def placed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = trainable.get(path[-1].key) if isinstance(path[-1], jax.tree_util.DictKey) else None
        where = owner.sharding if owner is not None and owner.shape == leaf.shape else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(partial(_make_state, tx, 0), trainable))


def _make_state(tx: optax.GradientTransformation, seed: int, trainable: variables.FlatTree) -> TrainState:
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trainable), tx.init(trainable), key)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The function of split state that a step minimizes.

    Attributes:
        graph: The structure of the model, in training mode.
        loss: The loss of a model on a batch, summed over its tokens or examples.
        penalty: The term that the method adds to the mean loss, or None. The reported loss does not include it.
        dropout_keys: Paths of the dropout keys, which are redrawn for every microbatch.
        balanced: Whether the loss has a load-balancing part, which the reported loss does not include.
    """

    graph: nnx.GraphDef
    loss: Callable[[Model, Batch], Totals]
    penalty: Callable[[Model], jax.Array | None] = lambda model: None
    dropout_keys: tuple[str, ...] = ()
    balanced: bool = False

    def __call__(
        self, trainable: variables.FlatTree, frozen: variables.FlatTree, batch: Batch
    ) -> tuple[jax.Array, Totals]:
        """The sum to minimize, float32 [], and the sums that the mean loss is computed from."""
        model = variables.join(self.graph, trainable, frozen)
        totals = self.loss(model, batch)
        penalty = self.penalty(model)
        minimized = totals.loss if totals.balance is None else totals.loss + totals.balance
        return minimized if penalty is None else minimized + totals.tokens * penalty, totals


def accumulate(
    objective: Objective, state: TrainState, frozen: variables.FlatTree, batch: Batch
) -> tuple[variables.FlatTree, Totals]:
    """The float32 gradients of the mean loss over all microbatches, and the sums that it is computed from.

    Microbatches add up sums of losses and gradients. Dividing once by the number of tokens makes the result that of one
    large batch, however the tokens are distributed. A load-balancing loss is not a sum over tokens: each microbatch has its
    own, and their mean is weighted by the microbatches' numbers of tokens.

    Args:
        objective: What is minimized.
        state: The current state; its optimizer state is not used.
        frozen: The other leaves of the model.
        batch: Arrays [A, B, ...] of A microbatches.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    differentiated = jax.value_and_grad(objective, has_aux=True)
    if on_one_cpu():
        differentiated = with_integer_stacks(differentiated)

    def microbatch(sums: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, batch = part
        keyed = with_dropout_keys(frozen, objective.dropout_keys, jax.random.fold_in(key, index))
        (_, totals), gradients = differentiated(state.trainable, keyed, batch)
        return jax.tree.map(jnp.add, sums, (optax.tree.cast(gradients, jnp.float32), totals)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
    zero = jnp.zeros((), jnp.float32)
    none = Totals(zero, zero, zero, zero if objective.balanced else None)
    count = len(next(iter(batch.values())))
    (sums, totals), _ = jax.lax.scan(microbatch, (zeros, none), (jnp.arange(count), batch))
    return jax.tree.map(lambda g: g / totals.tokens, sums), totals


def apply(tx: optax.GradientTransformation, state: TrainState, gradients: variables.FlatTree) -> TrainState:
    """The state after one update, computed in float32."""
    updates, optimizer = tx.update(gradients, state.optimizer, state.trainable)
    trainable = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), state.trainable, updates)
    return TrainState(state.step + 1, trainable, optimizer, state.key)


def summary(gradients: variables.FlatTree, totals: Totals) -> Metrics:
    """The logged metrics of a step, float32 [] each."""
    balance = {} if totals.balance is None else {"router_aux_loss": totals.balance / totals.tokens}
    return {
        "loss": totals.loss / totals.tokens,
        **balance,
        "grad_norm": optax.tree.norm(gradients),
        "tokens": totals.tokens,
    }


def make_train_step(objective: Objective, tx: optax.GradientTransformation, state: TrainState) -> TrainStep:
    """The jitted step (state, frozen, batch) -> (state, metrics) for states with the shardings of `state`.

    The state is donated; the frozen leaves are an argument that is never donated and never differentiated.
    """

    @partial(jax.jit, donate_argnums=0, **jit_options(state))
    def train_step(state: TrainState, frozen: variables.FlatTree, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, totals = accumulate(objective, state, frozen, batch)
        return apply(tx, state, gradients), summary(gradients, totals)

    return train_step


def jit_options(state: TrainState) -> dict[str, Any]:
    """Options of `jax.jit` for a step that returns (state, metrics), with the shardings of `state`."""
    options = compiler_options(mesh_of(state).devices.flat)
    return {"out_shardings": (shardings(state), None), "compiler_options": options}


def mesh_of(state: TrainState) -> Mesh:
    """The mesh over which the trainable leaves are sharded."""
    return next(leaf.sharding.mesh for leaf in jax.tree.leaves(state.trainable))


def shardings(state: TrainState) -> TrainState:
    """The sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def abstract_like(tree: T) -> T:
    """The shape, dtype and sharding of every array of a tree, such as a state."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def flatten(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, or their shapes, by name, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(abstract: TrainState, arrays: Mapping[str, Any]) -> TrainState:
    """The state with the structure of `abstract` and arrays by the names of `flatten`."""
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in flatten(abstract)])
