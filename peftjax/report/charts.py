"""The charts of a report, drawn by matplotlib as SVG."""

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peftjax.log import SPEEDS

# Shares and correlations that an evaluation may have, those that say most first.
SCORES = (
    "exact_match", "rouge_l", "accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "token_accuracy",
)  # fmt: skip


Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def number(value: float) -> str:
    """Four digits: 0.25, 1,000, 7.33e-8."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    return re.sub(r"e(-?)\+?0*", r"e\1", text)


def scores(evaluations: Lines) -> list[str]:
    """The scores that the evaluations have, those that say most first; two fit into a chart."""
    return [name for name in SCORES if any(name in line for line in evaluations[-1:])][:2]


def title(name: str) -> str:
    """Of a field of metrics.jsonl: Tokens per second."""
    return name.replace("_", " ").capitalize()


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


# Charts

# In the page each of these becomes the variable of its name, which is light or dark as the page is.
COLORS = {"first": "#3457d5", "second": "#c8641b", "soft": "#62656e", "grid": "#ecece8"}


WIDE, NARROW = (990, 280), (468, 180)  # pixels, where the page has room


MANY = 40  # points: fewer are marked by dots; so many of a noisy curve stand faintly under their running mean


class _Curve(NamedTuple):
    """Values over the steps. color: a name in COLORS; faint: another curve is its running mean."""

    name: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    faint: bool = False


class _Chart(NamedTuple):
    """What the page shows of some curves. legend: (curve, its last value), a faint one without; svg: an element.

    narrow: of a chart that is as wide as the page, another element for a page of half the width; else empty.
    """

    title: str
    note: str
    legend: list[tuple[_Curve, str]]
    svg: str
    narrow: str


def charts(train: Lines, evaluations: Lines, task: str) -> list[_Chart]:
    """The charts there are data for, the loss first. task: its kind."""
    last_step = max((line["step"] for line in [*train, *evaluations]), default=0)
    loss = _curves("training", train, "loss", smooth=True) + _curves("held out", evaluations, "eval_loss", "second")
    accuracy = [
        curve
        for name, color in zip(scores(evaluations), ("first", "second"), strict=False)
        for curve in _curves(name.replace("_", " "), evaluations, name, color)
    ]
    lowest = min((value for curve in accuracy for value in curve.values), default=0)
    unit = "nats per token" if task in ("causal_lm", "seq2seq") else "mean of the examples"
    answers = "Answers" if len(accuracy) > 1 else " ".join(curve.name.capitalize() for curve in accuracy)
    rate = _curves("learning rate", train, "learning_rate")
    norm, *speeds = (_curves("running mean", train, name, smooth=True) for name in ("grad_norm", *SPEEDS))
    charts = [
        _chart("Loss", loss, last_step, unit, log=True, bounds=(None, None), wide=bool(accuracy)),
        _chart(answers, accuracy, last_step, "held out", bounds=(min(lowest, 0), 1), text=percent),
        _chart("Learning rate", rate, last_step),
        _chart("Gradient norm", norm, last_step, "before clipping", log=True),
    ]
    for name, speed in zip(SPEEDS, speeds, strict=True):
        charts.append(_chart(title(name), speed, last_step, text="{:,.0f}".format))
    return [chart for chart in charts if chart]


def _curves(name: str, lines: Lines, field: str, color: str = "first", smooth: bool = False) -> list[_Curve]:
    """The curve of a field, none if no line has it; values that are not finite have no place on paper."""
    points = [(line["step"], line[field]) for line in lines if field in line and math.isfinite(line[field])]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    if not smooth or len(points) < MANY:
        return [_Curve(name, color, steps, values)]
    window = np.ones(2 * (len(points) // 50 + 2) + 1)
    means = np.convolve(values, window, "same") / np.convolve(np.ones(len(points)), window, "same")
    return [_Curve("each logged step", color, steps, values, faint=True), _Curve(name, color, steps, means.tolist())]


def _chart(
    title: str,
    curves: list[_Curve],
    last_step: int,
    note: str = "",
    *,
    text: Callable[[float], str] = number,
    log: bool = False,
    bounds: tuple[float | None, float | None] = (0, None),
    wide: bool = False,
) -> _Chart | None:
    """The chart of the curves, None without any; the same curves give the same text.

    text: how values are written. log: their axis is logarithmic where they span more than a factor of 30.
    """
    if not curves:
        return None
    values = [value for curve in curves for value in curve.values]
    log = log and min(values) > 0 and max(values) > 30 * min(values)
    draw = functools.partial(_draw, title, curves, last_step, bounds, text, log)
    return _Chart(
        title,
        ", ".join(filter(None, [note, "logarithmic" if log else ""])),
        [(curve, "" if curve.faint else text(curve.values[-1])) for curve in curves],
        draw(WIDE if wide else NARROW),
        draw(NARROW) if wide else "",
    )


def _draw(
    title: str,
    curves: list[_Curve],
    last_step: int,
    bounds: tuple[float | None, float | None],
    text: Callable[[float], str],
    log: bool,
    size: tuple[int, int],
) -> str:
    """The svg element of a chart, of width x height pixels."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    width, height = size
    # text stays text, in the page's font; of a curve, however long, a few points a pixel are left
    settings = {
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 12,
        "svg.hashsalt": f"{title} {width}",
    }
    with style.context(["default", settings, {"path.simplify_threshold": 0.5}]):
        figure = Figure((width / 72, height / 72), facecolor="none", layout="constrained")
        axes = figure.subplots(subplot_kw={"facecolor": "none"})
        for curve in curves:
            look: dict[str, Any] = {"alpha": 0.3} if curve.faint else {"marker": "o"} if len(curve.steps) < MANY else {}
            look |= {"color": COLORS[curve.color], "solid_capstyle": "round", "clip_on": False}
            axes.plot(curve.steps, curve.values, linewidth=1.75, markersize=5, **look)
        axes.set_xlim(0, max(last_step, 1))
        axes.locator_params("x", nbins=5, integer=True)
        axes.locator_params("y", nbins=6)
        if log:
            axes.set_yscale("log")
            values = [value for curve in curves for value in curve.values]
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(values) < 1e4 * min(values) else (1,)))
        else:
            axes.set_ylim(*bounds)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: text(value))
        axes.tick_params(left=False, bottom=False, pad=6, labelcolor=COLORS["soft"])
        axes.minorticks_off()
        axes.grid(axis="y", color=COLORS["grid"], linewidth=1, clip_on=False)
        axes.spines[:].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    drawing = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue().split("</defs>", 1)[1])  # no date, no ids twice
    for name, color in COLORS.items():
        drawing = drawing.replace(color, f"var(--{name})")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} by step">{drawing}'
