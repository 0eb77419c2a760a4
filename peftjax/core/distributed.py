"""Processes that run one command together: how they find each other, and how they stop.

Each process drives the accelerators it sees; together they are one program over one mesh (`jax.distributed`).
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from peftjax.core.errors import UserError

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead, and the others end

# How many processes a launcher started, if it says so: SLURM's srun, Open MPI's mpirun, that of MPICH and its kin.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Preempted(BaseException):  # no error, and like KeyboardInterrupt nothing that `except Exception` may keep
    """The run was asked to stop and does, with everything saved; the command exits with PREEMPTED."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name this process and the others."""
    group = parser.add_argument_group(
        "several processes", "all three, or none: then the cluster says (SLURM, Open MPI, TPU pods, GKE)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached, a free port")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, 0 to N-1")


def start(options: argparse.Namespace) -> None:
    """Join the other processes, of which the options or the cluster tell; returns when all are there. A process that is
    alone waits for nobody. To be called before jax is asked for a device.

    Raises:
        ValueError: some of the three options only, or numbers that cannot be; or a launcher that jax does not know
            started several processes, each of which would take itself for the only one.
    """
    given = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise UserError(f"--{missing[0]} is missing: give --coordinator, --num_processes and --process_id, or none")
        _join_cluster()
        return
    if not 0 <= options.process_id < options.num_processes:
        raise UserError(
            f"--process_id={options.process_id} with --num_processes={options.num_processes}: the first is 0, the last "
            f"{options.num_processes - 1}"
        )
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={options.coordinator} must be HOST:PORT, for example 10.0.0.1:1234")
    _initialize(
        coordinator_address=options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
        cluster_detection_method="deactivate",
    )


def _join_cluster() -> None:
    counts = {name: int(os.environ[name]) for name in _COUNTS if name in os.environ}
    name = max(counts, key=lambda name: counts[name], default="")
    if name and counts[name] == 1:
        return
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    if in_pod and not {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & os.environ.keys():
        return  # a pod of no indexed job, where jax would look for the job's other pods
    # One process a machine takes all of its devices; jax would give it one (None), as it does where each has its own.
    own_machine = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or _one_task_a_node()
    try:
        _initialize(local_device_ids=[] if own_machine else None)
    except (ValueError, RuntimeError) as error:
        # No cluster; or a command called by a program that has asked for its devices already, and is no part of one.
        if not any(words in str(error) for words in ("coordinator_address should be", "must be called before")):
            raise
        if name:
            raise UserError(
                f"{name}={counts[name]}: a launcher started {counts[name]} processes that jax cannot bring together by "
                "itself; give each --coordinator=HOST:PORT --num_processes=N --process_id=I"
            ) from None
        return
    if name and jax.process_count() != counts[name]:
        raise UserError(
            f"{name}={counts[name]}, but jax found {jax.process_count()} processes; give each --coordinator=HOST:PORT "
            "--num_processes=N --process_id=I"
        )


def _one_task_a_node() -> bool:
    """Whether SLURM's srun started one process on each machine: "1" or "1(x16)"."""
    return os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"


def _initialize(**arguments: Any) -> None:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **arguments)
    # Programs that run on CPUs at the same time take each other's turns in the collectives, and wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.process_count() > 1 and jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        raise UserError(
            f"{jax.local_device_count()} CPU devices in each of {jax.process_count()} processes, whose collectives can wait "
            "for each other for ever: take --xla_force_host_platform_device_count out of XLA_FLAGS and start more processes"
        )


def many() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def whole(array: jax.Array) -> np.ndarray:
    """The whole array in this process's memory. Where other processes hold parts of it, all of them must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has in its memory, on the devices of all of them."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class OnHost:
    """An array off the devices: every process keeps those parts of it that its devices held, each once."""

    def __init__(self, array: jax.Array) -> None:
        self.shape, self.dtype, self._sharding = array.shape, array.dtype, array.sharding
        shards = {_where(shard.index): shard for shard in array.addressable_shards}
        self._parts = {where: np.asarray(shard.data) for where, shard in shards.items()}

    def back(self) -> jax.Array:
        """The array on the devices again, as it was."""
        return jax.make_array_from_callback(self.shape, self._sharding, lambda index: self._parts[_where(index)])


def _where(index: tuple[slice, ...] | None) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index or ())


def meet(what: str) -> None:
    """Returns when every process is here; at once for a process that is alone."""
    if many():
        multihost_utils.sync_global_devices(what)


def leave(code: int, *, wait: bool) -> NoReturn:
    """Ends this process, one of several, with an exit code other than that of success.

    `wait`: until all are leaving, as after a mistake that each of them has met, HEARTBEAT seconds at most. If process 0 left
    first, the others would be aborted before they can say what is wrong.
    """

    def shut_down() -> None:
        with contextlib.suppress(Exception):  # the others are not leaving
            jax.distributed.shutdown()

    sys.stdout.flush()
    sys.stderr.flush()
    if wait:
        leaving = threading.Thread(target=shut_down, daemon=True)
        leaving.start()
        leaving.join(HEARTBEAT)
    os._exit(code)  # at once: an orderly exit waits for the other processes, and they for this one


class Preemption:
    """Turns SIGTERM, which a scheduler sends before it takes a machine away, into a stop between two steps.

    A context manager. With several processes one that gets the signal is enough: jax tells the others, and all agree on
    a step that none of them has gone beyond. A second signal changes nothing.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._steps = 0
        self._before: Any = None

    def __enter__(self) -> Self:
        # With several processes jax listens to the signal.
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._signalled = True
        if not self._steps:  # there is nothing to save yet
            raise Preempted("stopped by SIGTERM before the first step; the same command goes on")

    def reached(self) -> bool:
        """Whether to save after this step and stop; asked after every step, by every process."""
        self._steps += 1
        return self._signalled or multihost_utils.reached_preemption_sync_point(self._steps)
