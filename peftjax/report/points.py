"""The values of curves for the script of the page, charts.js."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from peftjax.report.svg import Curve

MOST = 1000  # points of a curve; a longer one is thinned out


def curve_points(title: str, curves: Sequence[Curve], form: str) -> str:
    """Return the curves as JSON.

    Only every k-th point of a long curve is kept. If the curve is noisy, `means` has the means over k points, from which the
    script computes running means.

    Args:
        title: The title of the chart, the name of its only curve.
        curves: The curves of a chart. A running mean has the values of the curve before it.
        form: How the script formats the values: "number", "percent" or "count".
    """
    before = [None, *curves]
    shown = [_points(curve, before[i] if curve.mean else None) for i, curve in enumerate(curves) if not curve.faint]
    if len(shown) == 1:
        shown[0]["name"] = title.lower()
    return json.dumps({"format": form, "curves": shown}, separators=(",", ":"))


def _points(curve: Curve, noisy: Curve | None) -> dict[str, Any]:
    """The points of a curve. If it is the running mean of `noisy`, the points have the values of `noisy`."""
    values = np.asarray((noisy or curve).values, float)
    every = -(-len(values) // MOST)
    points = {
        "name": curve.name,
        "color": curve.color,
        "steps": list(curve.steps[::every]),
        "values": _rounded(values[::every]),
        "noisy": noisy is not None,
    }
    if noisy and every > 1:
        starts = np.arange(0, len(values), every)
        points["means"] = _rounded(np.add.reduceat(values, starts) / np.diff([*starts, len(values)]))
    return points


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
