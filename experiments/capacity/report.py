"""Report the held-out loss by the amount of training data, and write results.json, table.md and losses.png:

PYTHONPATH=. python experiments/capacity/report.py WORKDIR

WORKDIR is that of the sweep. No record is seen twice, so a run has the losses for every amount of data up to its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.report import COLORS, Group, Run, by_values, groups_of, interval, plot, versions

HERE = Path(__file__).parent
STEP_CHARACTERS = 4 * 128  # of a batch
BASELINE = "full"


def losses_of(workdir: Path) -> dict[int, float]:
    """The held-out loss of a run by step, without the loss before training."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]}


def groups_at(runs: list[Run], step: int) -> dict[str, Group]:
    """The groups of the sweep after a step, by name."""
    then = [{"values": run["values"], "scores": {"eval_loss": run["losses"][str(step)]}} for run in runs]
    return {group.name: group for group in groups_of(then)}


def table(found: dict[int, dict[str, Group]]) -> str:
    """The difference of each group from the baseline by amount of data, each at its best rate, as Markdown."""
    lines = [f"| characters | {' | '.join(f'{step * STEP_CHARACTERS // 1000}k' for step in found)} |"]
    lines.append(f"|---|{'---:|' * len(found)}")
    for name in next(iter(found.values())):
        lines.append(f"| {name} | {' | '.join(cell(groups[name], groups[BASELINE]) for groups in found.values())} |")
    return "\n".join(lines) + "\n"


def cell(group: Group, baseline: Group) -> str:
    """The loss of the baseline, or the difference from it."""
    return (
        f"{group.best_losses.mean():.3f}" if group is baseline else interval(group.best_losses - baseline.best_losses)
    )


def picture(found: dict[int, dict[str, Group]], file: Path) -> None:
    """The difference of each group from the baseline by amount of data: a dot for each seed, and a line through the means."""
    data = [step * STEP_CHARACTERS / 1000 for step in found]
    with plot(file) as axes:
        for color, name in zip(COLORS, next(iter(found.values())), strict=False):
            losses = [groups[name].best_losses - groups[BASELINE].best_losses for groups in found.values()]
            axes.plot(data, losses, ".", color=color, markersize=4)
            axes.plot(data, [each.mean() for each in losses], color=color, label=name)
        axes.set(
            xlabel="Training data (thousand characters)", ylabel="Held-out loss minus that of full\n(nats per token)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Report the losses by the amount of training data.")
    parser.add_argument("workdir", type=Path, help="Workdir of the sweep")
    workdir: Path = parser.parse_args().workdir
    runs: list[dict[str, Any]] = [
        {"values": run["values"], "losses": {str(step): loss for step, loss in losses_of(workdir / run["run"]).items()}}
        for run in by_values(json.loads((workdir / "sweep.json").read_text()))
    ]
    (HERE / "results.json").write_text(json.dumps({"versions": versions(), "runs": runs}, indent=1) + "\n")
    found = {int(step): groups_at(runs, int(step)) for step in runs[0]["losses"]}
    (HERE / "table.md").write_text(table({step: found[step] for step in (100, 200, 400, 800)}))
    picture(found, HERE / "losses.png")


if __name__ == "__main__":
    main()
