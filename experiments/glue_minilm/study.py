"""Eight methods on four GLUE tasks with a small encoder:

    PYTHONPATH=. python experiments/glue_minilm/study.py --model=DIR --data=DIR [--task=cola] [--method=lora]

Each run is one of `peftjax train` with configs/glue_roberta_lora.py:TASK and the few changes of `run_config`.
The rate of a method is the one of its `RATES` that is best on the validation file; the result is that run's score on the
test file. Writes results.json, table.md and methods.png beside this file. Runs that are in results.json are skipped, so
the script can be stopped at any time and started again.

--model is a Hugging Face directory of an encoder, or a hub id; --data has the files TASK/{train,validation,test}.jsonl.gz.
"""

import argparse
import gzip
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from flax import nnx

from peftjax import adapters, sharding
from peftjax.core import variables
from peftjax.io.hf_files import resolve
from peftjax.methods import make_config
from peftjax.tasks import make_task
from peftjax.tasks import metrics as scores
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.setup import attach_method, open_data
from peftjax.training.split import split
from peftjax.training.step import init_state, make_train_step
from peftjax.training.trained import load_trained, open_task, result_of
from peftjax.training.trained import measure as measure_on

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "glue_roberta_lora.py"
# {task: (template of the text, length that covers nearly all texts, steps, score)}
TASKS = {
    "cola": ("{text}", 24, 1000, "matthews"),
    "sst2": ("{text}", 40, 400, "accuracy"),
    "mrpc": ("{sentence1}", 80, 230, "accuracy"),
    "rte": ("{sentence1}", 112, 156, "accuracy"),
}
BATCH = 16
# The options of each method, chosen for adapters of similar size, not tuned.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 8, "alpha": 16.0, "targets": "all-linear"},
    "houlsby": {"reduction_factor": 16},
    "pfeiffer": {"reduction_factor": 16},
    "prefix": {"tokens": 16},
    "prompt": {"tokens": 16},
    "ia3": {},
    "bitfit": {},
}
RATES = {"full": (5e-5, 2e-4), "prefix": (5e-3, 2e-2), "prompt": (5e-3, 2e-2), "ia3": (5e-3, 2e-2)}
OTHER_RATES = (1e-3, 5e-3)


def run_config(options: argparse.Namespace, task: str, method: str, rate: float) -> Config:
    """The config of one run."""
    template, length, steps, _ = TASKS[task]
    return configs.changed(
        configs.load(f"{CONFIG}:{task}"),
        {
            "method": make_config(method, **METHODS[method]).to_dict(),
            "model.path": options.model,
            "data.train": (f"{options.data}/{task}/train.jsonl.gz",),
            "data.eval": (f"{options.data}/{task}/validation.jsonl.gz",),
            "data.prompt_template": template,
            "data.max_length": length,
            "train.batch_size": BATCH,
            "train.steps": steps,
            "train.eval_every": 0,
            "optim.learning_rate": rate,
            "optim.warmup_steps": steps // 16,
            "checkpoint.every": steps,
        },
    )


def held_out(config: Config, workdir: Path, options: argparse.Namespace, task: str) -> dict[str, float]:
    """The test scores of a run's model."""
    config = configs.changed(config, {"data.eval": (f"{options.data}/{task}/test.jsonl.gz",)})
    mesh = sharding.make_mesh(config.mesh.sizes)
    made = open_task(config)
    model = load_trained(config, made, result_of(config, workdir), mesh)
    with jax.set_mesh(mesh):
        return measure_on(config, model, made, mesh)


def sizes(config: Config) -> dict[str, float]:
    """The number of trainable parameters without the head, and their fraction of the encoder's."""
    task, mesh = make_task(config.task, config.data, resolve(config.model.path)), sharding.make_mesh(config.mesh.sizes)
    model, method = task.load_model(config.model, task.directory, mesh, config.seed), config.method
    encoder = sum(
        leaf.get_value().size
        for path, leaf in variables.flat(model)[1].items()
        if isinstance(leaf, nnx.Param) and not path.startswith("classifier")
    )
    if method.trains is nnx.Param:
        return {"trained": encoder, "share": 1.0}
    adapters.attach(model, method, rngs=nnx.Rngs(0))
    count = sum(
        leaf.get_value().size
        for path, leaf in variables.flat(model)[1].items()
        if isinstance(leaf, method.trains) and not path.startswith("classifier")
    )
    return {"trained": count, "share": count / encoder}


def measure(options: argparse.Namespace, task: str, method: str, rate: float) -> dict[str, Any]:
    """Train once; the scores on both files."""
    config, workdir = run_config(options, task, method, rate), Path(tempfile.mkdtemp())
    validation = train(config, workdir).scores
    result = {"rate": rate, "validation": validation, "test": held_out(config, workdir, options, task)}
    shutil.rmtree(workdir)
    return result


