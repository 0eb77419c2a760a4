"""Compare runs and sweeps: their scores and costs, with mean and standard deviation over seeds.

peftjax compare runs/lora runs/dora
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from peftjax.report.text import format_duration, format_number, format_spread
from peftjax.training.sweep_table import short_name, value_text

Measure = Callable[[Run], float | None]
Format = Callable[[Sequence[float]], str]


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
    logged = {name for run in runs for line in run.lines if line["kind"] == "eval" for name in line}
    for name in comparison.compared_scores(logged):
        label = name.removeprefix("eval_").replace("_", " ")
        last, best = (partial(measure, name=name) for measure in (comparison.last_score, comparison.best_score))
        scores[label] = last, format_spread
        if any(last(run) != best(run) for run in runs):
            scores[f"best\n{label}"] = best, format_spread
    costs: dict[str, tuple[Measure, Format]] = {
        "parameters": (comparison.trained_parameters, _mean("{:,.0f}".format)),
        "memory": (comparison.peak_bytes, _mean(format_bytes)),
        "time": (comparison.total_seconds, _mean(format_duration)),
        "per second": (comparison.median_speed, _mean(format_number)),
    }
    several = any(len(group.runs) > 1 for group in groups)
    captions = ("mean ± standard deviation over the seeds", "mean over the seeds") if several else (None, None)
    return Stack(_table(groups, scores, captions[0]), _table(groups, costs, captions[1]))


def _mean(text: Callable[[float], str]) -> Format:
    return lambda values: text(statistics.fmean(values)) if values else ""


def _table(groups: Sequence[Group], measures: Mapping[str, tuple[Measure, Format]], caption: str | None) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("seeds", justify="right")
    for name in measures:
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        found = [(map(measure, group.runs), text) for measure, text in measures.values()]
        cells = [text([value for value in values if value is not None]) for values, text in found]
        table.add_row(_name(group), str(len(group.runs)), *cells)
    return table


def _name(group: Group) -> str:
    """The fields in which the group differs from others; the name of the workdir if there is only one group."""
    shown = [f"{short_name(field, group.values)}={value_text(value)}" for field, value in group.values.items()]
    return printable("\n".join(shown) or group.runs[0].workdir.resolve().name)


if __name__ == "__main__":
    cli.run(main)
