"""Plots of several runs: learning curves, the score over a field, parallel coordinates, and the score of each group.

Each function draws on given axes, from which `report.figures` makes figures.
"""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peftjax.report.scales import Scale
from peftjax.report.svg import CARD, COLORS, GROUP_COLORS, is_log, set_steps, set_values
from peftjax.report.text import format_number, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^Dvp"  # of each group of runs, over a field
_FAILED: dict[str, Any] = {
    "color": COLORS["wrong"], "marker": "x", "linestyle": "none", "markeredgewidth": 1.75, "clip_on": False,
}  # fmt: skip
_DOTTED: dict[str, Any] = {"color": COLORS["wrong"], "linestyle": ":"}


class RunCurve(NamedTuple):
    """The curve of a run, or the mean curve of a group.

    Attributes:
        name: The name in the legend.
        color: The color, as "#rrggbb".
        steps: The steps.
        values: The values, all finite.
        spread: The standard deviations; empty for one run.
        failed: Whether the run failed at the end of the curve.
        width: The width of the line, relative to others. Wide lines are on top; those below 1 are faint.
    """

    name: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    spread: Sequence[float] = ()
    failed: bool = False
    width: float = 1.0


class Line(NamedTuple):
    """The runs that differ only in one field and the seed.

    Attributes:
        name: What they have in common.
        color: A key of `COLORS`.
        points: (place, score) of each run.
    """

    name: str
    color: str
    points: list[tuple[float, float]]


def highest_shown(losses: Sequence[float]) -> float:
    """The highest loss that an axis shows; runs that diverged are marked at its end. Infinite if all runs are shown.

    A run is left out if its loss is above the median by more than five times the median's distance from the lowest loss, and
    if the runs left out would take more than half of the axis.
    """
    if not losses:
        return math.inf
    lowest, median = min(losses), statistics.median(losses)
    highest = max(loss for loss in losses if loss <= median + 5 * (median - lowest))
    return highest if max(losses) - highest > highest - lowest > 0 else math.inf


def draw_curves(axes: "Axes", curves: Sequence[RunCurve], highest: float = math.inf) -> None:
    """Draw learning curves; a group's has a band of one standard deviation, and a failed run's ends with a cross.

    Failed runs and those that end above `highest` do not set the limits of the axis.
    """
    good = [curve for curve in curves if not curve.failed and curve.values[-1] <= highest] or curves
    values = [value for curve in good for value in curve.values]
    set_steps(axes, max(int(curve.steps[-1]) for curve in curves))
    set_values(axes, values, is_log(values), format_number)
    for curve in curves:
        look: dict[str, Any] = {"color": curve.color, "alpha": min(curve.width, 1), "zorder": 2 + curve.width / 2}
        (line,) = axes.plot(curve.steps, curve.values, label=curve.name, solid_capstyle="round", **look)
        line.set_linewidth(curve.width * line.get_linewidth())
        if len(curve.steps) == 1:
            line.set_marker("o")
        if any(curve.spread):
            low, high = (
                [value + sign * spread for value, spread in zip(curve.values, curve.spread, strict=True)]
                for sign in (-1, 1)
            )
            axes.fill_between(curve.steps, low, high, color=curve.color, alpha=0.2 * min(curve.width, 1), linewidth=0)
    if len(good) < len(curves):
        bottom, top = min(values), max(values)
        margin = 0.05 * (top - bottom or abs(top) or 1.0)
        axes.set_ylim(*((bottom / 1.1, top * 1.1) if is_log(values) else (bottom - margin, top + margin)))
    bottom, top = axes.get_ylim()
    for curve in curves:
        if curve.failed:
            axes.plot(curve.steps[-1:], [min(max(curve.values[-1], bottom), top)], zorder=4, **_FAILED)


