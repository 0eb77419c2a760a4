"""The train step of a population from shapes alone."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax.adapters.method import Method
from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.tasks import Task
from peftjax.training.abstract import Batch, StepArguments, abstract_step, bytes_per_device
from peftjax.training.alike import align_dropout, unite
from peftjax.training.config import Config
from peftjax.training.population import make_population_step, own_leaves, shared_leaves
from peftjax.training.split import split
from peftjax.training.step import TrainState


class PopulationArguments(NamedTuple):
    """The arguments of a population's train step, as `jax.ShapeDtypeStruct`s with shardings."""

    states: list[TrainState]
    shared: variables.FlatTree
    own: list[variables.FlatTree]
    batches: list[Batch]


def united_models(configs: Iterable[Config], make: Callable[[Config], Model]) -> list[tuple[Model, list[Config]]]:
    """The models of a population, as shapes: one for each structure, with the configs that one program can train.

    A model has the adapters of all its configs, and their largest ranks, as in the program.

    Args:
      configs: Configs that differ only in fields that `separating_fields` allows.
      make: Makes the model of a config, as shapes.
    """
    by_method: dict[Method, list[Config]] = {}
    for config in configs:
        by_method.setdefault(config.method, []).append(config)
    models = [make(alike[0]) for alike in by_method.values()]
    align_dropout(models)
    groups: list[tuple[Model, list[Config]]] = []
    for model, alike in zip(models, by_method.values(), strict=True):
        for index, (united, members) in enumerate(groups):
            if (both := unite(united, model)) is not None:
                _widen(both, model)
                groups[index] = (both, [*members, *alike])
                break
        else:
            groups.append((model, alike))
    return groups


def _widen(model: Model, other: Model) -> None:
    """Give each leaf that came with a method the larger of its sizes in both models, in place."""
    leaves, others = variables.flat(model)[1], variables.flat(other)[1]
    for path, leaf in leaves.items():
        if path in others and type(leaf) is not nnx.Param:
            mine, theirs = leaf.get_value(), others[path].get_value()
            shape = tuple(map(max, mine.shape, theirs.shape))
            leaf.set_value(jax.ShapeDtypeStruct(shape, mine.dtype))
    variables.update(model, {path: leaf.get_value() for path, leaf in leaves.items()})


def largest_step(
    configs: Iterable[Config], task: Task, model: Model, mesh: Mesh
) -> tuple[Config, jax.stages.Wrapped, StepArguments]:
    """The config whose optimizer has the largest state, its step and the step's arguments; see `abstract_step`."""
    steps = [
        (config, *abstract_step(config, task, model, mesh)) for config in {one.optim: one for one in configs}.values()
    ]
    return max(steps, key=lambda step: bytes_per_device(step[2].state))


def abstract_population(
    config: Config, task: Task, model: Model, arguments: StepArguments, members: int
) -> tuple[jax.stages.Wrapped, PopulationArguments]:
    """The jitted step of a population of equal members, and its arguments as shapes with shardings.

    Call it inside `jax.set_mesh(mesh)`.

    Args:
      config: The config of each member.
      task: Its task.
      model: The model as shapes with shardings.
      arguments: The arguments of the step of one member, from `abstract_step`.
      members: Number of members.
    """
    state, frozen, batch = arguments
    states = [state] * members
    parts = split(config, task, model, config.method)
    step = make_population_step(parts, [parts.tx] * members, states)
    own, shared = own_leaves(model, frozen), shared_leaves(model, frozen)
    return cast(jax.stages.Wrapped, step), PopulationArguments(states, shared, [own] * members, [batch] * members)
