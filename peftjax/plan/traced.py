"""A train step traced from shapes, not compiled, and the bytes that its arguments and temporaries take.

The step of a population trains several members together, as `peftjax sweep` does. They are planned as equally large.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.plan.experts import ExpertUse, expert_use
from peftjax.tasks import Task, make_task
from peftjax.training import jaxpr_cost
from peftjax.training.abstract import StepArguments, abstract_model, abstract_step, bytes_per_device
from peftjax.training.abstract_population import abstract_population, largest_step
from peftjax.training.alike import group_runs
from peftjax.training.config import Config


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A traced train step. All sizes are bytes per device.

    Attributes:
        task: The task of the config.
        model: The model as shapes.
        arguments: The arguments of the step of one member, as shapes with shardings.
        traced: The traced program.
        members: Number of runs that it trains together.
        use: What a microbatch uses of the experts.
        argument_bytes: Size of the arguments by group, as in `Plan.arguments`.
        gradient_bytes: Size of the gradients.
        temporary_bytes: Estimate of the temporaries: `jaxpr_cost.live_bytes` divided by the number of devices.
    """

    task: Task
    model: Model
    arguments: StepArguments
    traced: jax.stages.Traced
    members: int
    use: ExpertUse
    argument_bytes: dict[str, int]
    gradient_bytes: int
    temporary_bytes: int

    @property
    def needed(self) -> int:
        """Estimate of the memory that the step needs, in bytes per device."""
        return sum(self.argument_bytes.values()) + self.temporary_bytes


def trace_step(
    config: Config, hf_config: Mapping[str, Any], mesh: Mesh, members: int = 1, population: Sequence[Config] = ()
) -> TracedStep:
    """Trace the train step of `config` on a mesh, simulated or not, that trains `members` runs together.

    `population` are the configs of runs that may be trained together; by default, all members have `config`. Each member then
    has the adapters of all of them, their largest ranks, and their largest optimizer state. If their models differ in
    structure, the step is for the structure with the most runs. `hf_config` has the fields of the model's config.json.

    Raises:
        UserError: The model or the method does not go with the config, or the sequences do not fit the model.
    """
    task = _task(config, hf_config)
    groups, _ = group_runs(
        population or [config], lambda one: one.method, lambda one: abstract_model(one, task, hf_config)
    )
    model, runs = max(groups, key=lambda group: len(group[1]))
    task.check_lengths(model, mesh)
    mesh = sharding.split_members(mesh, members)
    with jax.set_mesh(mesh):
        use = expert_use(model, config.train.batch_size // config.train.accumulate, task.positions(model))
        config, step, arguments = largest_step(runs, task, model, mesh)
        if members == 1:
            traced = step.trace(*arguments)
        else:
            together, given = abstract_population(config, task, model, arguments, members)
            traced = together.trace(*given)
    return TracedStep(
        task=task,
        model=model,
        arguments=arguments,
        traced=traced,
        members=members,
        use=use,
        argument_bytes=_argument_bytes(config, model, arguments, members),
        gradient_bytes=members * _gradient_bytes(config, arguments),
        temporary_bytes=jaxpr_cost.live_bytes(traced.jaxpr.jaxpr) // mesh.size,
    )


def state_bytes(config: Config, hf_config: Mapping[str, Any], mesh: Mesh) -> int:
    """Return the bytes per device of parameters, gradients and optimizer state, without tracing the step."""
    task = _task(config, hf_config)
    model = abstract_model(config, task, hf_config)
    with jax.set_mesh(mesh):
        _, arguments = abstract_step(config, task, model, mesh)
    sizes = _argument_bytes(config, model, arguments)
    return sum(sizes.values()) - sizes["batch"] + _gradient_bytes(config, arguments)


def _task(config: Config, hf_config: Mapping[str, Any]) -> Task:
    return make_task(config.task, config.data, Path(config.model.path), config.train.loss_chunk, hf_config)


def _argument_bytes(config: Config, model: Model, arguments: StepArguments, members: int = 1) -> dict[str, int]:
    """The bytes of each group of arguments. Members share the frozen base."""
    state, frozen, batch = arguments
    base = {path for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}
    full = config.method.trains_base
    sizes = {
        "frozen base": bytes_per_device([leaf for path, leaf in frozen.items() if path in base]),
        "adapters' frozen parts": bytes_per_device([leaf for path, leaf in frozen.items() if path not in base]),
        "parameters, all trained" if full else "adapters": bytes_per_device(state.trainable),
        "optimizer state": bytes_per_device((state.step, state.optimizer, state.key)),
        "batch": bytes_per_device(batch),
    }
    return {name: size * (1 if name == "frozen base" else members) for name, size in sizes.items() if size}


def _gradient_bytes(config: Config, arguments: StepArguments) -> int:
    """Gradients have the parameters' dtype; accumulated ones are float32."""
    return bytes_per_device(arguments.state.trainable, bits=32 if config.train.accumulate > 1 else None)
