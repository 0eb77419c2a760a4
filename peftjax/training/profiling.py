"""A trace of some steps of a run, and the table of their most expensive operations."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from rich.table import Table

from peftjax.core import debug_log
from peftjax.core.errors import UserError
from peftjax.core.terminal import simple_table
from peftjax.log import Log
from peftjax.training.operations import Operation, read_operations, read_times
from peftjax.training.step import TrainState, mesh_of

SHOWN = 10  # rows of the table


def parse_steps(text: str) -> range:
    """The steps of --profile=N:M, both included.

    Raises:
        UserError: The text is not such a range.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile={text} must be N:M, the first and the last step to trace, such as --profile=20:22")
    return range(int(match[1]), int(match[2]) + 1)


class Profiling:
    """Context manager that traces some steps of a run, on process 0.

    The trace is written to the directory `profile` in the workdir. Without steps, this does nothing.

    Args:
        steps: The steps to trace, from `parse_steps`; None for none.
        start, end: The run takes the steps after `start`, to `end`.
        workdir: The workdir of the run.
        log: Where the table is printed.

    Raises:
        UserError: The run does not take all of the steps.
    """

    def __init__(self, steps: range | None, start: int, end: int, workdir: Path, log: Log) -> None:
        if steps and not start < steps[0] <= steps[-1] <= end:  # in every process: none may wait for the others
            asked = f"--profile={steps[0]}:{steps[-1]}"
            raise UserError(
                f"{asked}: this run has finished all of its {end} steps; use another workdir"
                if start == end
                else f"{asked}: this run takes steps {start + 1} to {end}; choose steps among these"
            )
        self._steps = steps if steps is not None and jax.process_index() == 0 else range(0)
        self._directory, self._log = workdir / "profile", log
        self._step: jax.profiler.StepTraceAnnotation | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._step is not None:  # the run ends in a traced step
            jax.profiler.stop_trace()

    def begin(self, step: int, state: TrainState) -> None:
        """Start the trace if a step is the first one to trace. `state` is the state before the step."""
        if step not in self._steps:
            return
        if step == self._steps[0]:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow down what it measures
            jax.block_until_ready(state)  # leave the end of the previous step out of the trace
            jax.profiler.start_trace(self._directory, profiler_options=options)
        self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.__enter__()

    def end(self, step: int, train_step: Any, state: TrainState, *arguments: Any) -> None:
        """Stop the trace if a step was the last one to trace, and print the table.

        If the trace cannot be written or read, a warning is printed. `state` is the state after the step, and `arguments` are the
        other arguments of the jitted step.
        """
        if self._step is None:
            return
        self._step.__exit__(None, None, None)
        if step < self._steps[-1]:
            return
        jax.block_until_ready(state)
        self._step = None
        steps = f"steps {self._steps[0]} to {step}" if len(self._steps) > 1 else f"step {step}"
        try:
            jax.profiler.stop_trace()
            operations = read_operations(train_step.lower(state, *arguments).compile().as_text())  # already compiled
            times = read_times(self._directory, f"jit_{train_step.__name__}", operations)
            table = operations_table(operations, times, len(self._steps) * len(mesh_of(state).local_devices))
        except Exception as error:  # an error in profiling must not end the run
            why = f"{type(error).__name__}: {' '.join(str(error).split())}{debug_log.record(error)}"
            self._log.message(f"warning: the trace of {steps} could not be read, and the run continues. {why}")
            return
        self._log.message(f"trace of {steps}: {self._directory}")
        self._log.panel(f"most expensive operations of {steps}", table)


def operations_table(
    operations: Mapping[str, Operation], times: Mapping[str, tuple[int, float]], steps: int, rows: int = SHOWN
) -> Table:
    """The most expensive operations, with their share of the time of all operations.

    `times` has how often each operation ran, and its seconds. `steps` is the number of steps, over all devices.
    """
    total = sum(seconds for _, seconds in times.values())
    ranked = sorted(times, key=lambda name: -times[name][1])
    rest = sum(times[name][1] for name in ranked[rows:])
    table = simple_table()
    for heading in ("ms/step", "share", "runs/step"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("operation, its result and origin", overflow="fold")
    for name in ranked[:rows]:
        count, seconds = times[name]
        found = operations[name]
        origin = " ".join(filter(None, (found.path, found.backward * "(backward)", found.source)))
        cells = f"{seconds / steps * 1e3:.3g}", f"{seconds / total:.1%}", f"{count / steps:g}"
        table.add_row(*cells, "\n".join(filter(None, (f"{name} {found.type}", origin))))
    table.add_row(
        f"{rest / steps * 1e3:.3g}", f"{rest / total if total else 0:.1%}", "", f"{len(ranked[rows:])} others"
    )
    return table
