"""Curves drawn by matplotlib as an SVG element whose colors and fonts are the page's."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The page defines a CSS variable for each of these, with one value for the light and one for the dark theme.
COLORS = {"first": "#3457d5", "second": "#c8641b", "soft": "#62656e", "grid": "#ecece8"}

MEAN = "mean"  # the class of the element with a running mean

MANY = 40  # points: shorter curves have a marker on each point

Bounds = tuple[float | None, float | None]


class Curve(NamedTuple):
    """Values over steps.

    Attributes:
        name: The name in the legend.
        color: A key of `COLORS`.
        steps: The steps.
        values: The values, all finite.
        faint: Whether to draw it faintly, because the next curve is its running mean.
        mean: Whether it is the running mean of the curve before it.
    """

    name: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    faint: bool = False
    mean: bool = False


class Frame(NamedTuple):
    """Where the axes are in a drawing, for the script of the page.

    Attributes:
        left, right, top, bottom: Sides in pixels.
        last_step: The step at the right side.
        low: The value at the bottom.
        high: The value at the top.
        log: Whether the vertical axis is logarithmic.
    """

    left: float
    right: float
    top: float
    bottom: float
    last_step: float
    low: float
    high: float
    log: bool


class Drawing(NamedTuple):
    """A chart that is drawn: the svg element and its frame."""

    svg: str
    frame: Frame


def draw(
    title: str,
    curves: Sequence[Curve],
    last_step: int,
    *,
    size: tuple[int, int],
    bounds: Bounds,
    text: Callable[[float], str],
    log: bool,
) -> Drawing:
    """Draw a chart; equal curves give equal text.

    Args:
        title: The title, for screen readers.
        curves: At least one curve.
        last_step: The end of the horizontal axis.
        size: Width and height in pixels.
        bounds: Limits of a linear vertical axis; None for an automatic one.
        text: Formats the labels of the vertical axis.
        log: Whether the vertical axis is logarithmic.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    width, height = size
    # text stays text, in the page's font; simplification keeps a few points per pixel of a long curve
    settings = {
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 12,
        "svg.hashsalt": f"{title} {width}",
        "path.simplify_threshold": 0.5,
    }
    with style.context(["default", settings]):
        figure = Figure((width / 72, height / 72), facecolor="none", layout="constrained")
        axes = figure.subplots(subplot_kw={"facecolor": "none"})
        for curve in curves:
            look: dict[str, Any] = {"alpha": 0.3} if curve.faint else {"marker": "o"} if len(curve.steps) < MANY else {}
            look |= {"color": COLORS[curve.color], "solid_capstyle": "round", "clip_on": False}
            (line,) = axes.plot(curve.steps, curve.values, linewidth=1.75, markersize=5, **look)
            if curve.mean:
                line.set_gid(MEAN)
        _set_scales(axes, curves, last_step, bounds, log)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: text(value))
        axes.tick_params(left=False, bottom=False, pad=6, labelcolor=COLORS["soft"])
        axes.minorticks_off()
        axes.grid(axis="y", color=COLORS["grid"], linewidth=1, clip_on=False)
        axes.spines[:].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    return Drawing(_element(file.getvalue(), title, width, height), _frame(axes, width, height, log))


def _frame(axes: "Axes", width: int, height: int, log: bool) -> Frame:
    box, (low, high) = axes.get_position(), axes.get_ylim()
    left, right = (round(float(x * width), 2) for x in (box.x0, box.x1))
    top, bottom = (round(float((1 - y) * height), 2) for y in (box.y1, box.y0))
    return Frame(left, right, top, bottom, float(axes.get_xlim()[1]), float(low), float(high), log)


def _set_scales(axes: "Axes", curves: Sequence[Curve], last_step: int, bounds: Bounds, log: bool) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xlim(0, max(last_step, 1))
    axes.locator_params("x", nbins=5, integer=True)
    axes.locator_params("y", nbins=6)
    if log:
        axes.set_yscale("log")
        values = [value for curve in curves for value in curve.values]
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(values) < 1e4 * min(values) else (1,)))
    else:
        axes.set_ylim(*bounds)


def _element(document: str, title: str, width: int, height: int) -> str:
    """The drawing of an SVG document, without its date and its ids, in the page's colors."""
    drawing = re.sub(r' id="[\w.]+_\d+"', "", document.split("</defs>", 1)[1]).replace(
        f'id="{MEAN}"', f'class="{MEAN}"'
    )
    for name, color in COLORS.items():
        drawing = drawing.replace(color, f"var(--{name})")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} by step">{drawing}'
