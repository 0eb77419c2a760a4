"""Compare runs and sweeps: their scores and costs, with mean and standard deviation over seeds.

peftjax compare runs/lora runs/dora --output=comparison
"""

import argparse
from pathlib import Path

from rich.table import Table

from peftjax.core import cli
from peftjax.core.output import say
from peftjax.core.terminal import make_console, simple_table
from peftjax.report import comparison
from peftjax.report.compare_page import write_comparison
from peftjax.report.compared_tables import ComparedTable, make_tables


def main(argv: list[str]) -> None:
    """Run the command: print the comparison, and write it to a directory if one is given."""
    parser = argparse.ArgumentParser(
        prog=cli.program("compare"),
        description="Compare the scores and costs of runs and sweeps. Runs that differ only in the seed share a row.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=cli.path, help="Workdir of a run or of a sweep")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=cli.path,
        help="Directory for compare.html, the tables as CSV, and figures for a paper (default: only print)",
    )
    options = cli.parse_options(parser, argv)
    cli.require_value(options, "output")
    runs = comparison.read_runs(map(Path, options.runs))
    for warning in comparison.warnings_of(runs):
        say(f"warning: {warning}", error=True)
    for table in make_tables(runs).values():
        make_console().print(_printed(table))
    if options.output:
        for path in write_comparison(runs, Path(options.output)):
            print(path)


def _printed(compared: ComparedTable) -> Table:
    table = simple_table(caption=compared.note or None)
    table.add_column("run", overflow="fold")
    table.add_column("seeds", justify="right")
    for name in compared.columns[2:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in compared.rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    cli.run(main)
