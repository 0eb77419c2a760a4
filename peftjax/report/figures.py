"""Figures from drawings on matplotlib's axes: on a page, and as files for a paper."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peftjax.core.terminal import printable
from peftjax.report.svg import GROUP_COLORS, NARROW, WIDE, element, page_figure, plain_axes
from peftjax.report.text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Drawer = Callable[["Axes"], None]

_COLUMN = 3.3  # inches: the width of a column of a two-column paper


class Figure(NamedTuple):
    """A plot on a page.

    Attributes:
        title: The title.
        note: What is on the axes.
        legend: (CSS color, name).
        svg: The drawing.
        narrow: For a plot of the page's whole width, a drawing for small screens; otherwise empty.
    """

    title: str
    note: str
    legend: list[tuple[str, str]]
    svg: str
    narrow: str


def make_figure(
    title: str, note: str, legend: list[tuple[str, str]], draw: Drawer, *, wide: bool = False, height: int = 250
) -> Figure:
    """The drawing as a figure of a page. height: in pixels. wide: whether it has the page's whole width."""
    label = printable(f"{title}, {note}" if note else title)
    svg = _page_svg(label, draw, (WIDE if wide else NARROW, height))
    narrow = _page_svg(label, draw, (NARROW, height)) if wide else ""
    return Figure(title, note, legend, svg, narrow)


def _page_svg(label: str, draw: Drawer, size: tuple[int, int]) -> str:
    with page_figure(label, size) as figure:
        draw(plain_axes(figure))
        return element(figure, label)


def save_figure(
    path: Path, draw: Drawer, height: float, *, across: str, up: str = "", legend: bool = False
) -> list[Path]:
    """Save the drawing as path.png and path.pdf, and return these paths.

    The figure is 3.3 inches wide, the column of a two-column paper, and has 300 dpi. The text of the PDF is embedded TrueType.

    Args:
        path: The path without the extension.
        draw: Draws on axes.
        height: The height in inches, without the legend.
        across, up: The labels of the axes; may be empty.
        legend: Whether to have one, below the axes.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    settings = {
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 7,
        "text.parse_math": False,
        "pdf.fonttype": 42,
        "lines.linewidth": 1.2,
        "lines.markersize": 3.5,
        "grid.linewidth": 0.5,
    }
    with style.context(["default", settings]):
        figure = Figure((_COLUMN, height), dpi=300, layout="constrained")
        axes = plain_axes(figure)
        axes.tick_params(labelcolor="black", pad=3)
        draw(axes)
        axes.set_xlabel(across, loc="right")  # a text that is wider than the axes has room on their left
        axes.set_ylabel(up)
        if legend:
            handles, names = axes.get_legend_handles_labels()
            figure.set_figheight(height + 0.14 * min(len(names), len(GROUP_COLORS)))
            best = slice(None, -len(GROUP_COLORS) - 1, -1)  # drawn last
            figure.legend(
                handles[best], [shorten(name, 48) for name in names[best]], loc="outside lower left", frameon=False
            )
        paths = [path.with_suffix(ending) for ending in (".png", ".pdf")]
        for one in paths:
            figure.savefig(one)
    return paths
