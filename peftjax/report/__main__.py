"""Write a run's report.html again.

python -m peftjax.report --workdir=runs/quickstart
"""

import argparse
from pathlib import Path

from peftjax.core import cli
from peftjax.report.page import write_report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m peftjax.report", description="Write report.html again.", allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where a training run wrote")
    print(write_report(parser.parse_args(argv).workdir))


if __name__ == "__main__":
    cli.run(main)
