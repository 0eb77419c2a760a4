"""Sizes, training memory, step times and inference latencies of the methods, measured on an otherwise idle machine:

    PYTHONPATH=. python experiments/peft_table/costs.py --encoder=DIR --decoder=DIR --data=DIR --workdir=DIR

Writes costs.json; with one of the two models, only its figures are replaced. Peak memory is that of a process that loads the
model and makes four train steps. In each round, all methods take turns, so that what else the machine does falls on all alike.
Step times are medians over the rounds; a latency is the median, with the quartiles, of its ratios to the base in each round.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import peftjax
from experiments.peft_table.setting import RATES, make_config_of, methods_of, prepare
from experiments.peft_table.table import COSTS
from peftjax import adapters, sharding
from peftjax.core import variables
from peftjax.core.files import write_atomically
from peftjax.core.memory import peak_memory
from peftjax.decoding import generate_ids
from peftjax.io.adapter_tensors import adapter_tensors
from peftjax.models.base import Model
from peftjax.models.decoder import Decoder
from peftjax.training.config import Config
from peftjax.training.setup import attach_method, open_data
from peftjax.training.split import split
from peftjax.training.step import init_state, make_train_step

MODELS = {"encoder": "mrpc", "decoder": "e2e"}  # and the task whose batches are used
ROUNDS, STEPS = 5, 4
ANSWERS = 15  # rounds of inference
PROMPT, NEW_TOKENS = 32, 32
TEXTS = 16  # of one call of an encoder


class Prepared:
    """A model with a method, its train step and a batch.

    Attributes:
        base: Number of parameters of the base model.
        model: The model with the method attached.
    """

    def __init__(self, config: Config) -> None:
        self.mesh = sharding.make_mesh()
        with jax.set_mesh(self.mesh):
            task, batches = open_data(config, self.mesh)
            self.model: Model = task.load_model(config.model, task.directory, self.mesh, config.seed)
            self.base = count_parameters(self.model)
            method = attach_method(config, task, self.model, self.mesh)
            objective, tx, trainable, self._frozen = split(config, task, self.model, method)
            self._state = init_state(trainable, tx, config.seed)
            with contextlib.closing(batches):
                self._batch = sharding.shard_batch(next(batches).arrays, self.mesh)
            self._train_step = make_train_step(objective, tx, self._state)

    def steps(self, count: int) -> None:
        """Run train steps to their end."""
        with jax.set_mesh(self.mesh):
            for _ in range(count):
                self._state, _ = self._train_step(self._state, self._frozen, self._batch)
            jax.block_until_ready(self._state)


def count_parameters(model: Model) -> int:
    """The number of parameters of the base; those of a quantized kernel are its codes."""
    found = variables.flat(model)[1].values()
    return sum(variable.get_value().size for variable in found if isinstance(variable, nnx.Param))


def size(prepared: Prepared, method: str) -> dict[str, Any]:
    """The trainable parameters, their share of the base, and the bytes of the file with the result."""
    if method == "full":
        return {"trainable": prepared.base, "share": 1.0, "file_bytes": 4 * prepared.base}
    count = adapters.count_trainable(prepared.model)
    tensors = adapter_tensors(prepared.model).values()
    return {"trainable": count, "share": count / prepared.base, "file_bytes": sum(leaf.nbytes for leaf in tensors)}


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The time in seconds of each function in each round, after one call that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def latencies(runs: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float, float]]:
    """The median and the quartiles of the ratios to the base, by method."""
    seconds = take_turns(runs, ANSWERS)
    found = {}
    for name, times in seconds.items():
        ratios = [one / base for one, base in zip(times, seconds["base"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        found[name] = (median, low, high)
    return found


def inference(model: Model) -> Callable[[], object]:
    """A function that answers one prompt (a decoder) or encodes 16 texts (an encoder) with the model as it is."""
    tokens = np.arange(5, 5 + PROMPT, dtype=np.int32)
    if isinstance(model, Decoder):
        return lambda: generate_ids(model, [tokens.tolist()], max_new_tokens=NEW_TOKENS)
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    return lambda: jax.block_until_ready(forward(state, np.tile(tokens, (TEXTS, 1))))


def peak_of_training(arguments: list[str], method: str) -> int:
    """The peak resident memory in bytes of a process that makes `STEPS` train steps."""
    command = [sys.executable, __file__, *arguments, method]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure(config_of: Callable[[str], Config], task: str, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """The costs of each method with one of the models; of the methods that can be merged, also the latency when merged."""
    methods = methods_of(task)
    prepared = {method: Prepared(config_of(method)) for method in methods}
    steps = take_turns({method: partial(one.steps, STEPS) for method, one in prepared.items()}, ROUNDS)
    base = peftjax.load_model(config_of("lora").model.path, dtype="float32")
    runs = {"base": inference(base)} | {method: inference(one.model) for method, one in prepared.items()}
    attached = latencies(runs)
    merged = {}
    for method in [name for name in ("lora", "dora", "ia3") if name in methods]:
        peftjax.merge(prepared[method].model)
        merged[method] = inference(prepared[method].model)
    merged_latencies = latencies({"base": runs["base"]} | merged)
    return {
        method: size(one, method)
        | {
            "peak_bytes": peak_of_training(arguments, method),
            "step_seconds": statistics.median(steps[method]) / STEPS,
            "latency": attached[method],
        }
        | ({"latency_merged": merged_latencies[method]} if method in merged else {})
        for method, one in prepared.items()
    }


def processor() -> str:
    """The name of the processor, or "" if the system does not tell."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure what the methods cost.")
    for name in MODELS:
        parser.add_argument(f"--{name}", help=f"Hugging Face directory of the {name}")
    parser.add_argument("--data", required=True, type=Path, help="Folder with FOLDER/{train,validation,test}.jsonl.gz")
    parser.add_argument("--workdir", required=True, type=Path, help="Folder for the prepared data")
    parser.add_argument(
        "--only", nargs=2, metavar=("MODEL", "METHOD"), help="Make the steps of one method, print its peak memory"
    )
    options = parser.parse_args(argv)

    def config_of(kind: str, method: str) -> Config:
        folder = options.workdir / "data"
        return make_config_of(MODELS[kind], method, RATES[method][1], 0, getattr(options, kind), folder)

    if options.only:
        Prepared(config_of(*options.only)).steps(STEPS)
        print(peak_memory())
        return
    found: dict[str, Any] = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    for kind, task in MODELS.items():
        if getattr(options, kind) is None:
            continue
        prepare(task, options.data, options.workdir / "data")
        arguments = [*argv, "--only", kind]
        methods = measure(partial(config_of, kind), task, arguments)
        versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
        found[kind] = {"methods": methods, "versions": versions, "processor": processor(), "cores": os.cpu_count()}
        write_atomically(COSTS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
