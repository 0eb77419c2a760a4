"""Evaluate the runs of the sweep on the text that the base was pretrained on, and write results.json, table.md and losses.png:

PYTHONPATH=. python experiments/forgetting/evaluate.py WORKDIR --text=FILE

WORKDIR is that of the sweep, which may have any methods, full fine-tuning among them; FILE has the pretraining text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.report import COLORS, RATE, Run, by_values, interval, name_of, plot, versions
from peftjax import sharding
from peftjax.training.config import Config
from peftjax.training.trained import held_out_scores, load_trained, open_task, result_of, run_config

HERE = Path(__file__).parent


def config_of(workdir: Path, text: str) -> Config:
    """The config of a run, with other held-out data."""
    fields = {"data.eval": (text,), "data.format": "text", "data.text_field": "text", "train.eval_batches": 100}
    return run_config(workdir, overrides=[f"--config.{name}={value}" for name, value in fields.items()])


def evaluate(runs: list[Run], workdir: Path, text: str) -> dict[str, Any]:
    """The held-out losses of the base and of each run on both texts."""
    first, found = config_of(workdir / runs[0]["run"], text), []
    mesh, task = sharding.make_mesh(first.mesh.sizes), open_task(first)
    with jax.set_mesh(mesh):
        base = task.load_model(first.model, task.directory, mesh, first.seed)
        sharding.place(base, mesh)
        before = held_out_scores(first, base, task, mesh)["eval_loss"]
        for run in runs:
            config = config_of(workdir / run["run"], text)
            model = load_trained(config, task, result_of(config, workdir / run["run"]), mesh)
            losses = {
                "new": run["scores"]["eval_loss"],
                "pretraining": held_out_scores(config, model, task, mesh)["eval_loss"],
            }
            found.append({"values": run["values"], **losses})
            print(run["run"], losses, flush=True)
    return {"versions": versions(), "base": before, "runs": found}


def by_method(results: dict[str, Any]) -> dict[str, dict[float, list[Run]]]:
    """The runs of each method and learning rate."""
    found: dict[str, dict[float, list[Run]]] = {}
    for run in results["runs"]:
        found.setdefault(name_of(run["values"]), {}).setdefault(run["values"][RATE], []).append(run)
    return found


def table(results: dict[str, Any]) -> str:
    """Each method at the rate with the lowest mean loss on the new text, as Markdown; `*` marks a rate at the edge.

    Means and standard deviations over seeds, and differences from full fine-tuning with 95% intervals (Student's t, paired).
    """
    texts = ("new", "pretraining")
    lines = ["| | learning rate | new text | difference from full | pretraining text | difference from full |"]
    lines += ["|---|" + "---:|" * 5, f"| (the base) | | | | {results['base']:.3f} | |"]
    baseline: dict[str, np.ndarray] = {}
    for name, rates in by_method(results).items():
        rate, seeds = min(rates.items(), key=lambda item: np.mean([run["new"] for run in item[1]]))
        ordered = sorted(seeds, key=lambda run: run["values"]["seed"])
        losses = {text: np.array([run[text] for run in ordered]) for text in texts}
        baseline = losses if name == "full" else baseline
        cells = [f"{rate:g}{'*' * (rate in (min(rates), max(rates)))}"]
        for text, values in losses.items():
            difference = "" if name == "full" else interval(values - baseline[text])
            cells += [f"{values.mean():.3f} ± {values.std(ddof=1):.3f}", difference]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any]) -> None:
    """What is learned against what is forgotten: one dot for each run, larger for higher learning rates.

    Runs that learn much less than the worst group at its best are cut off.
    """
    methods = by_method(results)
    worst = max(min(run["new"] for seeds in rates.values() for run in seeds) for rates in methods.values())
    with plot(HERE / "losses.png") as axes:
        for color, (name, rates) in zip(COLORS, methods.items(), strict=False):
            runs = [run for seeds in rates.values() for run in seeds]
            sizes = [8 + 12 * index for index, seeds in enumerate(rates.values()) for _ in seeds]
            losses = ([run["new"] for run in runs], [run["pretraining"] for run in runs])
            axes.scatter(*losses, s=sizes, color=color, label=name, linewidths=0, alpha=0.7)
        axes.axhline(results["base"], color="gray", linewidth=0.8, linestyle="--", label="before training")
        axes.set_xlim(right=1.3 * worst)
        axes.set(xlabel="Loss on the new text (nats per character)", ylabel="Loss on the pretraining text")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the runs of a sweep on the pretraining text.")
    parser.add_argument("workdir", type=Path, help="Workdir of the sweep")
    parser.add_argument("--text", required=True, help="File of records with the pretraining text in the field text")
    options = parser.parse_args()
    entries = json.loads((options.workdir / "sweep.json").read_text())
    runs = by_values(run for run in entries if "failed" not in run)
    results = evaluate(runs, options.workdir, options.text)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "table.md").write_text(table(results))
    picture(results)


if __name__ == "__main__":
    main()
