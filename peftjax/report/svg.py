"""Curves drawn by matplotlib as an SVG element whose colors and fonts are the page's."""

import contextlib
import io
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page defines a CSS variable for each of these, with one value for the light and one for the dark theme.
COLORS = {
    "first": "#3457d5", "second": "#c8641b", "third": "#009e73", "fourth": "#cc79a7", "fifth": "#56b4e9", "sixth": "#e69f00",
    "soft": "#62656e", "grid": "#ecece8", "wrong": "#c2343a",
}  # fmt: skip
GROUP_COLORS = ("first", "second", "third", "fourth", "fifth", "sixth")  # four are from the palette of Okabe and Ito

CARD = "#fffffe"  # behind the charts; a white of its own, which the page replaces by var(--card)

MEAN = "mean"  # the class of the element with a running mean

_STEP = 5  # percent, from one mixture of two colors to the next

WIDE, NARROW = 990, 468  # pixels: the page's whole width, and half of it

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


def draw_chart(
    title: str,
    curves: Sequence[Curve],
    last_step: int,
    *,
    size: tuple[int, int],
    bounds: Bounds,
    text: Callable[[float], str],
    log: bool,
) -> Drawing:
    """Draw a chart of at least one curve; equal curves give equal text.

    `title` is for screen readers, `size` is in pixels. `last_step` is the end of the horizontal axis. `bounds` are the limits of
    a linear vertical axis, with None for an automatic one, and `text` formats its labels.
    """
    with page_figure(title, size) as figure:
        axes = plain_axes(figure)
        for curve in curves:
            look: dict[str, Any] = {"alpha": 0.3} if curve.faint else {"marker": "o"} if len(curve.steps) < MANY else {}
            look |= {"color": COLORS[curve.color], "solid_capstyle": "round", "clip_on": False}
            (line,) = axes.plot(curve.steps, curve.values, **look)
            if curve.mean:
                line.set_gid(MEAN)
        set_steps(axes, last_step)
        set_values(axes, [value for curve in curves for value in curve.values], log, text)
        if not log:
            axes.set_ylim(*bounds)
        return Drawing(element(figure, f"{title} by step"), _frame(axes, *size, log))


@contextlib.contextmanager
def page_figure(title: str, size: tuple[int, int]) -> Iterator["Figure"]:
    """An empty figure of some width and height in pixels, in the style of the page. Equal titles and sizes give equal ids."""
    from matplotlib import style
    from matplotlib.figure import Figure

    width, height = size
    # text stays text, in the page's font; simplification keeps a few points per pixel of a long curve
    settings = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 12,
        "svg.hashsalt": f"{title} {width}",
        "path.simplify_threshold": 0.5,
        "lines.linewidth": 1.75,
        "lines.markersize": 5,
        "grid.linewidth": 1,
    }
    with style.context(["default", settings]):
        yield Figure((width / 72, height / 72), facecolor="none", layout="constrained")


def plain_axes(figure: "Figure") -> "Axes":
    """Axes without a frame and without tick marks."""
    axes = figure.subplots(subplot_kw={"facecolor": "none"})
    axes.tick_params(left=False, bottom=False, pad=6, labelcolor=COLORS["soft"])
    axes.spines[:].set_visible(False)
    return axes


def _frame(axes: "Axes", width: int, height: int, log: bool) -> Frame:
    box, (low, high) = axes.get_position(), axes.get_ylim()
    left, right = (round(float(x * width), 2) for x in (box.x0, box.x1))
    top, bottom = (round(float((1 - y) * height), 2) for y in (box.y1, box.y0))
    return Frame(left, right, top, bottom, float(axes.get_xlim()[1]), float(low), float(high), log)


def is_log(values: Collection[float]) -> bool:
    """Whether values need a logarithmic axis: they are positive and span more than a factor of 30."""
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def set_steps(axes: "Axes", last_step: int) -> None:
    """Scale the horizontal axis to the steps."""
    axes.set_xlim(0, max(last_step, 1))
    axes.locator_params("x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def set_values(axes: "Axes", values: Sequence[float], log: bool, text: Callable[[float], str]) -> None:
    """Label the vertical axis with values, which `text` formats, and draw a line at each label."""
    from matplotlib.ticker import LogLocator

    axes.locator_params("y", nbins=6)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(values) < 1e4 * min(values) else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: text(value))
    axes.minorticks_off()
    axes.grid(axis="y", color=COLORS["grid"], clip_on=False)


def mixture(share: float) -> str:
    """The first color mixed with this share of the second, which is rounded to twentieths."""
    percent = _STEP * round(100 * share / _STEP)
    if percent in (0, 100):
        return COLORS["second" if percent else "first"]
    pairs = [[int(COLORS[name][i : i + 2], 16) for i in (1, 3, 5)] for name in ("first", "second")]
    return "#" + "".join(f"{round(a + (b - a) * percent / 100):02x}" for a, b in zip(*pairs, strict=True))


def element(figure: "Figure", label: str) -> str:
    """The figure as an svg element, without its date and its ids, in the page's colors; `label` is for screen readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    drawing = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue().split("</defs>", 1)[1])
    drawing = drawing.replace(f'id="{MEAN}"', f'class="{MEAN}"')
    for name, color in [*COLORS.items(), ("card", CARD)]:
        drawing = drawing.replace(color, f"var(--{name})")
    for percent in range(0, 101, _STEP):
        drawing = drawing.replace(mixture(percent / 100), f"color-mix(in srgb, var(--second) {percent}%, var(--first))")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{drawing}'
