"""Progress of a command: bars at the bottom of a terminal, with messages above them; plain lines everywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self, TypeVar

from rich import progress
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Column
from rich.text import Text

from peftjax.core.output import say
from peftjax.core.signals import received
from peftjax.core.terminal import is_terminal, make_console
from peftjax.core.time_left import TimeLeft
from peftjax.core.units import format_clocks

COMPILING, TRAINING, EVALUATING, GENERATING, SAVING = "compiling", "training", "evaluating", "generating", "saving"

Item = TypeVar("Item")


class Progress:
    """Context manager that shows the progress of a run and prints messages.

    On a terminal, a bar counts the steps as they are dispatched and names the phase of the run. A phase that counts
    something itself, such as the batches of an evaluation, has its own bar below. Elsewhere, as in CI or with
    redirected output, only messages are printed.

    Attributes:
        total: Number of steps of the whole run.
        left: Estimate of the time left.
        began: When it was made, by `time.perf_counter`.
    """

    def __init__(self, total: int = 0, done: int = 0, *, enabled: bool = True) -> None:
        """Start after `done` of `total` steps; 0 steps: the command does not train. If not `enabled`, print nothing."""
        self.total, self.left, self.began = total, TimeLeft(total), time.perf_counter()
        self._enabled, self._phase, self._done = enabled, COMPILING, done
        self._compiled: set[str] = set()  # the units whose first item is done
        self._display: _Display | None = None
        if enabled and is_terminal(sys.stdout):
            self._display = _Display(total, done)
            received.tell = self.print  # what is written to stderr would be overwritten by the bars

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def expect(self, total: int, evaluations: Sequence[int]) -> None:
        """Set the number of steps of the whole run, and after which of them it is evaluated, in ascending order."""
        self.total = total
        self.left.expect(total, evaluations)
        if self._display:
            self._display.expect(total)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the run does in the `with` block. Evaluations and compilations are measured, to estimate the time left."""
        before, began = self._phase, time.perf_counter()
        self._show(name)
        if name == EVALUATING:
            received.finishing = "the evaluation"
        try:
            yield
        finally:
            if name == EVALUATING:
                received.finishing = ""
                self.left.evaluated(self._done, time.perf_counter() - began)
            elif name == COMPILING:
                self.left.paused(time.perf_counter() - began)
            self._show(before)

    def advance(self, step: int) -> None:
        """Count a step that has been dispatched. The first one ends the compilation."""
        self.left.dispatched(step)
        self._reach(step, at_once=False)

    def computed(self, step: int) -> None:
        """Note that a step and all before it have been computed, which tells their time."""
        self.left.computed(step)
        self._reach(step, at_once=True)

    def track(
        self, items: Iterable[Item], unit: str, total: int, size: Callable[[Item], int] = lambda _: 1
    ) -> Iterator[Item]:
        """Yield the items, with a bar that counts their units, such as "batches", up to `total`; `size` counts those of an item."""
        if not self._display:
            yield from items
            return
        phase = self._phase
        with self._display.bar(unit, total) as count:
            self._show(phase if unit in self._compiled else COMPILING)
            for item in items:
                yield item
                count(size(item))
                self._compiled.add(unit)
                self._show(phase)

    def report(self, numbers: str, line: str) -> None:
        """Show the latest numbers of the run: below the bar on a terminal, as a line with its step elsewhere."""
        if self._display:
            self._display.numbers(numbers)
        elif self._enabled:
            say(line)

    def print(self, text: str) -> None:
        """Print a message, above the bars."""
        if self._display:
            console = self._display.console
            long = any(cell_len(word) > console.width for word in text.split())  # a path, which must not be broken
            console.print(text, soft_wrap=long)
        elif self._enabled:
            say(text)

    def print_panel(self, title: str, content: RenderableType) -> None:
        """Print something with a title: in a panel on a terminal, as plain lines elsewhere."""
        if self._display:
            self._display.console.print(Panel(content, title=Text(title), title_align="left", border_style="dim"))
        elif self._enabled:
            console = make_console()
            with console.capture() as captured:
                console.print(Group(f"{title}:", content))
            say("\n".join(line.rstrip() for line in captured.get().splitlines()))

    def close(self) -> None:
        """Leave the bar as it is. Further messages are printed below it."""
        if self._display:
            received.tell = None
            self._display.end(self._done)
            self._display = None

    def _reach(self, step: int, *, at_once: bool) -> None:
        self._done, self._phase = step, TRAINING
        if self._display:
            self._display.reach(step, self.left.after(step), at_once)

    def _show(self, phase: str) -> None:
        self._phase = phase
        if self._display:
            self._display.label(phase, self.left.after(self._done))


class _Clock(progress.ProgressColumn):
    """The time that has passed, and the time left."""

    def render(self, task: progress.Task) -> Text:
        return Text(format_clocks(task.elapsed or 0.0, task.fields["left"]))


class _Display(progress.Progress):
    """The bars on a terminal, and a line of numbers below them."""

    def __init__(self, total: int, done: int) -> None:
        self._text = ""
        super().__init__(
            progress.TextColumn("{task.description}", markup=False, table_column=Column(min_width=len(GENERATING))),
            progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),  # fills the remaining width
            progress.MofNCompleteColumn(),
            _Clock(),
            console=make_console(),
            expand=True,
            refresh_per_second=4,
        )
        self._run = self.add_task(COMPILING, total=total, completed=done, left=None, visible=total > 0)
        self._steps = total
        self.start()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table([task for task in self.tasks if task.visible])
        if self._text:
            yield Text(self._text, no_wrap=True, overflow="ellipsis")

    def expect(self, total: int) -> None:
        self._steps = total
        self.update(self._run, total=total, visible=total > 0)

    def reach(self, step: int, left: float | None, at_once: bool) -> None:
        self.update(self._run, completed=step, description=TRAINING, left=left, refresh=at_once)

    def label(self, phase: str, left: float | None) -> None:
        for task in self.tasks[:1] if self._steps else self.tasks:
            self.update(task.id, description=phase, left=left)

    def numbers(self, text: str) -> None:
        self._text = text

    def end(self, done: int) -> None:
        if self._steps:
            self.update(self._run, description="done" if done == self._steps else "stopped", left=None)
        for task in self.task_ids[1:]:  # of a phase that an exception has ended
            self.remove_task(task)
        self.stop()

    @contextlib.contextmanager
    def bar(self, unit: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar in the `with` block. Yields a function that counts a number of units."""
        task = self.add_task(unit, total=total, left=None)
        try:
            yield lambda count: self.advance(task, count)
        finally:
            if task in self.task_ids:  # `end` has removed the bar of a phase that an exception ended
                self.remove_task(task)
