"""Report a study: a sweep over learning rates, seeds, and what the study compares.

    PYTHONPATH=. python experiments/report.py STUDY WORKDIR --baseline=GROUP

STUDY is a folder here, and WORKDIR that of the sweep. Writes results.json, table.md and losses.png into STUDY. Runs that differ
only in the learning rate and the seed are a group, which is named by the other values.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

RATE = "optim.learning_rate"
PACKAGES = ("jax", "flax", "optax")
Run = dict[str, Any]  # an entry of sweep.json
COLORS = ("black", "#CC79A7", "#E69F00", "#009E73", "#0072B2", "#56B4E9", "#D55E00", "#999999")


@dataclasses.dataclass
class Group:
    """Runs that differ only in the learning rate and the seed.

    Attributes:
      name: The values that they share.
      rates: The learning rates, ascending.
      losses: The held-out losses [seeds, rates]; inf where a run failed.
    """

    name: str
    rates: np.ndarray
    losses: np.ndarray

    @property
    def best(self) -> int:
        """The index of the rate with the lowest mean loss."""
        return int(self.losses.mean(0).argmin())

    @property
    def best_losses(self) -> np.ndarray:
        """The losses with this rate [seeds]."""
        return self.losses[:, self.best]

    def optima(self) -> np.ndarray:
        """For each seed the rate at the minimum of a parabola in log(rate), through the lowest loss and its neighbors.

        NaN if the lowest loss is at an edge.
        """
        return np.array([optimum(self.rates, losses) for losses in self.losses])


def optimum(rates: np.ndarray, losses: np.ndarray) -> float:
    """The minimum of a parabola in log(rate) through the lowest loss and its neighbors; NaN if it is at an edge."""
    best = int(losses.argmin())
    near = slice(best - 1, best + 2)
    if best in (0, len(rates) - 1) or not np.isfinite(losses[near]).all():
        return math.nan
    curvature, slope, _ = np.polyfit(np.log(rates[near]), losses[near], 2)
    return float(np.exp(-slope / (2 * curvature)))


def name_of(values: Mapping[str, Any]) -> str:
    """The name of a run's group, e.g. "lora, rank=4"."""
    shared = {field: value for field, value in values.items() if field not in (RATE, "seed")}
    names = {field: "" if field == "method.name" else f"{field.rpartition('.')[2]}=" for field in shared}
    return ", ".join(f"{names[field]}{value or 'none'}" for field, value in shared.items())


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def by_values(runs: Iterable[Run]) -> list[Run]:
    """The runs, sorted by their values."""
    return sorted(runs, key=lambda run: list(run["values"].items()))


def groups_of(runs: list[Run]) -> Iterator[Group]:
    """The groups of a sweep, sorted by their values."""
    losses: dict[str, dict[tuple[float, int], float]] = {}
    for run in by_values(runs):
        found = losses.setdefault(name_of(run["values"]), {})
        found[run["values"][RATE], run["values"]["seed"]] = run["scores"].get("eval_loss", math.inf)
    for name, found in losses.items():
        rates, seeds = (sorted(set(each)) for each in zip(*found, strict=True))
        yield Group(name, np.array(rates), np.array([[found[rate, seed] for rate in rates] for seed in seeds]))


def interval(differences: np.ndarray) -> str:
    """The mean of the differences with the same seed, and its 95 % interval by Student's t."""
    low, high = stats.t.interval(0.95, len(differences) - 1, differences.mean(), stats.sem(differences))
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def row(group: Group, baseline: Group) -> str:
    """The row of a group in `table`."""
    optima, edge = group.optima(), group.best in (0, len(group.rates) - 1)
    ratios = optima / baseline.optima()
    known, same = np.isfinite(ratios).all(), group is baseline
    cells = [
        group.name,
        f"{group.rates[group.best]:g}{'*' * edge}",
        f"{np.exp(np.log(optima).mean()):.1e}" if np.isfinite(optima).all() else "",
        f"{np.exp(np.log(ratios).mean()):.1f} ({ratios.min():.1f} to {ratios.max():.1f})" if known and not same else "",
        f"{group.best_losses.mean():.3f} ± {group.best_losses.std(ddof=1):.3f}",
        "" if same else interval(group.best_losses - baseline.best_losses),
    ]
    return f"| {' | '.join(cells)} |"


def table(groups: list[Group], baseline: Group) -> str:
    """The best rate of each group, and its losses with this rate, as Markdown."""
    name = baseline.name
    head = f"| | best rate tried | fitted best rate | relative to {name} | held-out loss | difference from {name} |"
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|", *(row(group, baseline) for group in groups)]) + "\n"


def picture(groups: list[Group], file: Path) -> None:
    """The loss by learning rate: a dot for each seed, and a line through the means. Rates that are far too high are cut off."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for color, group in zip(COLORS, groups, strict=False):
        axes.plot(group.rates, group.losses.T, ".", color=color, markersize=4)
        axes.plot(group.rates, group.losses.mean(0), color=color, label=group.name)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.3 * max(group.best_losses.max() for group in groups)))
    axes.set(xscale="log", xlabel="Learning rate", ylabel="Held-out loss (nats per token)")
    axes.grid(color="lightgray", linewidth=0.5)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description="Report a study.")
    parser.add_argument("study", type=Path, help="Folder of the study")
    parser.add_argument("workdir", type=Path, help="Workdir of its sweep")
    parser.add_argument("--baseline", required=True, metavar="GROUP", help="Group that the others are compared with")
    options = parser.parse_args()
    runs = json.loads((options.workdir / "sweep.json").read_text())
    results = {"versions": versions(), "runs": runs}
    (options.study / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    groups = list(groups_of(runs))
    (baseline,) = (group for group in groups if group.name == options.baseline)
    (options.study / "table.md").write_text(table(groups, baseline))
    picture(groups, options.study / "losses.png")


if __name__ == "__main__":
    main()
