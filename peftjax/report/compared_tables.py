"""The tables of a comparison, as text: one row per group of runs, with its scores or its costs."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from peftjax.core.terminal import printable
from peftjax.core.units import format_bytes
from peftjax.report import comparison
from peftjax.report.comparison import Group, RecordedRun
from peftjax.report.text import decimals, format_duration, format_number, format_spread, short_name, value_text

Measure = Callable[[RecordedRun], float | None]
Format = Callable[[Sequence[float]], str]


class ComparedTable(NamedTuple):
    """A table.

    Attributes:
        columns: The titles of the columns; the first column has the runs.
        rows: The cells of each group.
        note: What the numbers are; empty if each group has one run.
    """

    columns: list[str]
    rows: list[list[str]]
    note: str


def make_tables(runs: Sequence[RecordedRun]) -> dict[str, ComparedTable]:
    """The scores of each group, its difference from the best group if there are several seeds, and its costs."""
    groups = comparison.group_seeds(runs)
    scores: dict[str, list[str]] = {}
    names = scores_of(runs)
    for name in names:
        label = name.removeprefix("eval_").replace("_", " ")
        last, best = (partial(measure, name=name) for measure in (comparison.last_score, comparison.best_score))
        scores[label] = _cells(groups, last, format_spread)
        if any(last(run) != best(run) for run in runs):
            scores[f"best\n{label}"] = _cells(groups, best, format_spread)
    costs = {
        "parameters": _cells(groups, comparison.trained_parameters, _mean("{:,.0f}".format)),
        "memory": _cells(groups, comparison.peak_bytes, _mean(format_bytes)),
        "time": _cells(groups, comparison.total_seconds, _mean(format_duration)),
        "per second": _cells(groups, comparison.median_speed, _mean(format_number)),
    }
    several = any(len(group.runs) > 1 for group in groups)
    tables = {"scores": _table(groups, scores, "mean ± standard deviation over the seeds" * several)}
    if any(intervals := difference_intervals([final_scores(group, names[0]) for group in groups])):
        label = f"{names[0].removeprefix('eval_')} minus that of the best group"
        tables["differences"] = _table(groups, {label: intervals}, "95% confidence interval by Welch's t test")
    return tables | {"costs": _table(groups, costs, "mean over the seeds" * several)}


def scores_of(runs: Sequence[RecordedRun]) -> list[str]:
    """The scores to compare: the loss, and the main score of the task if it has one."""
    return comparison.compared_scores(
        {name for run in runs for line in run.lines if line["kind"] == "eval" for name in line}
    )


def final_scores(group: Group, name: str) -> list[float]:
    """The last values of a score in the runs of a group."""
    return [value for run in group.runs if (value := comparison.last_score(run, name)) is not None]


def group_name(group: Group) -> str:
    """The fields in which the group differs from others, one a line; without one, the name of the workdir."""
    texts = {field: value_text(value) or repr(value) for field, value in group.values.items()}  # '' for an empty value
    shown = [f"{short_name(field, texts)}={text}" for field, text in texts.items()]
    return printable("\n".join(shown) or group.runs[0].workdir.resolve().name)


def difference_intervals(losses: Sequence[Sequence[float]]) -> list[str]:
    """The 95% confidence interval of the mean loss of each group minus that of the best group, by Welch's t interval.

    Groups with one run, with a loss that is not finite, or with equal losses are left out: their texts are empty. The best of
    the others is the one with the lowest mean; if it is the only one, its text is empty, too. The intervals are not corrected
    for multiple comparisons, nor for the choice of the best group.
    """
    from scipy import stats

    usable = [values for values in losses if len(set(values)) > 1 and all(map(math.isfinite, values))]
    best = min(usable, key=statistics.fmean) if len(usable) > 1 else None
    texts = []
    for values in losses:
        if best is not None and values is not best and values in usable:
            interval = stats.ttest_ind(values, best, equal_var=False).confidence_interval(0.95)
            digits = decimals(interval.high - interval.low)
            texts.append(f"{interval.low:+.{digits}f} to {interval.high:+.{digits}f}")
        else:
            texts.append("best" if values is best else "")
    return texts


def _cells(groups: Sequence[Group], measure: Measure, text: Format) -> list[str]:
    return [text([value for run in group.runs if (value := measure(run)) is not None]) for group in groups]


def _mean(text: Callable[[float], str]) -> Format:
    return lambda values: text(statistics.fmean(values)) if values else ""


def _table(groups: Sequence[Group], cells: Mapping[str, list[str]], note: str) -> ComparedTable:
    seeds = [str(len(group.runs)) for group in groups]
    rows = zip(map(group_name, groups), seeds, *cells.values(), strict=True)
    return ComparedTable(["run", "seeds", *cells], [list(row) for row in rows], note)
