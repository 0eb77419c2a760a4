"""Distributed runs: initialization, and communication between processes.

Each process drives the accelerators it sees. Together, the processes run one program over one mesh (`jax.distributed`).
"""

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from peftjax.core import output
from peftjax.core.errors import UserError

T = TypeVar("T")

HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead and the others exit

# Variables that hold the number of processes: set by srun of SLURM, by mpirun of Open MPI, and by MPICH and its derivatives.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that identify this process and the coordinator."""
    group = parser.add_argument_group(
        "distributed runs", "give all three, or none to detect the cluster (SLURM, Open MPI, TPU pods, GKE)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="Address of process 0, with a free port")
    group.add_argument("--num_processes", type=int, metavar="N", help="Number of processes")
    group.add_argument("--process_id", type=int, metavar="I", help="Index of this process, 0 to N-1")


def start(options: argparse.Namespace) -> None:
    """Initialize `jax.distributed` from the options or the detected cluster, and wait for all processes.

    A single process returns immediately. Must be called before JAX initializes its devices.

    Raises:
        UserError: Only some of the three options are given, or a value is invalid; or a launcher that JAX does not
            support started several processes, each of which would run on its own.
    """
    given = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise UserError(f"--{missing[0]} is missing: give --coordinator, --num_processes and --process_id, or none")
        _join_cluster()
        return
    if options.num_processes < 1:
        raise UserError(f"--num_processes={options.num_processes} must be at least 1")
    if not 0 <= options.process_id < options.num_processes:
        raise UserError(
            f"--process_id={options.process_id} is out of range for --num_processes={options.num_processes}; use 0 to "
            f"{options.num_processes - 1}"
        )
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
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
        return  # a pod outside an indexed job, in which JAX would look for other pods
    tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # "1" or "1(x16)": one on each machine
    # A process that is alone on its machine uses all devices there; with None, JAX would assign it a single one.
    own_machine = "1" in (os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"), tasks_per_node.partition("(")[0])
    try:
        _initialize(local_device_ids=[] if own_machine else None)
    except (ValueError, RuntimeError) as error:
        # There is no cluster, or a program that has already initialized its devices called the command.
        if not any(words in str(error) for words in ("coordinator_address should be", "must be called before")):
            raise
        if name:
            raise UserError(
                f"{name}={counts[name]}: a launcher started {counts[name]} processes, but JAX cannot detect the cluster; pass "
                "--coordinator=HOST:PORT --num_processes=N --process_id=I to each process"
            ) from None
        return
    if name and jax.process_count() != counts[name]:
        raise UserError(
            f"{name}={counts[name]}, but JAX found {jax.process_count()} processes; pass --coordinator=HOST:PORT "
            "--num_processes=N --process_id=I to each process"
        )


def _initialize(**arguments: Any) -> None:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **arguments)
    # On CPUs, collectives of concurrently dispatched programs can interleave and deadlock.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.process_count() > 1 and jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        raise UserError(
            f"each of {jax.process_count()} processes has {jax.local_device_count()} CPU devices, whose collectives can "
            "deadlock; remove --xla_force_host_platform_device_count from XLA_FLAGS and start more processes"
        )


def many() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def meet(what: str) -> None:
    """Wait until every process has reached the barrier `what`; a single process returns immediately."""
    if many():
        multihost_utils.sync_global_devices(what)


def say_once(text: str) -> None:
    """Print a line, from one process."""
    if jax.process_index() == 0:
        output.say(text)


def gather(value: Any) -> list[Any]:
    """Gather a JSON value of every process, in process order."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([own.size]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(action: Callable[[], T]) -> T:
    """Run an action in process 0 while the other processes wait. In every process, return its result, a JSON value.

    Raises:
        UserError: The action raised one, or an OSError; it is raised in every process.
    """
    outcome: dict[str, Any] = {"value": None, "problem": ""}
    if jax.process_index() == 0:
        try:
            outcome["value"] = action()
        except (UserError, OSError) as error:
            outcome["problem"] = str(error)
    outcome = gather(outcome)[0]
    if outcome["problem"]:
        raise UserError(outcome["problem"])
    value: T = outcome["value"]
    return value


def check_same(what: str, value: Any, differences: Callable[[Any], str]) -> None:
    """Check that a value is the same in every process; a single process returns immediately.

    Args:
        what: The name of these values in the plural.
        value: The JSON value of this process.
        differences: Describes how this process's value ("here") differs from process 0's, which it is given ("there").
            Returns an empty string if they are equal.

    Raises:
        UserError: A process has another value than process 0; it is raised in every process.
    """
    if not many():
        return
    for index, text in enumerate(gather(differences(gather(value)[0]))):
        if text:
            raise UserError(
                f"{what} of process {index} (here) and of process 0 (there) differ: {text}; start all processes with the "
                "same config and data"
            )


def leave(code: int, *, wait: bool) -> NoReturn:
    """Exit this process of a distributed run with a nonzero code.

    With `wait`, it waits up to `HEARTBEAT` seconds for the other processes to exit too, as after an error that all of them
    encounter. If process 0 exited first, the others would be aborted before they can print the error.
    """

    def shut_down() -> None:
        with contextlib.suppress(Exception):  # the other processes are still running
            jax.distributed.shutdown()

    sys.stdout.flush()
    sys.stderr.flush()
    if wait:
        leaving = threading.Thread(target=shut_down, daemon=True)
        leaving.start()
        leaving.join(HEARTBEAT)
    os._exit(code)  # a regular exit would wait for the other processes, which wait for this one
