"""launch/local.py with small stand-ins for the command: what each process gets, and how the whole ends."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launch import local

ROOT = Path(__file__).resolve().parents[2]


def launch(script: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    """Starts launch/local.py with `python -c script` as its command; `process` is each one's index in the script."""
    script = f"import os, signal, sys, time\nprocess = int(sys.argv[-1].split('=')[1])\n{textwrap.dedent(script)}"
    command = [sys.executable, "launch/local.py", *options, "--", sys.executable, "-u", "-c", script, "--mine=1"]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(launched: subprocess.Popen[str]) -> tuple[int, list[str]]:
    lines = launched.communicate(timeout=60)[0].splitlines()
    return launched.returncode, lines


def test_every_process_gets_its_flags_and_its_lines_are_prefixed() -> None:
    code, lines = ended(launch("print(*sys.argv[1:])", "--processes=3"))
    port = lines[0].split("--coordinator=127.0.0.1:")[1].split()[0]
    assert code == 0
    assert sorted(lines) == [
        f"[{i}] --mine=1 --coordinator=127.0.0.1:{port} --num_processes=3 --process_id={i}" for i in range(3)
    ]


def test_devices_are_split_in_order() -> None:
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6,7,8", "XLA_FLAGS": "--mine", "HOME": "/"}
    first, second = local.split_devices(given, 2, 2)
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("4,5", "6,7")
    assert first["XLA_FLAGS"] == "--mine --xla_force_host_platform_device_count=2"
    assert first["HOME"] == "/"
    assert [each["CUDA_VISIBLE_DEVICES"] for each in local.split_devices({}, 3, 1)] == ["0", "1", "2"]
    assert local.split_devices({"CUDA_VISIBLE_DEVICES": ""}, 1, 2)[0]["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(ValueError, match=r"2 processes of 3 devices need 6 GPUs, but CUDA_VISIBLE_DEVICES=.* lists 5"):
        local.split_devices(given, 2, 3)


def test_one_failure_stops_the_others_and_gives_the_exit_code() -> None:
    script = """
        if process == 1:
            sys.exit(7)
        signal.signal(signal.SIGTERM, lambda *_: (print("stopping"), sys.exit(75)))
        time.sleep(60)
    """
    code, lines = ended(launch(script, "--processes=3"))
    assert code == 7
    assert "a process failed with exit code 7; stopping the others" in lines


def test_a_process_that_will_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE", 0.2)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    with local.start([sys.executable, "-c", stubborn], os.environ) as deaf:
        assert deaf.stdout is not None
        assert deaf.stdout.readline() == b"deaf\n"
        with local.start([sys.executable, "-c", "import os; os.abort()"], os.environ) as failing:
            assert local.wait([deaf, failing]) == 128 + signal.SIGABRT
    assert (deaf.returncode, failing.returncode) == (-signal.SIGKILL, -signal.SIGABRT)


def launch_ready(handler: str) -> subprocess.Popen[str]:
    """Two processes that have set a handler and wait for a signal."""
    # Short sleeps: a signal that arrives just before a sleep begins is handled after it.
    launched = launch(f"{handler}\nprint('ready')\nfor _ in range(600):\n    time.sleep(0.1)", "--processes=2")
    assert launched.stdout is not None
    assert sorted(launched.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    return launched


def test_sigterm_reaches_all_and_75_means_run_again() -> None:
    launched = launch_ready("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75 if process else 0))")
    launched.send_signal(signal.SIGTERM)
    assert ended(launched) == (75, [])


def test_ctrl_c_reaches_all_and_is_not_called_a_failure() -> None:
    launched = launch_ready(
        'signal.signal(signal.SIGINT, lambda *_: (time.sleep(process / 2), print("saved"), sys.exit(130)))'
    )
    launched.send_signal(signal.SIGINT)
    assert ended(launched) == (130, ["[0] saved", "[1] saved"])


def test_processes_end_if_nothing_reads_their_output() -> None:
    launched = launch('while True:\n  print("x" * 1000)', "--processes=2")
    assert launched.stdout is not None
    assert launched.stdout.readline()
    launched.stdout.close()
    assert launched.wait(60) not in (0, local.STOPPED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "required: COMMAND"),
        (["--processes=none", "--", "x"], "'none' is not a positive integer"),
        (["--processes=1", "--", "./no-such-command"], r"cannot run './no-such-command': No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        local.main(arguments)
    assert message in capsys.readouterr().err
