"""The charts of a run: the loss, the scores, the learning rate, the gradient norm and the speed over the steps."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peftjax.log import speeds
from peftjax.report.points import curve_points
from peftjax.report.svg import MANY, NARROW, WIDE, Bounds, Curve, Drawing, draw_chart, is_log
from peftjax.report.text import field_title, format_number, format_percent

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl

# The scores that an evaluation may have, fractions or correlations, the most telling first.
_SCORES = (
    "exact_match", "rouge_l", "accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "token_accuracy",
)  # fmt: skip

# Texts of values, by the names that charts.js has for them.
_FORMATS: Mapping[str, Callable[[float], str]] = {
    "number": format_number, "percent": format_percent, "count": "{:,.0f}".format,
}  # fmt: skip

_WIDE, _NARROW = (WIDE, 280), (NARROW, 180)  # sizes in pixels


class Chart(NamedTuple):
    """One chart on the page.

    Attributes:
        title: The title.
        note: The unit, and whether the axis is logarithmic.
        legend: Each curve with its last value as text; a faint curve has none.
        points: The values, from `curve_points`.
        drawing: The drawing.
        narrow: For a chart of the page's whole width, a drawing for small screens; otherwise None.
    """

    title: str
    note: str
    legend: list[tuple[Curve, str]]
    points: str
    drawing: Drawing
    narrow: Drawing | None


def main_scores(evaluations: Lines) -> list[str]:
    """Return the names of at most two scores of the last evaluation, the most informative first."""
    return [name for name in _SCORES if any(name in line for line in evaluations[-1:])][:2]


def finite_points(lines: Lines, field: str) -> list[tuple[float, float]]:
    """The steps and values of a field, without values that are not finite."""
    return [(line["step"], line[field]) for line in lines if math.isfinite(line.get(field, math.nan))]


def make_charts(train: Lines, evaluations: Lines, loss_unit: str) -> list[Chart]:
    """Return the charts for which there is data, the loss first, from the train and eval lines of metrics.jsonl."""
    last_step = max((line["step"] for line in [*train, *evaluations]), default=0)
    loss = _curves("training", train, "loss", smooth=True) + _curves("held out", evaluations, "eval_loss", "second")
    scores = [
        curve
        for name, color in zip(main_scores(evaluations), ("first", "second"), strict=False)
        for curve in _curves(name.replace("_", " "), evaluations, name, color)
    ]
    lowest = min((value for curve in scores for value in curve.values), default=0)
    score_title = "Scores" if len(scores) > 1 else " ".join(curve.name.capitalize() for curve in scores)
    rate = _curves("learning rate", train, "learning_rate")
    norm = _curves("running mean", train, "grad_norm", smooth=True)
    charts = [
        _chart("Loss", loss, last_step, loss_unit, log=True, bounds=(None, None), wide=bool(scores)),
        _chart(score_title, scores, last_step, "held out", bounds=(min(lowest, 0), 1), form="percent"),
        _chart("BLEU", _curves("BLEU", evaluations, "bleu"), last_step, "held out"),
        _chart("Learning rate", rate, last_step),
        _chart("Gradient norm", norm, last_step, "before clipping", log=True),
    ]
    for name in speeds(train):
        speed = _curves("running mean", train, name, smooth=True)
        charts.append(_chart(field_title(name), speed, last_step, form="count"))
    return [chart for chart in charts if chart]


def _curves(name: str, lines: Lines, field: str, color: str = "first", smooth: bool = False) -> list[Curve]:
    """The curve of a field, without values that are not finite; no curve if no value is left.

    smooth: draw a long curve faintly under its running mean.
    """
    points = finite_points(lines, field)
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    if not smooth or len(points) < MANY:
        return [Curve(name, color, steps, values)]
    window = np.ones(2 * (len(points) // 50 + 2) + 1)
    means = np.convolve(values, window, "same") / np.convolve(np.ones(len(points)), window, "same")
    raw = Curve("each logged step", color, steps, values, faint=True)
    return [raw, Curve(name, color, steps, means.tolist(), mean=True)]


def _chart(
    title: str,
    curves: list[Curve],
    last_step: int,
    note: str = "",
    *,
    form: str = "number",
    log: bool = False,
    bounds: Bounds = (0, None),
    wide: bool = False,
) -> Chart | None:
    """The chart of some curves, or None if there are none. log: use a logarithmic axis if the values are positive and span
    more than a factor of 30. form: a key of `_FORMATS`. The other arguments are as in `draw_chart`."""
    if not curves:
        return None
    text = _FORMATS[form]
    log = log and is_log([value for curve in curves for value in curve.values])
    drawn = functools.partial(draw_chart, title, curves, last_step, bounds=bounds, text=text, log=log)
    return Chart(
        title,
        ", ".join(filter(None, [note, "logarithmic" if log else ""])),
        [(curve, "" if curve.faint else text(curve.values[-1])) for curve in curves],
        curve_points(title, curves, form),
        drawn(size=_WIDE if wide else _NARROW),
        drawn(size=_NARROW) if wide else None,
    )
