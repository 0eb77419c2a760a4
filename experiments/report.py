"""Report a study: a sweep over learning rates, seeds, and what the study compares.

    PYTHONPATH=. python experiments/report.py STUDY WORKDIR --baseline=GROUP

STUDY is a folder here, and WORKDIR that of the sweep. Writes results.json, table.md and losses.png into STUDY. Runs that differ
only in the learning rate and the seed are a group, which is named by the other values. Of several baselines, a group is compared
with the one that has the most values in common with it.
"""

import argparse
import contextlib
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

from peftjax.core.json_numbers import with_numbers

RATE = "optim.learning_rate"
PACKAGES = ("jax", "flax", "optax")
Run = dict[str, Any]  # an entry of sweep.json
COLORS = ("black", "#CC79A7", "#E69F00", "#009E73", "#0072B2", "#56B4E9", "#D55E00", "#999999", "#8C564B")


@dataclasses.dataclass
class Group:
    """Runs that differ only in the learning rate and the seed.

    Attributes:
        values: The values that they share.
        rates: The learning rates, ascending.
        losses: The held-out losses [seeds, rates]; inf where a run failed.
    """

    values: dict[str, Any]
    rates: np.ndarray
    losses: np.ndarray

    @property
    def name(self) -> str:
        """The name of the group, e.g. "lora, rank=4"."""
        return name_of(self.values)

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


def shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a run shares with its group."""
    return {field: value for field, value in values.items() if field not in (RATE, "seed")}


def name_of(values: Mapping[str, Any]) -> str:
    """The name of a run's group, e.g. "lora, rank=4"."""
    return ", ".join(
        text_of(value) if field == "method.name" else f"{field.rpartition('.')[2]}={text_of(value)}"
        for field, value in shared(values).items()
    )


def text_of(value: Any) -> str:
    """A value in the name of a group, e.g. "q+k+v+o" for a list of layers."""
    return "+".join(value).replace("_proj", "") if isinstance(value, list) else str(value or "none")


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def by_values(runs: Iterable[Run]) -> list[Run]:
    """The runs, sorted by their values."""
    return sorted(runs, key=lambda run: list(run["values"].items()))


def groups_of(runs: list[Run]) -> Iterator[Group]:
    """The groups of a sweep, sorted by their values."""
    members: dict[str, list[Run]] = {}
    for run in by_values(runs):
        members.setdefault(name_of(run["values"]), []).append(run)
    for group in members.values():
        found = {
            (run["values"][RATE], run["values"]["seed"]): with_numbers(run["scores"]).get("eval_loss", math.inf)
            for run in group
        }
        rates, seeds = (sorted(set(each)) for each in zip(*found, strict=True))
        losses = np.array([[found[rate, seed] for rate in rates] for seed in seeds])
        yield Group(shared(group[0]["values"]), np.array(rates), losses)


def interval(differences: np.ndarray) -> str:
    """The mean of the differences with the same seed, and its 95 % interval by Student's t."""
    low, high = stats.t.interval(0.95, len(differences) - 1, differences.mean(), stats.sem(differences))
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def baseline_of(group: Group, baselines: list[Group]) -> Group:
    """The baseline with the most values in common with a group."""
    return max(baselines, key=lambda baseline: sum(group.values.get(k) == v for k, v in baseline.values.items()))


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


def table(groups: list[Group], baselines: list[Group]) -> str:
    """The best rate of each group, and its losses with this rate, as Markdown."""
    name = baselines[0].name if len(baselines) == 1 else "the baseline"
    head = f"| | best rate tried | fitted best rate | relative to {name} | held-out loss | difference from {name} |"
    rows = (row(group, baseline_of(group, baselines)) for group in groups)
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|", *rows]) + "\n"


@contextlib.contextmanager
def plot(file: Path) -> Iterator[Any]:
    """The axes of a new figure, which is saved with a grid and a legend; a long legend is placed beside the axes."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    yield axes
    axes.grid(color="lightgray", linewidth=0.5)
    if len(axes.get_legend_handles_labels()[0]) > 6:
        figure.set_figwidth(7.2)
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    else:
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=200)


def picture(groups: list[Group], file: Path) -> None:
    """The loss by learning rate: a dot for each seed, and a line through the means. Rates that are far too high are cut off."""
    rates = sorted({float(rate) for group in groups for rate in group.rates})
    with plot(file) as axes:
        for color, group in zip(COLORS[: len(groups)], groups, strict=True):
            axes.plot(group.rates, group.losses.T, ".", color=color, markersize=4)
            axes.plot(group.rates, group.losses.mean(0), color=color, label=group.name)
        top = min(axes.get_ylim()[1], 1.3 * max(group.best_losses.max() for group in groups))
        lowest = min(group.losses.min() for group in groups)
        axes.set_ylim(lowest - 0.05 * (top - lowest), top)
        axes.set(xscale="log", xlabel="Learning rate", ylabel="Held-out loss (nats per token)")
        axes.minorticks_off()
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45, ha="right", rotation_mode="anchor")


def main() -> None:
    parser = argparse.ArgumentParser(description="Report a study.")
    parser.add_argument("study", type=Path, help="Folder of the study")
    parser.add_argument("workdir", type=Path, help="Workdir of its sweep")
    parser.add_argument(
        "--baseline",
        required=True,
        action="append",
        metavar="GROUP",
        help="Group that others are compared with; may be repeated",
    )
    options = parser.parse_args()
    runs = json.loads((options.workdir / "sweep.json").read_text())
    results = {"versions": versions(), "runs": runs}
    (options.study / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    groups = list(groups_of(runs))
    if unknown := set(options.baseline) - {group.name for group in groups}:
        parser.error(
            f"--baseline={min(unknown)} is not a group; the groups are: {'; '.join(group.name for group in groups)}"
        )
    baselines = [group for group in groups if group.name in options.baseline]
    (options.study / "table.md").write_text(table(groups, baselines))
    picture(groups, options.study / "losses.png")


if __name__ == "__main__":
    main()
