"""The step of a population: the gradients of all members in one program, then each member's own update.

For the gradients, the leaves of all members are padded to the same shapes (`variables.filled`), so that any run can take the
place of another without compiling this program again. Leaves are padded there and only there: each state, update and moment
has the leaves and the shapes that it has in a separate run.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import optax
from jax.typing import ArrayLike

from peftjax import sharding
from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.totals import Batch, Totals
from peftjax.training.step import Metrics, Objective, TrainState, accumulate, apply, summary

Gradients = tuple[variables.FlatTree, Totals]
PopulationGradients = Callable[
    [Sequence[TrainState], variables.FlatTree, Sequence[variables.FlatTree], Sequence[Batch]], Gradients
]
Update = Callable[[TrainState, Gradients, int], tuple[TrainState, Metrics]]
SharedUpdate = Callable[[TrainState, Gradients, int, ArrayLike], tuple[TrainState, Metrics]]


def make_gradients(objective: Objective) -> PopulationGradients:
    """The function (states, shared, own, batches) -> gradients and totals [M, ...] of M members.

    `states` are without moments. `shared` has the frozen leaves of all members, such as the base, which is stored, read and
    dequantized once; `own` has the other frozen leaves of each member.
    """

    def population_gradients(
        states: Sequence[TrainState],
        shared: variables.FlatTree,
        own: Sequence[variables.FlatTree],
        batches: Sequence[Batch],
    ) -> Gradients:
        def member(state: TrainState, own: variables.FlatTree, batch: Batch) -> Gradients:
            return accumulate(objective, state, {**shared, **own}, batch)

        over_members = jax.vmap(member, spmd_axis_name=sharding.members_axis(len(states)))
        return over_members(*map(variables.stack, (states, own, batches)))

    return population_gradients


def make_update(tx: optax.GradientTransformation, names: Mapping[str, str]) -> Update:
    """The function (state, gradients, index) -> (state, metrics) of the member with an index in the population.

    `tx` is the member's optimizer. `names` has the paths in the population of leaves that have other paths in the member.
    """

    def update(state: TrainState, gradients: Gradients, index: int) -> tuple[TrainState, Metrics]:
        padded, totals = jax.tree.map(lambda leaf: leaf[index], gradients)
        named = {path: padded[names.get(path, path)] for path in state.trainable}
        gradient = variables.cut(named, state.trainable)
        return apply(tx, state, gradient), summary(gradient, totals)

    return update


def make_shared_update(
    make_tx: Callable[[ArrayLike], optax.GradientTransformation], names: Mapping[str, str]
) -> SharedUpdate:
    """`make_update` of all members whose optimizers differ only in the peak learning rate, its last argument."""

    def update(state: TrainState, gradients: Gradients, index: int, peak: ArrayLike) -> tuple[TrainState, Metrics]:
        return make_update(make_tx(peak), names)(state, gradients, index)

    return update


def own_leaves(model: Model, frozen: variables.FlatTree) -> variables.FlatTree:
    """The frozen leaves in which runs differ: those that came with the method, such as LoRA's scales, and those of the base that
    were drawn from the seed, such as a new head."""
    kinds, drawn = variables.flat(model)[1], model.origin.drawn if model.origin else ()
    return {
        path: leaf
        for path, leaf in variables.present(frozen).items()
        if isinstance(kinds[path], variables.PeftConstant) or path in drawn
    }


def shared_leaves(model: Model, frozen: variables.FlatTree) -> variables.FlatTree:
    """The other frozen leaves, those of the base."""
    own = own_leaves(model, frozen)
    return {path: leaf for path, leaf in variables.present(frozen).items() if path not in own}
