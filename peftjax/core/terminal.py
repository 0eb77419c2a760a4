"""The console of the commands, which prints text unchanged, on a terminal and in a log file.

Paths, prompts, messages of compilers and names of packages may contain brackets, such as peftjax[tpu], or colons, such as
:tpu:. rich reads both as its own notation in every string that it prints, also in the cells of a table. The consoles made
here do not, except in the title of a panel and the text of a spinner. These, and texts with styles, are `rich.text.Text`.
"""

import os
import sys
import unicodedata
from typing import TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 100  # columns of tables in files and pipes, unless COLUMNS says otherwise


def make_console(*, file: TextIO | None = None, soft_wrap: bool = False) -> Console:
    """Return a console without markup, emoji codes and highlighting, and without control codes unless it is a terminal.

    Args:
        file: Where it prints; by default, stdout.
        soft_wrap: Leave the wrapping of long lines to the terminal, so that commands and paths can be copied whole.
    """
    file = file or sys.stdout
    terminal = is_terminal(file)
    return Console(
        file=file,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=soft_wrap,
        force_terminal=terminal,  # also where FORCE_COLOR is set, as in GitHub's CI
        width=None if terminal or "COLUMNS" in os.environ else PLAIN_WIDTH,
    )


def simple_table(*headings: str, caption: str | None = None) -> Table:
    """Return a table with a line below its headings, and none elsewhere."""
    return Table(*headings, box=box.SIMPLE, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")


def is_terminal(file: TextIO) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    return file.isatty() and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Escape the control characters of a text, such as those that a model generates, except for line breaks and tabs."""
    return "".join(
        repr(one)[1:-1] if unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t" else one for one in text
    )


class Clipped:
    """A text of which at most the first `lines` lines are shown, wrapped to the available width."""

    def __init__(self, text: str, lines: int) -> None:
        self._text, self._lines = Text(printable(text)), lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = list(self._text.wrap(console, options.max_width))
        if len(lines) > self._lines:
            del lines[self._lines :]
            lines[-1].truncate(max(options.max_width - 2, 0))
            lines[-1].append(" …")
        yield Text("\n").join(lines)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._text)
