"""The number of runs of a sweep that are trained side by side: as many as fit the memory of the devices."""

import functools
import socket
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import distributed
from peftjax.core.distributed import say_once
from peftjax.core.memory import free_memory
from peftjax.core.units import format_bytes
from peftjax.models.base import Model
from peftjax.tasks import Task
from peftjax.training import precision
from peftjax.training.abstract import StepArguments, abstract_step, bytes_per_device
from peftjax.training.abstract_population import abstract_population, largest_step
from peftjax.training.alike import group_runs
from peftjax.training.config import Config
from peftjax.training.member import Member
from peftjax.training.memory import rejected_bytes, rough_bytes
from peftjax.training.population_step import own_leaves, shared_leaves
from peftjax.training.setup import abstract_run
from peftjax.training.trained import open_task


def one_at_a_time(config: Config, platform: str) -> bool:
    """Whether runs are trained one after the other because they share no base, as in full fine-tuning, and a CPU trains
    them no faster together."""
    return platform == "cpu" and config.method.trains_base


def usable(memory: int, platform: str) -> int:
    """The part of a device's memory that a population's train step may take.

    The rest is for what the compiler does not count: the next batches, evaluation, fragmentation, and on CPUs also the scratch
    memory of XLA's threads and the checkpoints that are being written.
    """
    return int((0.8 if platform == "cpu" else 0.9) * memory)


def concurrent_groups(population: Sequence[Member], most: int | None = None) -> list[tuple[list[Member], int]]:
    """Divide a population into groups that are trained one after the other; returns each with its number of concurrent runs.

    All members fit if a rough estimate from shapes, which is usually too high, is at most half of the memory. Otherwise the
    step of the population is compiled, and the memory that its compiler assigns decides. Members whose models differ
    in structure are in separate groups, as `train_population` would train them. All processes return the same groups.

    Args:
        population: Runs that differ only in fields that `separating_fields` allows.
        most: Maximum number of members that are trained at a time; 0: all; None: as many as fit the memory.
    """
    everyone = len(population)
    if most is not None or everyone < 2:
        return [(list(population), min(most or everyone, everyone))]
    first = population[0].config
    mesh = sharding.make_mesh(first.mesh.sizes)
    platform = mesh.devices.flat[0].platform
    if one_at_a_time(first, platform):
        say_once(
            f"the {everyone} runs share no base weights: they are trained one at a time, which is as fast on a CPU"
        )
        return [(list(population), 1)]
    memory = common_memory(mesh)
    if memory is None:
        say_once(f"the memory of the devices is unknown: {_all(everyone)} runs are trained side by side")
        return [(list(population), everyone)]
    task = open_task(first)
    configs = {one.name: precision.resolve_dtype(one.config, task.hf_config) for one in population}
    room = usable(memory, platform)
    groups, _ = group_runs(
        population, lambda one: configs[one.name].method, lambda one: abstract_run(configs[one.name], task)
    )
    return [
        (members, how_many([configs[one.name] for one in members], task, model, mesh, room))
        for model, members in groups
    ]


def common_memory(mesh: Mesh) -> int | None:
    """The bytes that a program can use on every device of a mesh; None if unknown."""
    found = distributed.gather([socket.gethostname(), free_memory(mesh.local_devices)])
    if any(free is None for _, free in found):
        return None
    hosts = [host for host, _ in found]
    shared = mesh.devices.flat[0].platform == "cpu"  # by the processes of a host
    return min(free // (hosts.count(host) if shared else 1) for host, free in found)


def how_many(configs: Sequence[Config], task: Task, model: Model, mesh: Mesh, memory: int) -> int:
    """The number of members, from 1 to all, whose train step takes at most `memory` bytes per device.

    `model` is the model of all members, from `group_runs`.
    """
    most = len(configs)
    if most == 1:
        return 1
    with jax.set_mesh(mesh):
        config, _, arguments = largest_step(configs, task, model, mesh)
        base, each = _bytes(config, task, model, arguments, mesh)
    room = f"of the {format_bytes(memory)} available per device"
    if (needed := base + most * each) <= memory // 2:
        say_once(f"{_all(most)} runs fit side by side: they need at most about {format_bytes(needed)} {room}")
        return most

    @functools.cache
    def needed_by(members: int) -> int:
        return compiled_bytes(config, task, model, sharding.split_members(mesh, members), members)

    found = largest(needed_by, base, each, most, memory)
    say_once(
        f"{found} of {most} runs are trained side by side: their step takes {format_bytes(needed_by(found))} {room}"
    )
    return found


def _all(runs: int) -> str:
    """All of at least two runs, in a message."""
    return "both" if runs == 2 else f"all {runs}"


def _bytes(config: Config, task: Task, model: Model, arguments: StepArguments, mesh: Mesh) -> tuple[int, int]:
    """The bytes per device of what all members share, and a high estimate of what each of them needs in addition."""
    state, frozen, batch = arguments
    shared = bytes_per_device(shared_leaves(model, frozen))
    own = bytes_per_device((state, own_leaves(model, frozen), batch)) + bytes_per_device(state.trainable, bits=32)
    return shared, own + rough_bytes(config, task, model) // mesh.size


def compiled_bytes(config: Config, task: Task, model: Model, mesh: Mesh, members: int) -> int:
    """The bytes per device that the train step of a population takes, from its compiler."""
    try:
        with jax.set_mesh(mesh):
            _, arguments = abstract_step(config, task, model, mesh)
            step, given = abstract_population(config, task, model, arguments, members)
            memory = step.lower(*given).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if (size := rejected_bytes(str(error))) is None:
            raise
        return max(distributed.gather(size or 2**60))
    assert memory is not None
    created = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    return max(distributed.gather(memory.argument_size_in_bytes + memory.temp_size_in_bytes + created))


def largest(needed: Callable[[int], int], base: int, each: int, most: int, memory: int) -> int:
    """The largest number of members, from 1 to `most`, that needs at most `memory` bytes, up to an eighth.

    `needed` returns the bytes that a number of members needs: about `base`, which they share, and `each` for every member. The
    first number is the one that this estimate allows. Each number that is tried predicts the next one, as if everything but the
    base were proportional to it. The result has been tried, unless it is 1.
    """
    fits, over = 0, most + 1  # the largest number that is known to fit, and the smallest that is known not to
    count = min(max((memory - base) // each, 1), most)
    while fits + 1 < over:
        taken = needed(count)
        fits, over = (count, over) if taken <= memory else (fits, count)
        predicted = (memory - base) * count // max(taken - base, 1)
        if fits and predicted - fits <= fits // 8:
            break
        count = min(max(predicted, fits + 1), over - 1)
    return max(fits, 1)
