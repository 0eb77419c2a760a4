"""Whether a batch and its train step can fit the memory, from shapes, before any weights are read.

The checks use lower bounds: what is refused here cannot run, but what is accepted may still run out of memory. `peftjax plan`
compiles the step and gives the exact amount.
"""

import re

import jax
from jax.sharding import Mesh

from peftjax.core.errors import UserError
from peftjax.core.memory import host_memory, most_memory, swap_space
from peftjax.core.units import format_bytes
from peftjax.data.padding import lengths
from peftjax.models.base import LanguageModelConfig, Model
from peftjax.report.data import tree_bytes
from peftjax.tasks import Task
from peftjax.training import jaxpr_cost
from peftjax.training.abstract import StepArguments, bytes_per_device
from peftjax.training.config import Config


def check_batch(config: Config, task: Task, rows: int) -> None:
    """Raises a UserError if the arrays of a batch do not fit the memory of a process that loads `rows` of its rows.

    This is a lower bound: all rows have the smallest possible length. One more row, from which padding is taken, has the
    full length.
    """
    longest = task.row_shapes()
    shortest = dict(longest)
    if not config.data.pack:
        for text in task.texts:
            for name in text.names:
                length = lengths(longest[name].shape[0], text.ratio)[0]
                shortest[name] = jax.ShapeDtypeStruct((length,), longest[name].dtype)
    needed = tree_bytes(longest) + rows * tree_bytes(shortest)
    if needed > (memory := host_memory() + swap_space()):
        raise UserError(
            f"{_describe(config, task)}: the batch alone takes {format_bytes(needed)}, and this machine has "
            f"{format_bytes(memory)} of memory; lower {_smaller(task)}"
        )


def check_step(
    config: Config, task: Task, model: Model, mesh: Mesh, step: jax.stages.Wrapped, arguments: StepArguments
) -> None:
    """Raises a UserError if a train step needs more memory than a device has, even with a perfect compiler.

    The arguments of the step, none of which is freed before its end, and the arrays that its loops store for the backward pass
    are counted. The step is traced only if they might not fit, because tracing takes about half a second. `step` and `arguments`
    are those of `abstract_step`.
    """
    memory = most_memory(mesh.local_devices)
    if memory is None:
        return
    state = bytes_per_device((arguments.state, arguments.frozen))
    given = state + bytes_per_device(arguments.batch)
    if given + rough_bytes(config, task, model) // mesh.size < memory:
        return
    stored = jaxpr_cost.stored_bytes(step.trace(*arguments).jaxpr.jaxpr) // mesh.size  # at best, all devices share them
    if given + stored <= memory:
        return
    there = f"{format_bytes(memory)} of memory"
    if state > memory:
        raise UserError(
            f"model.path={config.model.path!r}: the weights and the optimizer's state take {format_bytes(state)} per device, "
            f"but only {there} are available; quantize the model (model.quantize), or shard it over more devices (mesh.fsdp)"
        )
    microbatches = ", or raise train.accumulate" if config.train.batch_size > config.train.accumulate else ""
    raise UserError(
        f"{_describe(config, task)}: a step takes at least {format_bytes(given + stored)} per device, "
        f"{format_bytes(given + stored - state)} of it for the batch, but only {there} are available; lower {_smaller(task)}"
        f"{microbatches}"
    )


def rough_bytes(config: Config, task: Task, model: Model) -> int:
    """A high estimate of the bytes that the backward pass of a microbatch needs; it decides whether to count exactly."""
    rows = config.train.batch_size // config.train.accumulate
    length, sizes = task.positions(model) + model.virtual, model.config
    each = 4 * sizes.heads * length + 24 * (sizes.embed + sizes.mlp)  # per position and layer: scores and activations
    vocab = sizes.vocab if isinstance(sizes, LanguageModelConfig) else 0
    logits = 4 * min(config.train.loss_chunk, length) * vocab
    return 4 * rows * (length * sizes.layers * each + logits)


def rejected_bytes(message: str) -> int | None:
    """The bytes that a program needs, from the message of a compiler that rejects it because it does not fit.

    None if this is not such a message; 0 if it does not say how many.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    total = re.search(r"(?:temporaries \(|Used )([\d.]+)G", message)
    return int(float(total[1]) * 2**30) if total else 0


def _describe(config: Config, task: Task) -> str:
    length = f" and data.max_length={config.data.max_length}" if task.texts else ""
    return f"train.batch_size={config.train.batch_size}{length}"


def _smaller(task: Task) -> str:
    return "train.batch_size or data.max_length" if task.texts else "train.batch_size"