def step_times(options: argparse.Namespace, task: str = "mrpc", rounds: int = 5, steps: int = 4) -> dict[str, float]:
    """The time of a training step of each method, relative to full fine-tuning: the median over rounds in which all methods
    take turns, so that other load on the machine affects all of them."""
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        prepared: dict[str, list[Any]] = {}
        for method in METHODS:
            config = run_config(options, task, method, 1e-3)
            made, batches = open_data(config, mesh)
            model = made.load_model(config.model, made.directory, mesh, config.seed)
            objective, tx, trainable, frozen = split(config, made, model, attach_method(config, made, model, mesh))
            state = init_state(trainable, tx, config.seed)
            batch = sharding.shard_batch(next(batches).arrays, mesh)
            train_step = make_train_step(objective, tx, state)
            state, _ = train_step(state, frozen, batch)  # compiles
            prepared[method] = [frozen, train_step, state, batch]
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method, (frozen, train_step, state, batch) in prepared.items():
                jax.block_until_ready(state)
                started = time.perf_counter()
                for _ in range(steps):
                    state, _ = train_step(state, frozen, batch)
                jax.block_until_ready(state)
                seconds[method].append(time.perf_counter() - started)
                prepared[method][2] = state
    return {
        method: statistics.median(one / full for one, full in zip(own, seconds["full"], strict=True))
        for method, own in seconds.items()
    }


def best_of(runs: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """The run with the best score on the validation file."""
    return max(runs, key=lambda run: run["validation"][TASKS[task][3]])


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = " | ".join(f"{task}, {measure}" for task, (_, _, _, measure) in TASKS.items())
    lines = [
        f"| method | trained | of the encoder | step, of full | {head} |",
        "|---|---:|---:|---:|" + "---:|" * len(TASKS),
    ]
    baseline = " | ".join(f"{100 * results['majority'][task][TASKS[task][3]]:.1f}" for task in TASKS)
    for method, size in results["sizes"].items():
        cells = []
        for task, (_, _, _, name) in TASKS.items():
            runs = results["runs"].get(f"{task}/{method}", {})
            if len(runs) < len(RATES.get(method, OTHER_RATES)):
                cells.append("")
                continue
            best = best_of(list(runs.values()), task)
            cells.append(f"{100 * best['test'][name]:.1f} ({best['rate']:g})")
        time_ = f"{results['step_times'][method]:.2f}" if "step_times" in results else ""
        lines.append(f"| {method} | {size['trained']:,} | {size['share']:.2%} | {time_} | {' | '.join(cells)} |")
    lines.append(f"| (the more frequent class) | | | | {baseline} |")
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any]) -> None:
    """One panel per task, one row per method."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(TASKS), figsize=(12, 3.6), layout="constrained", sharey=True)
    for axes, (task, (_, _, _, name)) in zip(panels, TASKS.items(), strict=True):
        for row, method in enumerate(METHODS):
            runs = results["runs"].get(f"{task}/{method}", {})
            if runs:
                axes.plot(100 * best_of(list(runs.values()), task)["test"][name], row, "o", color="tab:blue")
        axes.axvline(100 * results["majority"][task][name], color="gray", linestyle=":")
        axes.set(
            title=task,
            xlabel=f"{name}, %",
            yticks=range(len(METHODS)),
            yticklabels=METHODS,
            ylim=(len(METHODS) - 0.5, -0.5),
        )
        axes.grid(axis="x", color="lightgray", linewidth=0.5)
    figure.suptitle("Test scores of MiniLM-L6; dotted: always the more frequent class", fontsize=10)
    figure.savefig(HERE / "methods.png", dpi=110)


def majority(options: argparse.Namespace, task: str) -> dict[str, float]:
    """The scores on the test file of a model that always predicts its more frequent class."""
    with gzip.open(f"{options.data}/{task}/test.jsonl.gz") as lines:
        labels = np.array([json.loads(line)["label"] for line in lines])
    said = np.full(len(labels), np.bincount(labels).argmax())
    return scores.classification(np.eye(2)[said], labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train eight methods on four GLUE tasks.")
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub id of an encoder")
    parser.add_argument("--data", required=True, help="Folder with TASK/{train,validation,test}.jsonl.gz")
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="Only this task; may be repeated")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="Only this method; may be repeated")
    parser.add_argument("--times", action="store_true", help="Also measure the time of a step, on an idle machine")
    options = parser.parse_args()

    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"runs": {}}

    def save() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n")

    for task in options.task or TASKS:
        for method in options.method or METHODS:
            for rate in RATES.get(method, OTHER_RATES):
                runs = results["runs"].setdefault(f"{task}/{method}", {})
                if str(rate) not in runs:
                    print(f"--- {task}, {method}, {rate:g}", flush=True)
                    runs[str(rate)] = measure(options, task, method, rate)
                    save()
    results["sizes"] = {method: sizes(run_config(options, "mrpc", method, 1e-3)) for method in METHODS}
    results["majority"] = {task: majority(options, task) for task in TASKS}
    results |= {
        "batch_size": BATCH,
        "steps": {task: steps for task, (_, _, steps, _) in TASKS.items()},
        "jax": jax.__version__,
    }
    if options.times:
        results["step_times"] = step_times(options)
    save()
    (HERE / "table.md").write_text(table(results))
    picture(results)


if __name__ == "__main__":
    main()
