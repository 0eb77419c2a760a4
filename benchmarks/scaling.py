"""How the time of a train step grows, and the share of the training loop spent waiting for data.

    python benchmarks/scaling.py [length batch rank layers runs input] [--shape=15m] [--results=DIR]

Rank-16 LoRA on all linear layers of a random Llama in float32, 4 x 128 tokens. Each study changes one number and measures the
steps in turns. The exponent is the slope of a line through the logarithms of the number and the median time: 1 means
proportional, 0 means independent. "runs" is the number of LoRAs that a sweep trains together. "input" runs the loop of `peftjax
train` and measures how long it waits for batches of tokenized texts. Prints the results, and with --results writes
scaling.json and scaling.svg.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from train_step import PopulationStep, Step, model_directory

import peftjax
from peftjax import sharding
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.setup import open_data

sys.path.append(str(Path(__file__).resolve().parent / "against_peft"))

from cells import RANK, SHAPES

ROUNDS, STEPS = 5, 3
STUDIES = {
    "length": (64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16),
    "rank": (4, 16, 64, 256),
    "layers": (2, 4, 8, 16),
    "runs": (1, 2, 4, 8),
}


def make_config(root: Path, shape: str, study: str = "", value: int = 0) -> Config:
    """The config of a step, with one number of a study."""
    given = {"length": 128, "batch": 4, "rank": RANK, "layers": SHAPES[shape]["num_hidden_layers"]}
    given |= {study: value} if study else {}
    directory = root / f"{shape}-{given['layers']}"
    if not directory.exists():
        model_directory(directory, SHAPES[shape] | {"num_hidden_layers": given["layers"]})
    fields = {
        "model.path": str(directory), "model.init": "random", "model.dtype": "float32", "data.max_length": given["length"],
        "train.batch_size": given["batch"], "method.rank": given["rank"], "method.targets": "all-linear",
    }  # fmt: skip
    return configs.changed(Config(method=peftjax.Lora()), fields)


def grow(root: Path, shape: str, study: str, rounds: int) -> dict[int, float]:
    """The median time of a step by the number that a study changes."""
    steps: dict[int, Step] = {}
    for value in STUDIES[study]:
        config = make_config(root, shape, study, value)
        steps[value] = PopulationStep(config, value) if study == "runs" else Step(config)
        steps[value].run(2)  # compiles
    seconds: dict[int, list[float]] = {value: [] for value in steps}
    for _ in range(rounds):
        for value, step in steps.items():
            started = time.perf_counter()
            step.run(STEPS)
            seconds[value].append((time.perf_counter() - started) / STEPS)
    return {value: statistics.median(found) for value, found in seconds.items()}


def exponent(times: dict[int, float]) -> float:
    """The slope of log(time) over log(number)."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def waiting(root: Path, shape: str, count: int) -> float:
    """The share of the train loop's time that it spends on taking batches and moving them to the device."""
    words, file = random.Random(0), root / "texts.jsonl"
    texts = (" ".join(words.choices(("one", "two", "three", "four", "March", "1999"), k=200)) for _ in range(2000))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = configs.changed(make_config(root, shape), {"data.train": (str(file),), "data.format": "text"})
    step = Step(config)
    step.run()  # compiles
    mesh = sharding.make_mesh()
    _, data = open_data(config, mesh)
    waited, started = 0.0, time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        step.batch = sharding.shard_batch(next(data).arrays, mesh, config.train.accumulate)
        waited += time.perf_counter() - asked
        step.run()
    return waited / (time.perf_counter() - started)


def plot(found: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot, ticker

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "peftjax"  # the same results give the same file
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(2.4 * len(found), 2.8), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (study, times) in zip(axes[0], found.items(), strict=True):
        axis.loglog(list(times), list(times.values()), "o-")
        axis.set_title(f"{study}: exponent {exponent(times):.2f}", fontsize=9)
        axis.set_xlabel(study)
        axis.set_xticks(list(times), [str(value) for value in times])
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(color="lightgray", linewidth=0.5)
    axes[0][0].set_ylabel("seconds per step")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    everything = [*STUDIES, "input"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help=f"Of {', '.join(everything)}; default: all")
    parser.add_argument("--shape", choices=SHAPES, default="15m", help="Shape of the model")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Number of turns of each step")
    parser.add_argument("--results", type=Path, metavar="DIR", help="Directory for scaling.json and scaling.svg")
    options = parser.parse_args()
    chosen = options.studies or everything
    if unknown := set(chosen) - set(everything):
        parser.error(f"unknown study {', '.join(sorted(unknown))}; choose from {', '.join(everything)}")
    found: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for study in (name for name in STUDIES if name in chosen):
            found[study] = times = grow(Path(folder), options.shape, study, options.rounds)
            milliseconds = ", ".join(f"{value}: {1e3 * seconds:.3g}" for value, seconds in times.items())
            print(f"{study}: exponent {exponent(times):.2f}; ms per step by {study}: {milliseconds}", flush=True)
        if "input" in chosen:
            share = waiting(Path(folder), options.shape, options.rounds * 2 * STEPS)
            print(f"input: {share:.1%} of the loop's time with the shape {options.shape}", flush=True)
    if options.results and found:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(found, options.results / "scaling.svg")


if __name__ == "__main__":
    main()
