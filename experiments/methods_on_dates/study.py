"""Every method on the same data in the same number of steps, with several learning rates and three seeds:

    PYTHONPATH=. python experiments/methods_on_dates/study.py --workdir=DIR

While the lowest or the highest rate is the best one, the next rate is tried too. Writes results.json, table.md and methods.png
beside this file. Methods that are in results.json are not trained again.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.methods_on_dates.config import METHODS, SEEDS, get_config
from experiments.methods_on_dates.picture import draw, losses
from experiments.rates import best_rate, more_rates
from experiments.report import versions
from peftjax.adapters.attach import attach_unchecked
from peftjax.core.files import write_atomically
from peftjax.io.hf_config import read_fields
from peftjax.io.hf_files import find_model
from peftjax.io.load import load_model
from peftjax.log import METRICS, read_metrics
from peftjax.methods import make_config
from peftjax.models.base import Model
from peftjax.plan import devices
from peftjax.plan.worker import ask
from peftjax.sweep import sweep
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.jaxpr_cost import matmul_flops
from peftjax.training.member import Member

HERE = Path(__file__).parent
SCORES = ("eval_loss", "token_accuracy")


def config_of(name: str, rate: float, seed: int) -> Config:
    """The config of a run; name: a key of `METHODS`."""
    options = dict(METHODS[name][0])
    changes = {
        "method": make_config(options.pop("name"), **options).to_dict(),
        "optim.learning_rate": rate,
        "seed": seed,
    }
    return configs.changed(configs.validate(get_config()), changes)


def train(name: str, workdir: Path) -> dict[float, list[dict[str, float]]]:
    """The scores of each seed by learning rate."""
    rates: list[float] = list(METHODS[name][1])
    runs: list[Member] = []
    scores: dict[float, list[dict[str, float]]] = {}
    while rates:
        for rate in rates:
            for seed in SEEDS:
                values = {"optim.learning_rate": rate, "seed": seed}
                folder = workdir / f"learning_rate={rate:g},seed={seed}"
                runs.append(Member(values, config_of(name, rate, seed), folder))
        entries = sorted(sweep(runs, workdir, most=1), key=lambda entry: entry["values"]["seed"])
        for rate in rates:
            scores[rate] = [entry["scores"] for entry in entries if entry["values"]["optim.learning_rate"] == rate]
        rates = more_rates(mean_losses(scores), lower=True)
    return scores


def mean_losses(scores: dict[float, list[dict[str, float]]]) -> dict[float, float]:
    """The held-out loss of each rate, the mean over seeds; infinite if one of them failed."""
    return {rate: statistics.mean(seed.get("eval_loss", math.inf) for seed in seeds) for rate, seeds in scores.items()}


def costs(name: str, base: Model) -> dict[str, Any]:
    """The size of a method, and the matrix products of a train step, and of inference relative to the base."""
    config, fields = config_of(name, 1e-3, 0), read_fields(find_model("embedded"))[0]
    plan = ask(config, fields, devices.find("cpu"))
    model = attach_unchecked(nnx.clone(base), config.method, "default", rngs=nnx.Rngs(0))
    return {
        "trained": plan.trained_parameters,
        "share": plan.trained_parameters / plan.base_parameters,
        "file_bytes": plan.adapter_bytes,
        "inference_flops": products(model) / products(base),
        "step_flops": plan.flops,
    }


def products(model: Model) -> int:
    """The floating-point operations of all matrix products of one forward pass."""
    config = get_config()
    tokens = jnp.zeros((config.train.batch_size, config.data.max_length), int)
    return matmul_flops(jax.make_jaxpr(lambda tokens: model(tokens))(tokens).jaxpr)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, the best first."""
    lora = results["methods"]["lora"]["step_flops"]
    lines = [
        "| method | trained | of the base | file | step | inference | best rate | held-out loss | token accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| (the base alone) | | | | | 1.00 | | {results['base_loss']:.3f} | {results['base_accuracy']:.1%} |",
    ]
    for name, one in sorted(results["methods"].items(), key=lambda item: statistics.mean(losses(item[1]))):
        size = f"{one['file_bytes'] / 1024:.0f} KiB" if one["file_bytes"] else "the model"
        accuracies = [seed["token_accuracy"] for seed in one["scores"][one["rate"]]]
        lines.append(
            f"| {name} | {one['trained']:,} | {one['share']:.2%} | {size} | {one['step_flops'] / lora:.2f} | "
            f"{one['inference_flops']:.2f} | {float(one['rate']):g} | {statistics.mean(losses(one)):.3f} ± "
            f"{statistics.stdev(losses(one)):.3f} | {statistics.mean(accuracies):.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train every method on the same data.")
    parser.add_argument("--workdir", required=True, type=Path, help="Folder for the runs")
    workdir = parser.parse_args().workdir
    file, base = HERE / "results.json", load_model(find_model("embedded"))
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"methods": {}}
    for name in METHODS:
        if name in found["methods"]:
            continue
        scores = train(name, workdir / name)
        best = best_rate(mean_losses(scores), lower=True)
        by_rate = {
            f"{rate:g}": [{key: seed[key] for key in SCORES if key in seed} for seed in scores[rate]]
            for rate in sorted(scores)
        }
        found["methods"][name] = costs(name, base) | {"rate": f"{best:g}", "scores": by_rate}
        if name == "lora":  # whose initial update is zero
            (folder, *_) = (workdir / name).glob("*/")
            before = next(line for line in read_metrics(folder / METRICS) if line["kind"] == "eval")
            found |= {"base_loss": before["eval_loss"], "base_accuracy": before["token_accuracy"]}
        found["versions"] = versions()
        write_atomically(file, json.dumps(found, indent=1) + "\n")
    (HERE / "table.md").write_text(table(found))
    draw(found)


if __name__ == "__main__":
    main()
