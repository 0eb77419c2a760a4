"""Train and score what the table shows; one command, which resumes where it was interrupted:

    PYTHONPATH=. python experiments/peft_table/study.py --encoder=DIR --decoder=DIR --data=DIR --workdir=DIR \\
        [--task=sst2] [--method=lora]

For each task and method, a sweep trains one run per learning rate with seed 0. While the lowest or the highest rate is the best
one, the next rate is tried too. The rate with the best validation score (for E2E, the lowest validation loss) is trained again
with every seed. If another rate has a better score than the mean over these seeds, it is trained with every seed as well, and so
on. The rate with the best mean counts, and each epoch of its runs is scored on the test file. The result of each seed is kept in
the workdir until its task and method are finished, which then are one file, results/TASK-METHOD.json. Neither is trained again.
table.py makes the table from these files.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.peft_table.setting import (
    METHODS,
    RATES,
    TASKS,
    columns,
    make_config_of,
    methods_of,
    overlaps,
    prepare,
    references_of,
)
from experiments.rates import best_rate, more_rates
from peftjax import sharding
from peftjax.core import variables
from peftjax.core.files import write_atomically
from peftjax.core.progress import Progress
from peftjax.data.batches import HeldOut
from peftjax.data.records import Prompt
from peftjax.models.base import Model
from peftjax.sweep import sweep
from peftjax.train import train
from peftjax.training import answers
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.evaluation import EvalStep, evaluate, make_eval_step
from peftjax.training.hooks import Hooks
from peftjax.training.member import Member
from peftjax.training.setup import batching
from peftjax.training.trained import open_task

RESULTS = Path(__file__).parent / "results"
NEW_TOKENS = 96
PACKAGES = ("jax", "flax", "optax", "sacrebleu", "rouge-score")

Scorer = Callable[[Model], tuple[dict[str, float], Any]]  # the test scores, and what the bootstrap resamples


def study(task: str, method: str, models: Mapping[str, str], data: Path, workdir: Path) -> dict[str, Any]:
    """Find the best learning rate of a method on a task, and score each seed with it.

    Returns:
        The content of the result file: the validation score of each rate with seed 0, the means over all seeds of the rates that
        were trained with all, the best rate, and the scores of each of its seeds.
    """
    setting = TASKS[task]
    model = models["decoder" if setting.generates else "encoder"]

    def config_of(rate: float, seed: int) -> Config:
        return make_config_of(task, method, rate, seed, model, data)

    measure, began = "eval_loss" if setting.generates else setting.score, time.process_time()
    validation = search(RATES[method], partial(config_of, seed=0), measure, workdir, lower=setting.generates)
    seconds = time.process_time() - began
    score = make_scorer(task, config_of(RATES[method][0], 0), data)
    runs: dict[float, dict[int, Any]] = {}
    means: dict[float, float] = {}  # validation scores over all seeds
    while (best := best_rate(validation | means, lower=setting.generates)) not in means:
        runs[best] = {
            seed: run_seed_once(config_of(best, seed), workdir / f"learning_rate={best:g},seed={seed}", score, measure)
            for seed in range(setting.seeds)
        }
        means[best] = statistics.mean(run["epochs"][-1]["validation"] for run in runs[best].values())
        seconds += sum(run["cpu_seconds"] for run in runs[best].values())
    return {
        "task": task,
        "method": method,
        "validation": validation,
        "means": means,
        "rate": best,
        "seeds": runs[best],
        "cpu_seconds": seconds,
        "versions": {name: version(name) for name in PACKAGES},
    }


def search(
    rates: Sequence[float], config_of: Callable[[float], Config], measure: str, workdir: Path, *, lower: bool
) -> dict[float, float]:
    """Validation scores by learning rate. The range is extended until the best rate lies inside it."""
    validation: dict[float, float] = {}
    runs: list[Member] = []
    while rates:
        runs += [
            Member({"optim.learning_rate": rate}, config_of(rate), workdir / f"learning_rate={rate:g}")
            for rate in rates
        ]
        found = {entry["values"]["optim.learning_rate"]: entry["scores"] for entry in sweep(runs, workdir)}
        validation |= {rate: found[rate].get(measure, math.nan) for rate in rates}
        rates = more_rates(validation, lower=lower)
    return validation


def run_seed_once(config: Config, workdir: Path, score: Scorer, measure: str) -> dict[str, Any]:
    """The result of `run_seed` and its processor time. It is saved beside the workdir, and read if it is already there."""
    file = workdir.with_name(f"{workdir.name}.json")
    if not file.exists():
        began = time.process_time()
        found = run_seed(config, workdir, score, measure)
        found["cpu_seconds"] = time.process_time() - began
        write_atomically(file, json.dumps(found) + "\n")
    return json.loads(file.read_text())


def run_seed(config: Config, workdir: Path, score: Scorer, measure: str) -> dict[str, Any]:
    """Train once. Returns the validation and test scores of each epoch, and the predictions after the last one."""
    tests: dict[int, dict[str, float]] = {}
    validation: dict[int, float] = {}
    last: Any = None

    def on_evaluate(model: Model, step: int) -> dict[str, float]:
        nonlocal last
        if step:
            tests[step], last = score(model)
        return {}

    def on_metrics(line: Mapping[str, Any]) -> None:
        if measure in line and line["step"]:
            validation[line["step"]] = line[measure]

    shutil.rmtree(workdir, ignore_errors=True)  # an interrupted run is short; the scores of its epochs are lost
    train(config, workdir, Hooks(on_evaluate=on_evaluate, on_metrics=on_metrics))
    shutil.rmtree(workdir)
    epochs = [{"validation": validation[step], **tests[step]} for step in sorted(tests)]
    return {"epochs": epochs, "predictions": last}


def make_scorer(task: str, config: Config, data: Path) -> Scorer:
    """The function that scores a model on the test file."""
    config = configs.changed(config, {"data.eval": (str(data / task / "test.jsonl"),)})
    return generation_scorer(config, data / task) if TASKS[task].generates else class_scorer(config)


def class_scorer(config: Config) -> Scorer:
    """Scores the predicted classes, and returns a hexadecimal number whose bits tell which are right."""
    made, mesh = open_task(config), sharding.make_mesh(config.mesh.sizes)
    steps: list[EvalStep] = []  # made with the first model

    def score(model: Model) -> tuple[dict[str, float], str]:
        graph, found = variables.flat(model)
        if not steps:
            steps.append(make_eval_step(graph, made, mesh))
        values = {path: variable.get_value() for path, variable in found.items()}
        batches = HeldOut(config.data, made).batches(batching(config, mesh))
        outcome = evaluate(steps[0], made, {}, values, batches, mesh)
        logits, labels = outcome.logits, outcome.labels
        assert logits is not None
        right = logits.argmax(-1) == labels
        return outcome.scores, np.packbits(right).tobytes().hex()

    return score


def generation_scorer(config: Config, folder: Path) -> Scorer:
    """Scores greedy answers with BLEU (sacrebleu) and ROUGE-L (the best of the references), and returns the answers."""
    import sacrebleu

    made = open_task(config)
    references = references_of(folder / "test.jsonl")
    prompts: dict[str, Prompt] = {}
    for prompt in HeldOut(config.data, made).prompts(sum(map(len, references.values()))):
        prompts.setdefault(prompt.prompt, prompt)

    def score(model: Model) -> tuple[dict[str, float], list[str]]:
        found = answers.answer(model, list(prompts.values()), made.tokenizer, NEW_TOKENS, Progress(enabled=False))
        texts = [one.answer.strip() for one in found]
        bleu = sacrebleu.corpus_bleu(texts, columns(references)).score
        return {"bleu": float(bleu), "rouge_l": float(np.mean(overlaps(texts, references.values())))}, texts

    return score


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Train and score PEFT methods on several tasks.")
    parser.add_argument("--encoder", help="Hugging Face directory of the encoder, MiniLM-L6")
    parser.add_argument("--decoder", help="Hugging Face directory of the decoder, SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, type=Path, help="Folder with FOLDER/{train,validation,test}.jsonl.gz")
    parser.add_argument("--workdir", required=True, type=Path, help="Folder for unfinished runs and compiled programs")
    parser.add_argument("--task", choices=tuple(TASKS), action="append", help="Only this task; may be repeated")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="Only this method; may be repeated")
    options = parser.parse_args(argv)
    jax.config.update("jax_compilation_cache_dir", str(options.workdir / "programs"))
    models = {"encoder": options.encoder, "decoder": options.decoder}
    for task in options.task or TASKS:
        if models["decoder" if TASKS[task].generates else "encoder"] is None:
            continue
        prepare(task, options.data, options.workdir / "data")
        for method in options.method or methods_of(task):
            file = RESULTS / f"{task}-{method}.json"
            if file.exists() or method not in methods_of(task):
                continue
            print(f"--- {task}, {method}", flush=True)
            workdir = options.workdir / f"{task}-{method}"
            found = study(task, method, models, options.workdir / "data", workdir)
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, json.dumps(found, indent=1) + "\n")
            shutil.rmtree(workdir)


if __name__ == "__main__":
    main(sys.argv[1:])
