"""Runs side by side: grouped by their configs, and the numbers of each run."""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peftjax.core.config import flat_fields
from peftjax.core.errors import UserError
from peftjax.core.free_fields import FREE
from peftjax.log import METRICS, read_metrics, speeds
from peftjax.report.data import ReportData, count_trained, read_recorded, read_recorded_object
from peftjax.report.ranking import loss_of, main_score
from peftjax.report.sweep_figures import SEED, varied_fields
from peftjax.report.sweep_page import RESULTS
from peftjax.tasks.best import out_of_patience, sort_key


class RecordedRun(NamedTuple):
    """What a run has written into its workdir.

    Attributes:
        workdir: The workdir.
        config: The config, {"section.field": value}.
        lines: The lines of metrics.jsonl.
        data: The content of report.json; empty while the run has not ended.
        ended: How a sweep ended the run before its last step; empty if it did not.
    """

    workdir: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    data: ReportData
    ended: str = ""


class Group(NamedTuple):
    """Runs whose configs differ at most in the seed and in fields that do not affect the results.

    Attributes:
        values: The fields in which the groups differ, with their values, without those that the config lacks. An option that
            only some methods have is one of them if it differs between runs of the same method.
        runs: The runs, at least one.
    """

    values: dict[str, Any]
    runs: list[RecordedRun]


def read_runs(workdirs: Iterable[Path]) -> list[RecordedRun]:
    """Read runs, and all runs of sweeps that have started.

    Raises:
        UserError: A directory does not belong to a run or a sweep, a run has no metrics yet, or the tasks of the runs differ.
    """
    runs = {run.workdir.resolve(): run for workdir in workdirs for run in _read(workdir)}
    first, *others = runs.values()
    for other in others:
        kinds = [run.config.get("task.kind") for run in (first, other)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{first.workdir} has task.kind={kinds[0]} and {other.workdir} has task.kind={kinds[1]}; their scores "
                "are not comparable, so compare only runs of the same task type"
            )
    return list(runs.values())


def _read(workdir: Path) -> list[RecordedRun]:
    if (workdir / RESULTS).exists():
        try:
            members = {workdir / entry["run"]: _ended(entry) for entry in read_recorded(workdir / RESULTS)}
        except (TypeError, KeyError):
            raise UserError(f"{workdir / RESULTS} is not the result of a sweep; run the sweep again") from None
        runs = [_read_run(member, ended) for member, ended in members.items() if (member / METRICS).exists()]
        if started := [run for run in runs if run.lines]:
            return started
        raise UserError(f"{workdir}: no run of this sweep has metrics yet; wait for its first logged step")
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} has neither config.json nor {RESULTS}: not the workdir of a run or a sweep; check the path"
        )
    if not (workdir / METRICS).exists() or not (run := _read_run(workdir)).lines:
        raise UserError(f"{workdir}: the run has no metrics yet; wait for its first logged step")
    return [run]


def _ended(entry: Mapping[str, Any]) -> str:
    """How a run ended before its last step, from its entry in sweep.json; empty if it did not."""
    if "failed" in entry:
        return f"failed: {entry['failed']}"
    return f"was stopped by successive halving after step {entry['stopped']:,}" if "stopped" in entry else ""


def _read_run(workdir: Path, ended: str = "") -> RecordedRun:
    config = flat_fields(read_recorded_object(workdir / "config.json"))
    return RecordedRun(workdir, config, read_metrics(workdir / METRICS), ReportData.load(workdir), ended)


def group_seeds(runs: Sequence[RecordedRun]) -> list[Group]:
    """Group the runs whose configs differ at most in the seed and in fields that do not affect the results.

    The groups are in the order of their first runs.
    """
    fields = varied_fields([run.config for run in runs])
    varied = [name for name in fields if name != SEED and not name.startswith(FREE)]
    shown = [name for name in varied if not _follows_from_method(name, runs)]
    groups: dict[str, Group] = {}
    for run in runs:
        key = repr([run.config.get(name) for name in varied])
        values = {name: run.config[name] for name in shown if name in run.config}
        groups.setdefault(key, Group(values, [])).runs.append(run)
    return list(groups.values())


def _follows_from_method(name: str, runs: Sequence[RecordedRun]) -> bool:
    """Whether a field is an option that only some methods have, with one value for each method."""
    if not name.startswith("method.") or name == "method.name" or all(name in run.config for run in runs):
        return False
    values: dict[Any, list[Any]] = {}
    for run in runs:
        values.setdefault(run.config.get("method.name"), []).append(run.config.get(name))
    return all(value == same[0] for same in values.values() for value in same)


def compared_scores(names: Collection[str]) -> list[str]:
    """The scores to compare among these: the held-out loss, or else the training loss, and the main score of the task."""
    main = main_score(names)
    return [loss_of(names), *([main] if main else [])]


def last_score(run: RecordedRun, name: str) -> float | None:
    """The last logged value of a score, or None."""
    values = _values(run, name)
    return values[-1] if values else None


def best_score(run: RecordedRun, name: str) -> float | None:
    """The best finite value of a score, or None."""
    values = [value for value in _values(run, name) if math.isfinite(value)]
    return max(values, key=lambda value: sort_key(name, value), default=None)


def _values(run: RecordedRun, name: str) -> list[float]:
    return [line[name] for line in run.lines if name in line]


def trained_parameters(run: RecordedRun) -> float | None:
    """The number of trainable parameters, or None if the run has not recorded it yet."""
    return count_trained(run.data.parts)[0] if run.data.parts else None


def peak_bytes(run: RecordedRun) -> float | None:
    """The peak memory in bytes."""
    return max(_values(run, "peak_memory_bytes"), default=None)


def total_seconds(run: RecordedRun) -> float:
    """The wall time in seconds up to the last line, including evaluation."""
    return max(line["seconds"] for line in run.lines)


def median_speed(run: RecordedRun) -> float | None:
    """The median of the logged speed of training."""
    found = speeds([line for line in run.lines if line["kind"] == "train"]).values()
    return statistics.median([speed for values in found for speed in values]) if found else None


def _ran_out_of_patience(run: RecordedRun) -> bool:
    score, patience = run.config.get("checkpoint.best_score", "eval_loss"), run.config.get("train.patience", 0)
    return out_of_patience(run.lines, score, patience)


def warnings_of(runs: Sequence[RecordedRun]) -> list[str]:
    """What makes the comparison of these runs unfair: incomplete or repeated runs, other held-out data, shared costs."""
    found = []
    for run in runs:
        step, steps = max(line["step"] for line in run.lines), run.config.get("train.steps")
        if run.ended:
            found.append(f"{run.workdir} {run.ended}")
        elif isinstance(steps, int) and step < steps:
            state = "stopped early (train.patience), after" if _ran_out_of_patience(run) else "is at"
            found.append(f"{run.workdir} {state} step {step:,} of {steps:,}")
    for group in group_seeds(runs):
        of_seed: dict[Any, RecordedRun] = {}
        for run in group.runs:
            if (first := of_seed.setdefault(run.config.get(SEED), run)) is not run:
                found.append(
                    f"{first.workdir} and {run.workdir} have the same seed and equivalent configs, but count as two"
                )
    if any(run.config.get("data.eval") != runs[0].config.get("data.eval") for run in runs):
        found.append("data.eval differs between the runs, so their held-out scores are not comparable")
    if any(run.data.sweep for run in runs):
        found.append(
            "runs that a sweep trained together show the time of all of them, and the peak memory of the sweep so far; "
            "train a run alone to measure its own costs"
        )
    return found
