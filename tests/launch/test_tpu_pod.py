"""launch/tpu_pod.sh against a gcloud that plays the service: one worker, which really runs what it is sent.

Nothing here asks Google Cloud; that the real gcloud knows these commands and options was tried by hand.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import blocks

ROOT = Path(__file__).resolve().parents[2]

OPTIONS = ["--name=mine", "--zone=us-west4-a", "--type=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite"]
DELETE = ["compute", "tpus", "queued-resources", "delete", "mine", "--zone=us-west4-a", "--quiet", "--force"]

# Answers with the states that the test wrote, one after the other, and with the last for ever.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path(__file__).parent
group, verb = sys.argv[3:5]
name = sys.argv[6].split(":")[0] if verb == "scp" else sys.argv[5]
if (here / name).is_dir():  # a TPU with a worker of its own
    here = here / name
home = here / "home"
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if verb == "describe":
    states = (here / "states").read_text().split()
    (here / "states").write_text(" ".join(states[1:] or states))
    if states[0] == "ABSENT":
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    if states[0] == "DENIED":
        sys.exit("ERROR: (gcloud) PERMISSION_DENIED: no")
    print(states[0])
elif verb == "scp":
    shutil.copy(sys.argv[5], home / sys.argv[6].split(":")[1])
elif verb == "ssh":
    command = next(each for each in sys.argv if each.startswith("--command=")).removeprefix("--command=")
    path = f"{here}/worker:{os.environ['PATH']}"
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {"HOME": str(home), "PATH": path}).returncode)
"""

# What the worker has: a python3 whose pip brings uv, and a uv whose environment has this python.
TOOLS = f"""#!/bin/bash
case "$(basename "$0") $*" in
    "python3 -m pip install --quiet --user uv") mkdir -p ~/.local/bin && cp "$0" ~/.local/bin/uv ;;
    "uv venv "*) mkdir -p .venv/bin && ln -s {sys.executable} .venv/bin/python ;;
    "uv pip install --quiet --editable .[tpu]") grep -q '^tpu = ' pyproject.toml ;;
    *) exit 99 ;;
esac
"""

# Ends with the next of the exit codes that the test wrote.
COMMAND = """
import os, pathlib, sys, time
codes = pathlib.Path.home() / "codes"
first, *rest = codes.read_text().split()
codes.write_text(" ".join(rest))
print("ran with", sys.argv[1:], "in", pathlib.Path.cwd().name, flush=True)
if first == "wait":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(int(first))
"""


class Cloud:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "home").mkdir(parents=True)
        (folder / "worker").mkdir()
        self.executable("gcloud", f"#!{sys.executable}\n{GCLOUD}")
        self.executable("worker/python3", TOOLS)
        (folder / "home" / "command.py").write_text(COMMAND)

    def executable(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def plan(self, states: str, codes: str) -> None:
        """Set the states of the TPU and the exit codes of the command."""
        (self.folder / "states").write_text(states)
        (self.folder / "home" / "codes").write_text(codes)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "TPU_POD_POLL": "0"}

    def start(self, *options: str, states: str, codes: str = "", root: Path = ROOT) -> subprocess.Popen[str]:
        self.plan(states, codes)
        command = ["python", "../command.py", "--a=b", "two words", "$HOME 'x'"]
        return subprocess.Popen(
            ["launch/tpu_pod.sh", *OPTIONS, *options, "--", *command],
            cwd=root, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *options: str, states: str, codes: str = "", root: Path = ROOT) -> tuple[int, str]:
        launched = self.start(*options, states=states, codes=codes, root=root)
        output = launched.communicate(timeout=120)[0]
        return launched.returncode, output

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    @property
    def verbs(self) -> str:
        """What was asked for, the looks at the state left out."""
        return " ".join(call[3] for call in self.calls if call[3] != "describe")


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_a_run_from_nothing_to_its_end(cloud: Cloud) -> None:
    states = "ABSENT ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    code, output = cloud.run("--spot", "--project=ours", "--setup=echo set up in $PWD", states=states, codes="0")
    assert code == 0, output
    assert cloud.verbs == "create ssh scp ssh ssh ssh ssh delete"  # stop, send, install, set up, stop, run
    create = next(call for call in cloud.calls if call[3] == "create")
    assert create == [
        "compute", "tpus", "queued-resources", "create", "mine", "--project=ours", "--zone=us-west4-a", "--quiet",
        "--node-id=mine", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    assert all("--worker=all" in call for call in cloud.calls if call[3] in ("ssh", "scp"))
    assert f"set up in {cloud.folder}/home" in output
    assert """ran with ['--a=b', 'two words', "$HOME 'x'"] in peftjax""" in output
    sent = cloud.folder / "home" / "peftjax"
    assert (sent / "launch" / "tpu_pod.sh").read_bytes() == (ROOT / "launch" / "tpu_pod.sh").read_bytes()
    assert not (sent / ".git").exists()


def test_a_tracked_file_that_has_been_deleted_is_not_sent(cloud: Cloud) -> None:
    root = cloud.folder / "repository"
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "tpu_pod.sh", root / "launch")
    (root / "pyproject.toml").write_text("tpu = []\n")
    (root / "with space.txt").touch()
    (root / "deleted.txt").touch()
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "deleted.txt").unlink()
    code, output = cloud.run(states="ACTIVE", codes="0", root=root)
    assert code == 0, output
    sent = {file.name for file in (cloud.folder / "home" / "peftjax").iterdir()}
    assert sent == {".venv", "launch", "pyproject.toml", "with space.txt"}


