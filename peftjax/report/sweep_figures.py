"""What sweep.html shows of all runs together: their costs, the best run, and the plots."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peftjax.log import is_amount, speeds
from peftjax.report import run_plots
from peftjax.report.cards import Card
from peftjax.report.charts import finite_points
from peftjax.report.figures import Figure, make_figure
from peftjax.report.ranking import loss_of, rank
from peftjax.report.run_plots import Line, RunCurve
from peftjax.report.scales import make_scale
from peftjax.report.svg import COLORS, GROUP_COLORS, is_log, mixture
from peftjax.report.text import format_duration, format_number, short_name, value_text
from peftjax.tasks.best import lower_is_better

SEED = "seed"


class SweptRun(NamedTuple):
    """A run of a sweep.

    Attributes:
        name: The name of the run's directory.
        values: The swept fields and their values.
        scores: The metrics.
        failed: Why the run failed; empty if it did not.
        link: The relative link to its report; empty if it has none.
        lines: The lines of metrics.jsonl.
        counts: The counts of its training data; empty if it has not ended.
        stopped: The step at which successive halving stopped it; 0 if it did not.
    """

    name: str
    values: dict[str, Any]
    scores: dict[str, float]
    failed: str
    link: str
    lines: list[dict[str, Any]]
    counts: Mapping[str, int]
    stopped: int = 0


def varied_fields(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields in which runs with these values differ."""
    fields = dict.fromkeys(field for own in values for field in own)
    return [field for field in fields if any(own.get(field) != values[0].get(field) for own in values)]


def cost_cards(runs: Sequence[SweptRun]) -> list[Card]:
    """The tokens or images on which the ended runs were trained, and the time of the longest run."""
    cards = []
    if ended := [run for run in runs if run.counts]:
        speed = next(iter(speeds([line for run in ended for line in run.lines])), "tokens_per_second")
        title = f"{speed.removesuffix('_per_second').capitalize()} trained"
        cards.append(Card(title, f"{sum(run.counts.get('tokens', 0) for run in ended):,}", _describe_ended(ended)))
    if any(run.lines for run in runs):
        time = format_duration(_longest(runs))
        cards.append(Card("Wall time of the longest run", time, "shared by runs trained together"))
    return cards


def _describe_ended(runs: Sequence[SweptRun]) -> str:
    """How many of these runs have finished, were stopped and have failed."""
    kinds = collections.Counter("failed" if run.failed else "stopped" if run.stopped else "finished" for run in runs)
    counts = ", ".join(f"{kinds[kind]:,} {kind}" for kind in ("finished", "stopped", "failed") if kinds[kind])
    return f"in {counts} runs" if len(runs) > 1 else f"in one {next(iter(kinds))} run"


def time_cards(runs: Sequence[SweptRun], recorded: float) -> list[Card]:
    """The wall time of the whole sweep, of which `recorded` seconds were recorded; none if there is no record."""
    time = format_duration(max(recorded, _longest(runs)))  # a command that is killed does not record its last seconds
    return [Card("Wall time of the sweep", time, "all commands together")] if recorded else []


def _longest(runs: Sequence[SweptRun]) -> float:
    """The wall time of the longest run in seconds; 0 if no run has started."""
    return max((line["seconds"] for run in runs for line in run.lines), default=0.0)


def best_rows(runs: Sequence[SweptRun], ranked_by: str, workdir: Path) -> list[tuple[str, str]]:
    """The values of the best run, its scores, and the path of its adapter or model; empty if no run has a score."""
    if not (ranked := _ranked(runs, ranked_by)):
        return []
    best = runs[ranked[0]]
    values = [(short_name(field, best.values), value_text(value)) for field, value in best.values.items()]
    scores = [
        (name.replace("_", " "), format_number(score)) for name, score in best.scores.items() if not is_amount(name)
    ]
    directory = workdir.resolve() / best.name
    saved = [(name, str(directory / name)) for name in ("adapter", "model") if (directory / name).exists()][:1]
    return [*values, *scores, *saved]


def make_figures(runs: Sequence[SweptRun], ranked_by: str) -> list[Figure]:
    """The learning curves, the scores over each swept field, and with two or more such fields parallel coordinates.

    The scores are the one that ranks the runs and the loss.
    """
    varied = varied_fields([run.values for run in runs])
    fields = [field for field in varied if field != SEED] or varied
    figures = list(_curves(runs, ranked_by))
    if _ranked(runs, ranked_by):
        loss = loss_of({name for run in runs for name in run.scores})
        scores = [score for score in dict.fromkeys((ranked_by, loss)) if _ranked(runs, score)]
        plots = [(field, score) for field in fields for score in scores]
        alone = plots[-1] if len(plots) % 2 else None  # in the last row
        figures += [_field_figure(runs, *plot, fields, wide=plot == alone) for plot in plots]
        if len(fields) > 1:
            figures.append(_parallel_figure(runs, fields, ranked_by))
    return figures


def _ranked(runs: Sequence[SweptRun], ranked_by: str) -> list[int]:
    """The numbers of the runs with a finite score, the best first; those that were stopped come last."""
    scored = [number for number, run in enumerate(runs) if math.isfinite(run.scores.get(ranked_by, math.nan))]
    return sorted(scored, key=lambda number: (runs[number].stopped > 0, rank(runs[number].scores, ranked_by)))


