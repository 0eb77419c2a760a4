"""Logging of a training run: metrics.jsonl, trackers such as TensorBoard, and terminal output.

metrics.jsonl contains one JSON object per line, ordered by step:

    {"step": 20, "kind": "train", "seconds": 3.1, "loss": 2.5, ..., "peak_memory_bytes": 734003200}
    {"step": 20, "kind": "eval", "seconds": 3.4, "eval_loss": 2.6, ...}

JSON has no non-finite numbers, so these are written as the strings "NaN", "Infinity" and "-Infinity".
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import RenderableType

from peftjax.core.errors import UserError
from peftjax.core.files import naming, write_atomically
from peftjax.core.json_numbers import to_json, with_numbers
from peftjax.core.memory import peak_memory
from peftjax.core.progress import Progress
from peftjax.core.units import format_bytes, format_clocks
from peftjax.trackers import Trackers, start_trackers
from peftjax.trackers.base import Status, Tracking
from peftjax.trackers.tensorboard import TensorBoard

METRICS = "metrics.jsonl"

# The fields of a line that are not metrics: when it was written, and on how much data the metrics were measured.
PLACE = ("step", "kind", "seconds")
AMOUNTS = ("tokens", "labels", "examples", "prompts")

_SHORT = {
    "tokens_per_second": "tok/s",
    "learning_rate": "lr",
    "grad_norm": "grad",
    "eval_loss": "loss",
}


class Log:
    """Context manager that writes and prints the metrics of one run.

    A run that starts at step 0 overwrites the log of an earlier run. A run that resumes at step s keeps the lines up to s
    and drops later ones, whose steps are repeated. The log of a run that was killed and resumed therefore equals the log
    of an uninterrupted run, except for the seconds, speeds and memory.

    On a terminal, the latest training metrics are shown below a progress bar, and each evaluation prints one line.
    Otherwise, as in CI or with redirected output, every logged step prints one plain line.

    Attributes:
        progress: The progress bar, and what is printed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        resume_step: int,
        enabled: bool = True,
        tensorboard: bool = True,
        tracking: Tracking | None = None,
        quiet: bool = False,
        on_line: Callable[[dict[str, Any]], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            workdir: Directory of the run, created if missing.
            total_steps: Number of training steps of the whole run.
            resume_step: Number of completed steps.
            enabled: Write and print; False on every process but the first.
            tensorboard: Also write TensorBoard events, into `workdir`.
            tracking: Other trackers, and what they show of the run.
            quiet: Do not print.
            on_line: Called with each line of metrics.jsonl after it was written.
            progress: The progress bar of several runs that train together, which counts their steps itself; default: one for
                this run.

        Raises:
            UserError: The run resumes and a line of metrics.jsonl is invalid, other than a truncated last line; or a tracker
                cannot start a new run.
        """
        self._total, self._enabled, self._quiet, self._on_line = total_steps, enabled, quiet, on_line
        self._counts = progress is None  # steps, for the progress bar
        self._trackers = Trackers(())
        self._own = contextlib.ExitStack()  # what ends with this log
        if not enabled:
            self.progress = progress or Progress(enabled=False)
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = self._path = workdir / METRICS
        logged = path.exists()
        kept = read_metrics(path, last=resume_step) if logged and resume_step else []
        write_atomically(path, "".join(map(_line, kept)))
        self._began = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)
        trackers = start_trackers(tracking, workdir, resume=resume_step > 0) if tracking else []
        if tensorboard:
            trackers.append(TensorBoard(workdir, purge=(resume_step + 1 if resume_step else 0) if logged else None))
        self._trackers = Trackers(trackers)
        self._file = path.open("a", encoding="utf-8")
        self.progress = progress or self._own.enter_context(Progress(total_steps, resume_step, enabled=not quiet))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Preempted and KeyboardInterrupt are not subclasses of Exception.
        self.close("finished" if error is None else "failed" if isinstance(error, Exception) else "stopped")

    @property
    def prints(self) -> bool:
        """Whether messages are printed."""
        return self._enabled and not self._quiet

    def expect(self, evaluations: Sequence[int]) -> None:
        """Set the steps after which the run is evaluated, in ascending order, to estimate the time left."""
        if self._counts:
            self.progress.expect(self._total, evaluations)

    def advance(self, step: int) -> None:
        """Count a step that has been dispatched."""
        if self._counts:
            self.progress.advance(step)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the training metrics after a step: loss, learning_rate, the speed, grad_norm and any others."""
        if not self._enabled:
            return
        now, memory = time.perf_counter(), peak_memory()
        self._write(step, "train", {**numbers, "peak_memory_bytes": memory})
        if self._counts:
            self.progress.computed(step)
        if self._quiet:
            return
        shown = [*_shown(numbers, ("loss", "learning_rate", *filter(is_speed, numbers))), format_bytes(memory)]
        clock = format_clocks(now - self._began, self.progress.left.after(step) or None)
        self.progress.report("  ".join(shown), "  ".join([self._place(step), *shown, clock]))

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the scores of an evaluation after a step."""
        if not self._enabled:
            return
        self._write(step, "eval", numbers)
        scores = [name for name in numbers if not is_amount(name)]
        self.message("  ".join([self._place(step), "evaluation", *_shown(numbers, scores)]))

    def message(self, text: str) -> None:
        """Print a message, above the progress bar if there is one."""
        if not self._quiet:
            self.progress.print(text)

    def panel(self, title: str, content: RenderableType) -> None:
        """Print something with a title, above the progress bar if there is one."""
        if not self._quiet:
            self.progress.print_panel(title, content)

    def sync(self) -> None:
        """Write metrics.jsonl to disk, where a power cut does not lose it."""
        if self._enabled:
            with naming(self._path):
                os.fsync(self._file.fileno())

    def close(self, status: Status = "finished") -> None:
        """Stop the progress bar, end the run in the trackers and close the files. Further calls have no effect."""
        self._own.close()
        self._trackers.close(status)
        if self._enabled:
            with naming(self._path):
                self._file.close()

    def _write(self, step: int, kind: str, numbers: Mapping[str, Any]) -> None:
        plain = {name: np.asarray(value).item() for name, value in numbers.items()}
        seconds = round(time.perf_counter() - self._began, 3)
        entry = {"step": step, "kind": kind, "seconds": seconds, **plain}
        with naming(self._path):
            self._file.write(_line(entry))
            self._file.flush()  # the line survives if the process is killed from here on
        self._trackers.write(step, {f"{kind}/{name.removeprefix('eval_')}": value for name, value in plain.items()})
        if self._on_line:
            self._on_line(entry)

    def _place(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}"


def is_amount(name: str) -> bool:
    """Whether a field of a line says on how much data the metrics were measured."""
    return name.removeprefix("eval_") in AMOUNTS


def is_speed(name: str) -> bool:
    """Whether a field of a line is a speed of training."""
    return name.endswith("_per_second")


def speeds(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The values of each speed in some lines, by its name."""
    names = dict.fromkeys(name for line in lines for name in line if is_speed(name))
    return {name: [line[name] for line in lines if name in line] for name in names}


def read_metrics(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Read a metrics.jsonl file: one dictionary per line up to the step `last`, with non-finite numbers as floats.

    A truncated last line, left by a process that was killed while writing it, is skipped.

    Raises:
        UserError: Any other line is invalid.
    """
    # The last line has no newline: it is empty or truncated.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line, parse_constant=_refuse)
            if (
                not isinstance(entry, dict)
                or type(entry.get("step")) is not int
                or not {"kind", "seconds"} <= set(entry)
            ):
                raise ValueError("not an object with step, kind and seconds")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: {error}: {line[:80]!r}; remove the line or the file") from None
        found.append(with_numbers(entry))
    return found if last is None else [line for line in found if line["step"] <= last]


def _line(entry: Mapping[str, Any]) -> str:
    return to_json(entry) + "\n"


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _shown(numbers: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Format the named numbers that are present."""
    return [_short(name, numbers[name]) for name in names if name in numbers]


def _short(name: str, value: float) -> str:
    label = _SHORT.get(name, name.removeprefix("eval_").replace("_per_second", "/s").replace("_", " "))
    if is_speed(name):
        return f"{value:,.0f} {label}"
    if name in ("token_accuracy", "exact_match"):
        return f"{label} {value:.1%}"
    if name == "learning_rate":
        return f"{label} {value:.3g}"
    return f"{label} {value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{label} {value:.4g}"