def test_a_preemption_is_followed_by_another_tpu(cloud: Cloud) -> None:
    states = "ACTIVE SUSPENDING SUSPENDED ABSENT ACTIVE"  # gone when looked at after the run
    code, output = cloud.run("--keep", states=states, codes="1 0")
    assert code == 0, output
    assert cloud.verbs == "ssh scp ssh ssh ssh ssh delete create ssh scp ssh ssh ssh ssh"
    assert output.count("ran with") == 2
    assert DELETE in cloud.calls


def test_what_was_stopped_with_all_saved_goes_on_at_the_same_tpu(cloud: Cloud) -> None:
    code, output = cloud.run("--keep", states="ACTIVE", codes="75 255 0")
    assert code == 0, output
    assert cloud.verbs == "ssh scp ssh ssh" + 3 * " ssh ssh"  # installed once, run three times


@pytest.mark.parametrize(("codes", "code", "runs"), [("3", 3, 1), ("255 255 255 255 255", 255, 5)])
def test_a_run_that_fails_is_not_repeated_and_what_it_costs_is_said(
    cloud: Cloud, codes: str, code: int, runs: int
) -> None:
    ended, output = cloud.run(states="ACTIVE", codes=codes)
    assert ended == code
    assert output.count("ran with") == runs
    assert "still allocated and billed; to delete it: gcloud " + " ".join(DELETE) in output


def test_ctrl_c_stops_the_workers_and_keeps_the_tpu(cloud: Cloud) -> None:
    launched = cloud.start(states="ACTIVE", codes="wait")
    assert launched.stdout is not None
    while "waiting" not in (line := launched.stdout.readline()):
        assert line, "ended early"
    launched.send_signal(signal.SIGINT)
    output = launched.communicate(timeout=60)[0]
    assert launched.returncode == 75
    assert "still allocated and billed" in output
    assert "delete" not in cloud.verbs


@pytest.mark.parametrize(
    ("states", "message"), [("ABSENT FAILED", "the request failed"), ("DENIED", "PERMISSION_DENIED")]
)
def test_a_request_that_cannot_be_met_ends_it(cloud: Cloud, states: str, message: str) -> None:
    code, output = cloud.run(states=states)
    assert code == 1
    assert message in output
    assert "delete" not in cloud.verbs


@pytest.mark.parametrize(
    "arguments", [[], OPTIONS, [*OPTIONS, "--sport", "--", "true"], [*OPTIONS, "--parts=0", "--", "true"]]
)
def test_a_mistake_shows_the_usage(arguments: list[str]) -> None:
    done = subprocess.run(["launch/tpu_pod.sh", *arguments], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    assert "usage: launch/tpu_pod.sh --name=NAME" in done.stdout


def test_the_command_in_the_documentation_trains_every_part_of_a_sweep_on_a_tpu_of_its_own(cloud: Cloud) -> None:
    page = ROOT / "docs" / "launch_tpu_pod.md"
    command = next(block.code for block in blocks(page, "bash") if "--parts=4" in block.code)
    clouds = [Cloud(cloud.folder / f"sweep-{part}") for part in range(1, 5)]
    for part, own in enumerate(clouds, 1):  # the second one is preempted
        own.plan(*(("ACTIVE SUSPENDED ABSENT ACTIVE", "1 0") if part == 2 else ("ABSENT ACTIVE", "0")))
    for written, here in (
        ("--setup='...'", "--setup=true"), ("launch/", f"{ROOT}/launch/"), ("python -m peftjax.sweep", "python ../command.py"),
    ):  # fmt: skip
        assert written in command
        command = command.replace(written, here)
    subprocess.run(["bash", "-c", command], cwd=cloud.folder, env=cloud.environment, check=True, timeout=120)
    for part, own in enumerate(clouds, 1):
        output = (cloud.folder / f"sweep-{part}.log").read_text()
        arguments = [
            "--config=my_config.py",
            "--workdir=/mnt/runs/sweep",
            "--sweep.method.rank=4,8,16,32",
            f"--part={part}/4",
        ]
        assert output.count(f"ran with {arguments} in peftjax") == (2 if part == 2 else 1), output
        assert own.verbs.endswith("delete")
        creates = [call for call in own.calls if call[3] == "create"]
        assert [(call[4], "--spot" in call) for call in creates] == [(f"sweep-{part}", True)]


def test_all_parts_of_a_sweep_are_stopped_together_and_the_highest_exit_code_is_returned(cloud: Cloud) -> None:
    for part, codes in ((1, "wait"), (2, "3")):
        Cloud(cloud.folder / f"mine-{part}").plan("ACTIVE", codes)
    command = [ROOT / "launch" / "tpu_pod.sh", *OPTIONS, "--parts=2", "--", "python", "../command.py"]
    launched = subprocess.Popen(command, cwd=cloud.folder, env=cloud.environment, text=True, stdout=subprocess.PIPE)
    first, second = (cloud.folder / f"mine-{part}.log" for part in (1, 2))
    deadline = time.monotonic() + 60
    while not ("waiting" in first.read_text() if first.exists() else False) or "billed" not in second.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launched.send_signal(signal.SIGTERM)
    output = launched.communicate(timeout=60)[0]
    assert "part 1 ended with exit code 75" in output
    assert "part 2 ended with exit code 3" in output
    assert launched.returncode == 75
