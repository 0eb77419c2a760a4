"""The command that rewrites a run's report.html, or a sweep's sweep.html.

peftjax report --workdir=runs/quickstart
"""

import argparse
from pathlib import Path

from peftjax.core import cli
from peftjax.report.page import write_report
from peftjax.report.sweep_page import RESULTS, write_sweep_page


def main(argv: list[str]) -> None:
    """Run the command: write the report and print its path."""
    parser = argparse.ArgumentParser(
        prog=cli.program("report"),
        description="Rewrite a run's report.html or a sweep's sweep.html, for example after an upgrade or during the run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workdir", type=cli.path, required=True, metavar="DIR", help="Directory of the training run, or of a sweep"
    )
    options = cli.parse_options(parser, argv)
    cli.require_value(options, "workdir")
    workdir = Path(options.workdir)
    print(write_sweep_page(workdir) if (workdir / RESULTS).exists() else write_report(workdir))


if __name__ == "__main__":
    cli.run(main)