def _highest(runs: Sequence[SweptRun], score: str) -> float:
    """The highest value of a score that an axis shows. Only losses and perplexities have no bound."""
    if not lower_is_better(score):
        return math.inf
    return run_plots.highest_shown([runs[number].scores[score] for number in _ranked(runs, score)])


def _colors(runs: Sequence[SweptRun], ranked_by: str) -> dict[int, str]:
    """The colors of the runs with a score, by their numbers: from the first color for the best to the second."""
    ranked = _ranked(runs, ranked_by)
    return {number: mixture(place / max(len(ranked) - 1, 1)) for place, number in enumerate(ranked)}


def _legend(runs: Sequence[SweptRun], ranked_by: str) -> list[tuple[str, str]]:
    """What the colors of `_colors` mean."""
    several = len(_ranked(runs, ranked_by)) > 1
    legend = [("linear-gradient(to right, var(--first), var(--second))", "from the best to the worst run")] * several
    return legend + [("var(--wrong)", "✗ failed")] * any(run.failed for run in runs)


def _curves(runs: Sequence[SweptRun], ranked_by: str) -> Iterator[Figure]:
    score = "eval_loss" if any("eval_loss" in line for run in runs for line in run.lines) else "loss"
    colors = _colors(runs, ranked_by)
    best = next(iter(colors), None)
    curves = []
    for number, run in enumerate(runs):
        if points := finite_points(run.lines, score):
            color = COLORS["wrong"] if run.failed else colors.get(number, COLORS["soft"])
            steps, values = zip(*points, strict=True)
            width = 1.6 if number == best else 1 if len(runs) <= 8 else 0.7
            curves.append(RunCurve(run.name, color, steps, values, failed=bool(run.failed), width=width))
    if curves:
        log = is_log([value for curve in curves for value in curve.values])
        title = "Held-out loss" if score == "eval_loss" else "Training loss"
        draw = partial(run_plots.draw_curves, curves=curves, highest=_highest(runs, score))
        yield make_figure(
            title, "by step" + ", logarithmic" * log, _legend(runs, ranked_by), draw, wide=True, height=300
        )


def _field_figure(runs: Sequence[SweptRun], field: str, score: str, fields: Sequence[str], *, wide: bool) -> Figure:
    """A score over a field, with one line for the runs that differ only in it and in the seed."""
    runs = [run for run in runs if field in run.values]
    scale = make_scale([run.values[field] for run in runs])
    others = [other for other in fields if other != field]
    points: dict[str, list[tuple[float, float]]] = {}
    orders = [make_scale([run.values.get(other, "") for run in runs]).places for other in others]
    order: dict[str, tuple[float, ...]] = {}
    for number in _ranked(runs, score):
        run = runs[number]
        name = ", ".join(
            f"{short_name(other, fields)}={value_text(run.values[other])}" for other in others if other in run.values
        )
        points.setdefault(name, []).append((scale.places[number], run.scores[score]))
        order[name] = tuple(places[number] for places in orders)
    names = sorted(points, key=order.__getitem__) if len(points) <= len(GROUP_COLORS) else list(points)
    colors = GROUP_COLORS if len(names) <= len(GROUP_COLORS) else ["first"] * len(names)
    lines = [Line(name, color, points[name]) for name, color in zip(names, colors, strict=False)]
    legend = [(f"var(--{line.color})", line.name) for line in lines if 1 < len(lines) <= len(GROUP_COLORS)]
    failed = [scale.places[number] for number, run in enumerate(runs) if run.failed]
    legend += [("var(--wrong)", "✗ failed")] * bool(failed)
    repeated = any(len({place for place, _ in some}) < len(some) for some in points.values())
    highest, kind = _highest(runs, score), "loss" if score.endswith("loss") else "score"
    notes = [
        score,
        "mean ± standard deviation over the seeds" * repeated,
        f"stopped runs with their last {kind}" * any(run.stopped for run in runs),
        f"▲ above {format_number(highest)}" * math.isfinite(highest),
        "logarithmic horizontal axis" * (scale.kind == "logarithmic"),
    ]
    low = lower_is_better(score)
    draw = partial(run_plots.draw_field, scale=scale, lines=lines, failed=failed, highest=highest, lower_is_better=low)
    return make_figure(short_name(field, fields), ", ".join(filter(None, notes)), legend, draw, wide=wide)


def _parallel_figure(runs: Sequence[SweptRun], fields: Sequence[str], ranked_by: str) -> Figure:
    """All runs across the axes of the fields and of the score."""
    ranked = _ranked(runs, ranked_by)
    shown = [*ranked, *(number for number, run in enumerate(runs) if run.failed and number not in ranked)]
    scales = [make_scale([runs[number].values.get(field, "not set") for number in shown]) for field in fields]
    highest = _highest(runs, ranked_by)
    scales.append(make_scale([min(runs[number].scores[ranked_by], highest) for number in ranked]))
    colors: list[str | None] = [*_colors(runs, ranked_by).values(), *[None] * (len(shown) - len(ranked))]
    names = [*(short_name(field, fields) for field in fields), ranked_by]
    draw = partial(run_plots.draw_parallel, names=names, scales=scales, colors=colors)
    note = f"{ranked_by} above {format_number(highest)} is drawn at the end of its axis" * math.isfinite(highest)
    return make_figure("Parallel coordinates", note, _legend(runs, ranked_by), draw, wide=True, height=320)
