"""launch/slurm.sbatch in a real SLURM: munged, slurmctld and slurmd as Debian's slurm-wlm has them, started here."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

STEPS = 30  # of the training

# One node that jobs of `high` take from those of `low`, after a minute's grace; a requeued job waits for `cred_expire`.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""

# Stops at its first start when told to, the second task long after the first; done at its second.
STAND_IN = """
import os, pathlib, signal, sys, time
task = int(os.environ["SLURM_PROCID"])
saved = pathlib.Path(sys.argv[1]) / f"saved-{task}"
def stop(*_):
    time.sleep(task)
    saved.touch()
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("goes on" if saved.exists() else "begins", flush=True)
time.sleep(0 if saved.exists() else 100)
"""


class Slurm:
    """A cluster of this machine alone, with all it writes in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",  # Debian's place for the daemons
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = [free_port(), free_port()]
        text = CONFIG.format(
            folder=self.folder, user=getpass.getuser(), host=socket.gethostname().split(".")[0],
            controller_port=ports[0], node_port=ports[1],
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        # forced: it dislikes a socket in a folder that only this user can enter
        self.daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        wait_for("munged", (self.folder / "munge.socket").exists)
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D", "-N", "localhost")
        wait_for("an idle node", lambda: "idle" in self.run("sinfo", "--noheader", check=False))

    def stop(self) -> None:
        try:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            wait_for("the end of all jobs", lambda: not self.run("squeue", "--noheader", check=False))
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
                daemon.wait(timeout=30)

    def daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as output:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, cwd=self.folder)
            )

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def submit(self, *arguments: str) -> str:
        return self.run("sbatch", "--parsable", f"--output={self.folder}/%j.log", *arguments).strip()

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def states(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(field.split("=", 1) for field in self.run("scontrol", "show", "job", job).split() if "=" in field)

    def wait(self, job: str) -> dict[str, str]:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait_for(f"job {job}", lambda: self.states(job)["JobState"] in ends, 600)
        return self.states(job)


def wait_for(what: str, ready: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    for daemon in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(daemon, path=cluster.environment["PATH"]) is None:
            pytest.skip(f"no {daemon} on this machine; Debian: apt-get install slurm-wlm munge")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    """The command of a job."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return ["launch/slurm.sbatch", sys.executable, str(script), str(tmp_path)]


def test_a_preempted_job_saves_and_goes_on_when_there_is_room(slurm: Slurm, stand_in: list[str]) -> None:
    job = slurm.submit("--partition=low", "--ntasks=2", *stand_in)
    wait_for("the start", lambda: slurm.log(job).count("begins") == 2)
    assert slurm.wait(slurm.submit("--partition=high", "--ntasks=2", "--wrap=true"))["JobState"] == "COMPLETED"
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    for task in range(2):
        lines = [line for line in slurm.log(job).splitlines() if line.startswith(f"{task}: ") and "slurm" not in line]
        assert lines == [f"{task}: begins", f"{task}: saved", f"{task}: goes on"]
    assert f"job {job}, start 2, on localhost: {sys.executable}" in slurm.log(job)


def test_a_training_of_two_tasks_is_stopped_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    changes = {
        "mesh.data": 2, "train.steps": STEPS, "train.log_every": 1, "train.eval_every": STEPS, "train.eval_batches": 1,
        "eval.exact_match": 0, "eval.samples": 0, "checkpoint.every": STEPS,
    }  # fmt: skip
    job = slurm.submit(
        "--ntasks=2", "launch/slurm.sbatch", sys.executable, "-m", "peftjax.train", "--config=configs/quickstart.py",
        f"--workdir={tmp_path}", *(f"--config.{field}={value}" for field, value in changes.items()),
    )  # fmt: skip
    wait_for("the second step", lambda: f" 2/{STEPS} " in slurm.log(job), 600)
    slurm.run("scancel", "--signal=TERM", job)  # as at the end of its time
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert "0: stopped by SIGTERM after step" in slurm.log(job)
    assert "1: stopped by SIGTERM after step" in slurm.log(job)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "learning_rate" in record]
    assert steps == list(range(1, STEPS + 1))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_tasks_of_an_array_train_the_parts_of_a_sweep_and_are_requeued_alone(slurm: Slurm, tmp_path: Path) -> None:
    changes = {
        "train.steps": STEPS, "train.log_every": 1, "train.eval_every": STEPS, "train.eval_batches": 1,
        "eval.exact_match": 0, "eval.samples": 0, "checkpoint.every": STEPS,
    }  # fmt: skip
    array = slurm.submit(
        "--array=1-2", f"--output={slurm.folder}/%A_%a.log", "launch/slurm.sbatch", sys.executable, "-m", "peftjax.sweep",
        "--config=configs/quickstart.py", f"--workdir={tmp_path}/sweep", "--part=$SLURM_ARRAY_TASK_ID/2",
        "--sweep.method.rank=1,2", *(f"--config.{field}={value}" for field, value in changes.items()),
    )  # fmt: skip
    first, second = f"{array}_1", f"{array}_2"
    wait_for("the second step", lambda: f" 2/{STEPS} " in slurm.log(second), 600)
    slurm.run("scancel", "--signal=TERM", second)
    for job, restarts in ((first, "0"), (second, "1")):
        ended = slurm.wait(job)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts), slurm.log(job)
    assert "--part=1/2" in slurm.log(first)
    assert "--part=2/2" in slurm.log(second)
    assert "0: stopped by SIGTERM after step" in slurm.log(second)
    entries = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert {entry["run"] for entry in entries} == {"rank=1", "rank=2"}
    for entry in entries:
        assert entry["scores"]["eval_loss"] > 0
        run = tmp_path / "sweep" / entry["run"]
        assert (run / "adapter" / "adapter_model.safetensors").exists()
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "learning_rate" in record] == list(range(1, STEPS + 1))


def test_a_cancelled_job_saves_and_stays_away(slurm: Slurm, stand_in: list[str]) -> None:
    job = slurm.submit("--ntasks=2", *stand_in)
    wait_for("the start", lambda: slurm.log(job).count("begins") == 2)
    slurm.run("scancel", job)
    wait_for("all to be saved", lambda: slurm.log(job).count("saved") == 2)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_a_failed_job_is_not_run_again(slurm: Slurm) -> None:
    job = slurm.submit("--ntasks=2", "launch/slurm.sbatch", "bash", "-c", "exit $((3 * SLURM_PROCID))")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0")


def test_a_job_without_a_command_says_how(slurm: Slurm) -> None:
    job = slurm.submit("launch/slurm.sbatch")
    assert slurm.wait(job)["ExitCode"] == "2:0"
    assert slurm.log(job) == "usage: sbatch [OPTIONS] launch/slurm.sbatch COMMAND ...\n"


@pytest.mark.parametrize(("task", "part"), [("3", "--part=3/4"), ("", "--part=$SLURM_ARRAY_TASK_ID/4")])
def test_a_command_can_name_the_task_of_a_job_array(task: str, part: str, tmp_path: Path) -> None:
    srun = tmp_path / "srun"  # SLURM itself is not needed
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment |= {"SLURM_ARRAY_TASK_ID": task}
    command = ["launch/slurm.sbatch", "peftjax", "sweep", "--part=$SLURM_ARRAY_TASK_ID/4", "two words", "$HOME"]
    done = subprocess.run(["bash", *command], cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-5:] == ["peftjax", "sweep", part, "two words", "$HOME"]
