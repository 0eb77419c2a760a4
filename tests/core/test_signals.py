"""SIGINT and SIGTERM: what each means before, during and after the steps of a run. tests/training has them in real runs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from peftjax.core import preemption as preemptions
from peftjax.core import signals as module
from peftjax.core.preemption import Interrupted, Preempted, Preemption, stopped
from peftjax.core.progress import EVALUATING, SAVING, Progress
from peftjax.core.signals import Signals
from tests.runs import wait_until

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("unsaved", "numbers", "last"),
    [
        (False, [TERM], "stopped by SIGTERM with nothing to save"),
        (False, [INT], "interrupted with nothing to save"),
        (True, [TERM], ""),
        (True, [TERM, TERM], ""),  # an impatient scheduler
        (True, [INT], ""),
        (True, [INT, TERM], ""),
        (True, [INT, INT], "interrupted again; exiting at once"),
        (True, [TERM, INT], "interrupted again; exiting at once"),
    ],
)
def test_a_signal_stops_at_once_if_nothing_is_lost_or_if_it_is_the_second_ctrl_c(
    unsaved: bool, numbers: list[int], last: str, capfd: pytest.CaptureFixture[str]
) -> None:
    signals = Signals()
    signals.unsaved = unsaved
    *first, why = [signals.receive(number) for number in numbers]
    assert not any(first)
    assert why.startswith(last)
    assert bool(why) == bool(last)
    assert signals.asked == numbers[0]
    assert capfd.readouterr().err.count("press Ctrl-C again") == (unsaved and numbers[0] == INT)


def test_messages_name_the_last_complete_checkpoint_and_what_is_finished_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Preemption(tmp_path / "checkpoints"):
        assert module.received.receive(INT) == (
            "interrupted before the end of the first step, with nothing to save; run the same command again to start"
        )
        assert module.received.receive(INT) == (
            "interrupted again; exiting at once. There is no complete checkpoint yet"
        )
    for name in ("9", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    last = tmp_path / "checkpoints" / "10"
    with Preemption(tmp_path / "checkpoints"):
        assert module.received.receive(TERM) == (
            f"stopped by SIGTERM with nothing to save since the last checkpoint; run the same command again to resume from {last}"
        )
    with Preemption(tmp_path / "checkpoints") as preemption, Progress(enabled=False) as progress:
        preemption.reached()
        with progress.phase(EVALUATING):
            assert module.received.receive(INT) == ""
        assert capfd.readouterr().err == (
            "finishing the evaluation, then saving and stopping; press Ctrl-C again to exit at once\n"
        )
        assert module.received.receive(INT) == (
            f"interrupted again; exiting at once. The last complete checkpoint is intact: {last}"
        )
        with progress.phase(SAVING):
            assert not module.received.finishing
    assert module.received.saved is None


def test_a_signal_is_answered_although_nobody_reads_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(module.os, "write", write)
    signals, forwarded = Signals(), []
    signals.unsaved, signals.forward = True, lambda: forwarded.append(INT)
    assert signals.receive(INT) == ""
    assert forwarded == [INT]


def test_a_forked_process_handles_signals_as_usual() -> None:
    program = (
        "import os, signal, sys\n"
        "from peftjax.core.signals import received\n"
        "received.watch()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os._exit(1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM\n"
        "assert received.asked == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize(
    ("number", "kind", "before"), [(TERM, Preempted, Preempted), (INT, Interrupted, KeyboardInterrupt)]
)
def test_in_a_program_of_the_user_a_signal_raises_and_the_handlers_return(
    number: int, kind: type[BaseException], before: type[BaseException]
) -> None:
    handler = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), number)
        assert preemption.reached()
        assert type(stopped(3, 9, Path("runs/3"))) is kind
        assert str(stopped(3, 9, Path("runs/3"))).endswith(
            " after step 3 of 9; saved the trainable parameters, the optimizer state and the position in the data; "
            "run the same command to resume from runs/3"
        )
        with pytest.raises(kind, match="between two runs"):  # of a sweep
            preemption.begin()
    assert signal.getsignal(number) == handler
    with Preemption(), pytest.raises(before, match="with nothing to save"):
        signal.raise_signal(number)


def test_in_a_distributed_run_ctrl_c_is_passed_on_to_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(preemptions.multihost_utils, "reached_preemption_sync_point", lambda step: bool(sent))
    with Preemption() as preemption:
        assert not preemption.reached()
        assert signal.getsignal(TERM) == signal.SIG_DFL
        monkeypatch.setattr(preemptions.os, "kill", lambda pid, number: sent.append((pid, number)))
        signal.raise_signal(INT)
        assert sent == [(os.getpid(), TERM)]
        assert preemption.reached()
        assert isinstance(stopped(2, 9, Path("runs/2")), Interrupted)


def test_processes_that_agree_on_the_last_step_of_a_run_start_no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(preemptions.multihost_utils, "reached_preemption_sync_point", lambda step: step == 2)
    with Preemption() as preemption:
        preemption.begin()
        assert [preemption.reached() for _ in range(3)] == [False, True, True]
        with pytest.raises(Preempted, match="between two runs"):
            preemption.begin()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the caught signals in /proc")
@pytest.mark.parametrize(
    ("command", "number", "code", "line"),
    [
        ("train", TERM, 75, "stopped by SIGTERM with nothing to save; run the same command again to start or resume"),
        ("sweep", INT, 130, "interrupted with nothing to save; run the same command again to start or resume"),
        ("generate", INT, 130, "interrupted"),
    ],
)
def test_a_signal_during_the_imports_is_one_line_and_an_exit_code(
    command: str, number: int, code: int, line: str
) -> None:
    arguments = [sys.executable, "-m", f"peftjax.{command}", "--help"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        status = Path(f"/proc/{child.pid}/status")
        # SIGTERM is caught once the handlers are set; generate only changes the one for SIGINT
        caught = 1 << (TERM if command != "generate" else INT) - 1
        wait_until(lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & caught != 0, child)
        time.sleep(0.5)
        child.send_signal(number)
        output, _ = child.communicate(timeout=60)
    assert (child.returncode, output) == (code, f"{line}\n")
