"""Who this process is: by the options, by the cluster, or alone. Real processes are in tests/test_processes.py."""

import argparse
import os
from typing import Any

import pytest

from peftjax.core import cli, distributed
from peftjax.core.errors import UserError

LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "TPU_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What jax.distributed.initialize was called with, in an environment of no cluster."""
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    calls: list[dict[str, Any]] = []

    def initialize(**arguments: Any) -> None:
        calls.append(arguments)
        if "coordinator_address" not in arguments and "SLURM_STEP_NODELIST" not in os.environ:
            raise ValueError("coordinator_address should be defined.")  # the message of JAX without a cluster

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr("jax.config.update", lambda name, value: None)
    return calls


def options(*argv: str) -> argparse.Namespace:
    return cli.parse_command(["--config=c", "--workdir=w", *argv], "train", "", options=distributed.add_options)


def test_the_options_name_the_processes(asked: list[dict[str, Any]]) -> None:
    distributed.start(options("--coordinator=10.0.0.1:1234", "--num_processes=4", "--process_id=3"))
    (arguments,) = asked
    assert arguments["coordinator_address"] == "10.0.0.1:1234"
    assert (arguments["num_processes"], arguments["process_id"]) == (4, 3)
    assert arguments["cluster_detection_method"] == "deactivate"
    assert arguments["heartbeat_timeout_seconds"] == distributed.HEARTBEAT


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num_processes=2",), "--coordinator is missing: give"),
        (
            ("--coordinator=a:1", "--num_processes=2", "--process_id=2"),
            "--process_id=2 is out of range for --num_processes=2; use 0 to 1",
        ),
        (("--coordinator=a:1", "--num_processes=0", "--process_id=0"), "--num_processes=0 must be at least 1"),
        (("--coordinator=a", "--num_processes=2", "--process_id=0"), "--coordinator=a must be HOST:PORT"),
        (("--coordinator=a:99999", "--num_processes=2", "--process_id=0"), "--coordinator=a:99999 must be HOST:PORT"),
    ],
)
def test_options_that_cannot_be_are_refused(asked: list[dict[str, Any]], argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distributed.start(options(*argv))
    assert asked == []


@pytest.mark.parametrize(
    "environment",
    [
        {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "4",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NODELIST": "a",
        },  # in salloc
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod of no job
    ],
)
def test_a_process_that_is_alone_asks_for_nobody(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.start(options())
    assert asked == []


def test_without_a_cluster_a_process_is_alone(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # an sbatch script without srun
    monkeypatch.setenv("SLURM_NTASKS", "4")
    distributed.start(options())
    assert not distributed.many()


def test_processes_that_jax_cannot_bring_together_are_refused(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")  # Open MPI 5, of which jax does not know
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE=4: a launcher started 4 processes, .* to each process"):
        distributed.start(options())


@pytest.mark.parametrize(("tasks", "devices"), [("1(x2)", []), ("4(x2)", None)])
def test_one_process_a_machine_takes_all_of_its_devices(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tasks: str, devices: list[int] | None
) -> None:
    count = "2" if devices == [] else "8"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", count)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    monkeypatch.setattr("jax.process_count", lambda: int(count))
    monkeypatch.setattr("jax.local_device_count", lambda: 1)
    distributed.start(options())
    assert asked[0]["local_device_ids"] == devices


def test_a_value_of_another_process_is_named_and_refused_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def differences(there: int) -> str:
        return f"1 here, {there} there" if there != 1 else ""

    distributed.check_same("the numbers", 1, differences)  # one process
    monkeypatch.setattr(distributed, "many", lambda: True)
    for rows in ([[1, 1], ["", ""]], [[1, 2], ["", "2 here, 1 there"]]):
        answers = iter(rows)
        monkeypatch.setattr(distributed, "gather", lambda value, answers=answers: next(answers))
        if not any(rows[1]):
            distributed.check_same("the numbers", 1, differences)
            continue
        with pytest.raises(
            UserError,
            match=r"the numbers of process 1 \(here\) and of process 0 \(there\) differ: 2 here, 1 there; start",
        ):
            distributed.check_same("the numbers", 1, differences)


def test_what_the_first_process_does_has_a_value_or_an_error_for_all() -> None:
    assert distributed.on_first(lambda: {"url": [1, None]}) == {"url": [1, None]}

    def fail() -> None:
        raise UserError("not logged in")

    with pytest.raises(UserError, match="not logged in"):
        distributed.on_first(fail)