def draw_field(
    axes: "Axes",
    scale: Scale,
    lines: Sequence[Line],
    failed: Sequence[float],
    highest: float = math.inf,
    lower_is_better: bool = True,
) -> None:
    """Draw the score of each run over the place of its value, and the mean and standard deviation of equal values.

    Crosses at the worse end of the vertical axis mark the places of failed runs. The axis ends at `highest`; triangles there mark
    runs with higher scores, which have no mean.
    """
    scores = [score for line in lines for _, score in line.points if score <= highest]
    set_values(axes, scores, is_log(scores), format_number)
    low, high = scale.padded
    axes.set_xlim(low, high)
    shift = 0.012 * (high - low)  # the lines do not hide each other
    for index, line in enumerate(lines):
        color, offset = COLORS[line.color], shift * (index - (len(lines) - 1) / 2) * (len(lines) <= len(GROUP_COLORS))
        marker = _MARKERS[GROUP_COLORS.index(line.color)] if line.color in GROUP_COLORS else "o"
        shown = sorted(point for point in line.points if point[1] <= highest)
        higher = {place for place, score in line.points if score > highest}
        axes.plot(
            [place + offset for place, _ in shown], [score for _, score in shown],
            marker, color=color, alpha=0.55, markeredgewidth=0,
        )  # fmt: skip
        if higher:
            places = [place + offset for place in higher]
            axes.plot(places, [1] * len(places), "^", color=color, transform=axes.get_xaxis_transform(), clip_on=False)
        equal: dict[float, list[float]] = {}
        for place, score in shown:
            if place not in higher:
                equal.setdefault(place, []).append(score)
        if len(equal) > 1 or any(len(some) > 1 for some in equal.values()):
            spreads = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in equal.values()]
            means = [statistics.fmean(some) for some in equal.values()]
            alpha = 1 if len(lines) <= len(GROUP_COLORS) else 0.35
            axes.errorbar([place + offset for place in equal], means, spreads, color=color, capsize=3, alpha=alpha)
    if failed:
        axes.plot(
            failed, [0.98 if lower_is_better else 0.02] * len(failed), transform=axes.get_xaxis_transform(), **_FAILED
        )
    room = 0.85 * _characters(axes)
    if scale.kind == "categorical":
        ticks = [(place, shorten(text, max(int(room / len(scale.ticks)) - 1, 3))) for place, text in scale.ticks]
    else:
        ticks = _spaced(scale.ticks, low, high, room)
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])


def draw_parallel(axes: "Axes", names: Sequence[str], scales: Sequence[Scale], colors: Sequence[str | None]) -> None:
    """Draw parallel coordinates: each run is a line across the axes of the fields to the axis of the score.

    The runs are sorted, the best first. Failed runs come last: they have no color, and no place on the last scale.
    """
    for run in reversed(range(len(colors))):
        heights = [scale.height(scale.places[run]) for scale in scales if run < len(scale.places)]
        look = {"color": colors[run], "alpha": 1 if run == 0 else 0.75} if colors[run] else _DOTTED
        (line,) = axes.plot(range(len(heights)), heights, solid_capstyle="round", clip_on=False, **look)
        line.set_linewidth((1.8 if run == 0 else 0.8) * line.get_linewidth())
        if not colors[run]:
            axes.plot([len(heights) - 1], heights[-1:], zorder=4, **_FAILED)
    axes.vlines(range(len(scales)), 0, 1, color=COLORS["soft"], linewidth=1, zorder=3)
    boxed = {"facecolor": CARD, "edgecolor": "none", "alpha": 0.8, "pad": 1}
    characters = int(_characters(axes) / len(scales))
    for index, scale in enumerate(scales):
        outside = -1 if index == 0 else 1  # labels of the first axis are on its left
        for place, text in _spaced(scale.ticks, *scale.ends, 12, lines=True):
            axes.annotate(
                shorten(text, max(characters - 3, 4)), (index, scale.height(place)), (6 * outside, 0),
                textcoords="offset points", ha="right" if outside < 0 else "left", va="center", fontsize="small",
                color=COLORS["soft"], bbox=boxed, zorder=5,
            )  # fmt: skip
    axes.set_xlim(0, len(scales) - 1)
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([])
    axes.set_xticks(range(len(names)), [shorten(name, max(characters - 1, 5)) for name in names])


def draw_scores(axes: "Axes", names: Sequence[str], scores: Sequence[Sequence[float]], colors: Sequence[str]) -> None:
    """Draw the scores of each group in a row, with their mean and standard deviation; the first group is at the top."""
    for row, (values, color) in enumerate(zip(scores, colors, strict=True)):
        axes.plot(values, [row] * len(values), "o", color=color, alpha=0.45, markeredgewidth=0, clip_on=False)
        spread = statistics.stdev(values) if len(values) > 1 else None
        axes.errorbar([statistics.fmean(values)], [row], xerr=spread, color=color, marker="|", markersize=9, capsize=2)
    everything = [value for values in scores for value in values]
    if is_log(everything):
        axes.set_xscale("log")
    else:
        axes.locator_params("x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: format_number(value))
    axes.minorticks_off()
    axes.grid(axis="x", color=COLORS["grid"])
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _characters(axes: "Axes") -> float:
    """How many characters fit into the width of a figure on the page."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return float(figure.get_size_inches()[0]) * 72 / 7.5


def _spaced(
    ticks: Sequence[tuple[float, str]], low: float, high: float, room: float, lines: bool = False
) -> list[tuple[float, str]]:
    """The ticks that do not overlap. room: how many characters fit on the axis; with `lines`, how many lines."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        needed = 1 if lines else (len(text) + (len(kept[-1][1]) if kept else 0)) / 2 + 1.5
        if not kept or (place - kept[-1][0]) * room >= needed * (high - low):
            kept.append((place, text))
    return kept
