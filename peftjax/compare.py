"""Compare runs and sweeps: their scores and costs, with mean and standard deviation over seeds.

peftjax compare runs/lora runs/dora
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Group as Stack
from rich.table import Table

from peftjax.core import cli
from peftjax.core.output import say
from peftjax.core.terminal import make_console, printable
from peftjax.core.units import format_bytes
from peftjax.report import comparison
from peftjax.report.comparison import Group, Run
from peftjax.report.text import format_duration, format_number
from peftjax.training.sweep_table import short_name, value_text

Measure = Callable[[Run], float | None]
Format = Callable[[float], str]


def main(argv: list[str]) -> None:
    """Run the command: print the comparison."""
    parser = argparse.ArgumentParser(
        prog=cli.program("compare"),
        description="Compare the scores and costs of runs and sweeps. Runs that differ only in the seed share a row.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="workdir of a run or of a sweep")
    runs = comparison.read_runs(cli.parse_options(parser, argv).runs)
    for warning in comparison.warnings_of(runs):
        say(f"warning: {warning}", error=True)
    make_console().print(make_tables(runs))


def make_tables(runs: Sequence[Run]) -> Stack:
    """Two tables with one row per group: the scores, and the costs."""
    groups = comparison.group_runs(runs)
    scores: dict[str, tuple[Measure, Format]] = {}
    for name in comparison.compared_scores(runs):
        label = name.removeprefix("eval_").replace("_", " ")
        scores[label] = functools.partial(comparison.last_score, name=name), format_number
        scores[f"best {label}"] = functools.partial(comparison.best_score, name=name), format_number
    costs: dict[str, tuple[Measure, Format]] = {
        "parameters": (comparison.trained_parameters, "{:,.0f}".format),
        "memory": (comparison.peak_bytes, format_bytes),
        "time": (comparison.total_seconds, format_duration),
        "per second": (comparison.median_speed, format_number),
    }
    several = any(len(group.runs) > 1 for group in groups)
    caption = "mean ± standard deviation over the seeds, if they differ" if several else None
    return Stack(_table(groups, scores, caption), _table(groups, costs, None))


def _table(groups: Sequence[Group], measures: Mapping[str, tuple[Measure, Format]], caption: str | None) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("seeds", justify="right")
    for name in measures:
        table.add_column(name, justify="right")
    for group in groups:
        cells = [_cell(group, measure, text) for measure, text in measures.values()]
        table.add_row(_name(group), str(len(group.runs)), *cells)
    return table


def _name(group: Group) -> str:
    """The fields in which the group differs from others; the name of the workdir if there is only one group."""
    shown = [f"{short_name(field, group.values)}={value_text(value)}" for field, value in group.values.items()]
    return printable("\n".join(shown) or group.runs[0].workdir.resolve().name)


def _cell(group: Group, measure: Measure, text: Format) -> str:
    found = comparison.spread(map(measure, group.runs))
    if found is None:
        return ""
    mean, deviation = found
    return text(mean) + (f" ± {text(deviation)}" if deviation else "")


if __name__ == "__main__":
    cli.run(main)
