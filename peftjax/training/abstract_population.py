"""The train step of a population from shapes alone."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.tasks import Task
from peftjax.training.abstract import StepArguments, abstract_step, bytes_per_device
from peftjax.training.config import Config
from peftjax.training.population_step import make_gradients, make_update, own_leaves, shared_leaves
from peftjax.training.split import split
from peftjax.training.step import Metrics, TrainState, jit_options


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
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The jitted step (states, shared, own, batches) of `members` members with this config, and its arguments as shapes.

    Call it inside `jax.set_mesh(mesh)`. `arguments` are the arguments of one member's step, from `abstract_step`.
    """
    state, frozen, batch = arguments
    parts = split(config, task, model, config.method)
    population_gradients, update = make_gradients(parts.objective), make_update(parts.tx, {})
    options = jit_options(state)

    @partial(jax.jit, donate_argnums=0, **options | {"out_shardings": [options["out_shardings"]] * members})
    def population_step(
        states: list[TrainState], shared: variables.FlatTree, own: list[variables.FlatTree], batches: list[Any]
    ) -> list[tuple[TrainState, Metrics]]:
        gradients = population_gradients([each._replace(optimizer=()) for each in states], shared, own, batches)
        return [update(each, gradients, index) for index, each in enumerate(states)]

    own, shared = own_leaves(model, frozen), shared_leaves(model, frozen)
    return population_step, ([state] * members, shared, [own] * members, [batch] * members)
