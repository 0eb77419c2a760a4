"""The table and the plot of the results. `python report.py [RESULTS.json]` writes them again."""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cells import CELLS

Results = Mapping[str, Mapping[str, Any]]

NOTES = (
    "ratio: PEFT's time divided by peftjax's, median and quartiles over the rounds; above 1, peftjax is faster",
    "bound: the time of the step's matrix products at the rate of a single product of that dtype, divided by peftjax's time",
    "memory: the peak resident memory of the whole process; first: seconds of the first step or answer",
    "*: other processes used more than 5 % of the machine during the measurement",
)
HEADINGS = ("cell", "PEFT", "peftjax", "ratio", "bound", "memory GiB", "first s")


class Ratio(NamedTuple):
    low: float
    median: float
    high: float


def ratio(entry: Mapping[str, Any]) -> Ratio:
    """The peer's time divided by ours in each round: the median and the quartiles."""
    both = zip(entry["seconds"]["torch"], entry["seconds"]["peftjax"], strict=True)
    ratios = [theirs / ours for theirs, ours in both]
    return Ratio(*statistics.quantiles(ratios, n=4, method="inclusive")) if len(ratios) > 1 else Ratio(*ratios * 3)


def bound(entry: Mapping[str, Any]) -> float | None:
    """The shortest possible time of the step's products, divided by our time; None if a cell has no such bound."""
    if not entry["flops"]:
        return None
    return entry["flops"] / max(entry["product_flops_per_second"].values()) / _median(entry, "peftjax")


def line(entry: Mapping[str, Any]) -> str:
    found = ratio(entry)
    busy = f"; other processes used {entry['others']:.0%} of the machine" if entry["busy"] else ""
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f}){busy}"


def write(results: Results, path: Path) -> None:
    """Print the table, and write it and the plot beside the JSON file."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(markup=False, width=None if sys.stdout.isatty() else 140), Table()
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for row in _rows(results):
        table.add_row(*row)
    console.print(table)
    console.print("\n".join(NOTES), highlight=False)
    path.with_suffix(".md").write_text(_markdown(results))
    _plot(results, path.with_suffix(".svg"))


def _ordered(results: Results) -> list[str]:
    return [name for name in CELLS if name in results]


def _rows(results: Results) -> list[tuple[str, ...]]:
    return [_row(name, results[name]) for name in _ordered(results)]


def _row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    found, share = ratio(entry), bound(entry)
    speeds = [
        f"{entry['work'] / _median(entry, side):,.0f} tok/s" if entry["work"] else f"{_median(entry, side):.2f} s"
        for side in ("torch", "peftjax")
    ]
    memory, first = (
        " / ".join(f"{entry[field][side] / unit:.2f}" for side in ("torch", "peftjax"))
        for field, unit in (("peak_bytes", 2**30), ("first_seconds", 1))
    )
    spread = f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"
    return f"{name}{'*' * entry['busy']}", *speeds, spread, f"{share:.0%}" if share else "", memory, first


def _median(entry: Mapping[str, Any], side: str) -> float:
    return statistics.median(entry["seconds"][side])


def _markdown(results: Results) -> str:
    rows = [HEADINGS, ("---",) * len(HEADINGS), *_rows(results)]
    table = ["| " + " | ".join(row).replace("*", "\\*") + " |" for row in rows]
    setups = {_setup(entry): entry["when"][:10] for entry in results.values()}
    notes = (*NOTES, *(f"{day}: {setup}" for setup, day in setups.items()))
    return "\n".join([*table, "", *(f"- {note}".replace("*", "\\*") for note in notes)]) + "\n"


def _setup(entry: Mapping[str, Any]) -> str:
    versions = {name: number for side in entry["versions"].values() for name, number in side.items()}
    computer = entry["machine"]
    return ", ".join(
        [
            computer["processor"],
            f"{computer['cores']} cores",
            *(f"{name} {number}" for name, number in versions.items()),
        ]
    )


def _plot(results: Results, path: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "peftjax"  # the same results give the same file
    names = _ordered(results)[::-1]
    ratios = [ratio(results[name]) for name in names]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.24 * len(names)), layout="constrained")
    rows = range(len(names))
    errors = [[found.median - found.low for found in ratios], [found.high - found.median for found in ratios]]
    axes.errorbar(
        [found.median for found in ratios], rows, xerr=errors, fmt="o", markersize=4, label="ratio and quartiles"
    )
    limits = [(found.median / share, row) for row, found, name in zip(rows, ratios, names, strict=True)
              if (share := bound(results[name]))]  # fmt: skip
    if limits:
        axes.plot(*zip(*limits, strict=True), "|", color="tab:red", markersize=10, label="at the bound")
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_yticks(rows, [f"{name}{'*' * results[name]['busy']}" for name in names], fontsize=7)
    axes.set_xlabel("time of PEFT / time of peftjax")
    axes.set_xlim(left=0)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    given = (
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "results/against_peft.json"
    )
    write(json.loads(given.read_text()), given)
