"""Progress: what a terminal shows, what a log file gets, and the time left."""

import io
import sys
import time
from collections.abc import Callable

import pytest
from rich.text import Text

from peftjax.core.progress import EVALUATING, GENERATING, SAVING, Progress
from peftjax.core.signals import received
from peftjax.core.terminal import Clipped, make_console
from peftjax.core.time_left import TimeLeft

NOTATION = "pip install 'peftjax[tpu]' [red]x[/red] [/] :smile: \\[b] a\\"  # rich would read all of it


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return Terminal()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_every_phase_of_a_run_is_named_and_every_step_counted(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)  # in the test itself: pytest sets it anew after the fixtures

    def seen() -> str:
        assert progress._display
        terminal.truncate(0)
        progress._display.refresh()
        return terminal.getvalue()

    with Progress(30, 10) as progress:
        assert "compiling" in seen()
        with progress.phase(EVALUATING):
            frames = [seen() for _ in progress.track(range(2), "batches", 2)]
            assert [("compiling" in frame, "0/2" in frame, "1/2" in frame) for frame in frames] == [
                (True, True, False),
                (False, False, True),
            ]
            assert "evaluating" in frames[1]
            assert "batches" in frames[1]
            with progress.phase(GENERATING):
                frames = [seen() for _ in progress.track((64, 6), "prompts", 70, int)]
                assert ["64/70" in frame for frame in frames] == [False, True]
            assert "batches" not in seen()
        for step in (11, 12, 13):
            progress.advance(step)
            assert "training" in (frame := seen())
            assert f"{step}/30" in frame
        assert received.tell
        received.tell("saving and stopping")  # above the bar, which would overwrite it on stderr
        assert "saving and stopping\n" in terminal.getvalue()
        with progress.phase(SAVING):
            assert "saving" in seen()
        assert "training" in seen()
    assert "stopped" in terminal.getvalue()
    assert received.tell is None
    with Progress() as progress:
        items = progress.track(range(9), "records", 9)  # a traceback may keep it alive
        assert next(items) == 0
        assert "0/9" in seen()
        terminal.truncate(0)
    assert "0/9" not in terminal.getvalue()
    items.close()


def test_messages_arrive_as_they_are_on_a_terminal_and_in_a_file(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/" + "x" * 100  # longer than a line of the terminal
    for where in (terminal, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", where)
        with Progress(3) as progress:
            progress.print(NOTATION)
            progress.print(path)
            progress.print("sentence " * 20)
            progress.report(NOTATION, NOTATION)
            progress.print_panel(NOTATION, Text(NOTATION))
        assert where.getvalue().count(NOTATION) == 4
        assert path in where.getvalue()
    lines = terminal.getvalue().splitlines()
    assert sum(set(line.split()) == {"sentence"} for line in lines) == 2  # lines end between words
    assert "\x1b" not in where.getvalue()
    assert "╭" not in where.getvalue()


def test_a_text_is_clipped_to_a_few_lines_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in GitHub's CI, which is not a terminal
    console = make_console(file=io.StringIO())
    with console.capture() as captured:
        console.print(Clipped("one\x1b[2J\n" + "two " * 100, 2), width=20)
        console.print(Clipped(NOTATION, 1))
    first, second, third = captured.get().splitlines()
    assert first.rstrip() == "one\\x1b[2J"
    assert second.rstrip() == "two two two two tw …"
    assert third.rstrip() == NOTATION


def test_the_time_left_includes_the_evaluations_to_come(clock: Callable[[float], None]) -> None:
    left = TimeLeft(10)
    left.expect(10, [4, 8, 10])
    left.evaluated(0, 50)  # with its compilation
    clock(30)  # compilation of the step
    left.dispatched(1)
    assert left.after(1) is None
    clock(4)
    left.computed(2)
    assert left.after(2) == 8 * 2 + 3 * 50
    clock(4)
    left.computed(4)
    assert left.after(4) == 6 * 2 + 3 * 50
    for seconds in (3, 2):  # two runs of a sweep
        clock(seconds)
        left.evaluated(4, seconds)
    assert left.after(4) == 6 * 2 + 2 * 5
    clock(2)
    left.computed(5)  # evaluations do not count as steps
    assert left.after(5) == 5 * 2 + 2 * 5
    assert left.after(9) == 2 + 5
    assert left.after(10) == 5
    left.evaluated(10, 5)
    assert left.after(10) == 0
