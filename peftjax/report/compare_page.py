"""compare.html: runs side by side on one self-contained page, with figures and tables for a paper."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peftjax.core.files import write_atomically
from peftjax.core.terminal import printable
from peftjax.report import run_plots
from peftjax.report.charts import finite_points
from peftjax.report.compared_tables import ComparedTable, final_scores, group_name, make_tables, scores_of
from peftjax.report.comparison import Group, RecordedRun, group_seeds, warnings_of
from peftjax.report.data import Answer
from peftjax.report.figures import Drawer, Figure, make_figure, save_figure
from peftjax.report.html import render_page
from peftjax.report.run_plots import RunCurve
from peftjax.report.svg import COLORS, GROUP_COLORS, is_log
from peftjax.report.sweep_figures import SEED
from peftjax.report.text import format_number, short_name, shorten, value_text

COMPARE_PAGE = "compare.html"


class _Shown(NamedTuple):
    """A group in the figures.

    Attributes:
        row: The values of its fields, or the name of the workdir.
        color: A key of `COLORS`; "soft" for all but the best groups.
        curve: The mean of the losses, with their standard deviations.
        scores: The finite final losses.
    """

    row: str
    color: str
    curve: RunCurve
    scores: list[float]


def write_comparison(runs: Sequence[RecordedRun], directory: Path) -> list[Path]:
    """Write compare.html, each table as .csv, and the figures curves and scores as .png and .pdf; return their paths.

    The figures are made for a column of a two-column paper, see `save_figure`. Without a finite loss there are none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    groups, tables = group_seeds(runs), make_tables(runs)
    loss = scores_of(runs)[0]
    title = "Held-out loss" if loss == "eval_loss" else "Training loss"
    names = dict.fromkeys(name for group in groups for name in group.values)
    shown, fields = _shown(groups, loss), ", ".join(short_name(name, names) for name in names)
    page = render_page(
        "compare.html.j2",
        title="Comparison",
        runs=runs,
        groups=groups,
        warnings=warnings_of(runs),
        tables=tables,
        figures=_figures(shown, title, fields) if shown else [],
        answers=_answers(groups),
    )
    write_atomically(directory / COMPARE_PAGE, page)
    for name, table in tables.items():
        write_atomically(directory / f"{name}.csv", _csv(table))
    figures = _save_figures(shown, title, fields, directory) if shown else []
    return [directory / COMPARE_PAGE, *(directory / f"{name}.csv" for name in tables), *figures]


def _shown(groups: Sequence[Group], loss: str) -> list[_Shown]:
    """The groups with a finite loss, the lowest mean of the final losses first."""
    found = []
    for group in groups:
        scores = [score for score in final_scores(group, loss) if math.isfinite(score)]
        if scores and (curve := _mean_curve(group, loss)).steps:
            found.append(_Shown(_row(group), "", curve, scores))
    found.sort(key=lambda one: statistics.fmean(one.scores))
    colors = [*GROUP_COLORS, *["soft"] * len(found)]
    return [
        one._replace(color=color, curve=one.curve._replace(color=COLORS[color], width=0.6 if color == "soft" else 1.0))
        for one, color in zip(found, colors, strict=False)
    ]


def _mean_curve(group: Group, loss: str) -> RunCurve:
    """The mean loss over the steps at which all runs of the group have logged it."""
    logged = [dict(finite_points(run.lines, loss)) for run in group.runs]
    steps = sorted(set.intersection(*map(set, logged)))
    values = [[losses[step] for losses in logged] for step in steps]
    spread = [statistics.stdev(some) for some in values] if len(logged) > 1 else []
    return RunCurve(_short_name(group), "", steps, list(map(statistics.fmean, values)), spread)


def _short_name(group: Group) -> str:
    """The fields with their values, short enough for a legend."""
    parts = [f"{short_name(field, group.values)}={_short_value(value)}" for field, value in group.values.items()]
    return printable(", ".join(parts)) or group_name(group)


def _row(group: Group) -> str:
    """The values of the fields, short enough for the label of a row."""
    return printable(shorten(", ".join(map(_short_value, group.values.values())), 34)) or group_name(group)


def _short_value(value: Any) -> str:
    return format_number(value) if isinstance(value, float) else shorten(value_text(value) or repr(value), 16)


def _drawings(shown: Sequence[_Shown]) -> tuple[Drawer, Drawer]:
    """The functions that draw the curves and the final scores."""
    colors = [COLORS[one.color] for one in shown]
    curves = partial(run_plots.draw_curves, curves=[one.curve for one in reversed(shown)])
    return curves, partial(
        run_plots.draw_scores, names=[one.row for one in shown], scores=[one.scores for one in shown], colors=colors
    )


def _figures(shown: Sequence[_Shown], title: str, fields: str) -> list[Figure]:
    curves, scores = _drawings(shown)
    seeds = ["mean and standard deviation over the seeds"] * any(len(one.scores) > 1 for one in shown)
    log = ["logarithmic"] * is_log([value for one in shown for value in one.curve.values])
    legend = [(f"var(--{one.color})", one.curve.name) for one in shown if one.color != "soft"]
    legend += [("var(--soft)", "other groups")] * (len(shown) > len(legend))
    rows = 60 + 26 * len(shown)
    return [
        make_figure(title, ", ".join(["by step", *log, *seeds]), legend, curves, wide=True, height=300),
        make_figure(
            f"Final {title.lower()}",
            "; ".join([f"by {fields}"] * bool(fields) + seeds),
            [],
            scores,
            wide=True,
            height=rows,
        ),
    ]


def _save_figures(shown: Sequence[_Shown], title: str, fields: str, directory: Path) -> list[Path]:
    curves, scores = _drawings(shown)
    across = shorten(" by ".join(filter(None, [f"Final {title.lower()}", fields])), 60)
    return [
        *save_figure(directory / "curves", curves, 2.2, across="Step", up=title, legend=len(shown) > 1),
        *save_figure(directory / "scores", scores, 0.5 + 0.2 * len(shown), across=across),
    ]


def _answers(groups: Sequence[Group]) -> list[tuple[Answer, list[tuple[str, Answer]]]]:
    """For each prompt that runs have answered after training, the answer of the first run of each group."""
    found: dict[tuple[str, str], list[tuple[str, Answer]]] = {}
    for group in groups:
        run = group.runs[0]
        name = _short_name(group) + f", seed={run.config.get(SEED)}" * (len(group.runs) > 1)
        for sample in run.data.after:
            found.setdefault((sample.record, sample.prompt), []).append((name, sample))
    return [(answers[0][1], answers) for answers in found.values()]


def _csv(table: ComparedTable) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        [cell.replace("\n", " ") for cell in row] for row in [table.columns, *table.rows]
    )
    return file.getvalue()
