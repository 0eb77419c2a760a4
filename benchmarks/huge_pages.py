"""The time of a train step on a CPU with huge pages, relative to pages of 4 KiB, and how many pages a step maps.

    PYTHONPATH=. JAX_PLATFORMS=cpu python benchmarks/huge_pages.py [--rounds=3]

A random Llama with 110M parameters in float32; full fine-tuning and rank-16 LoRAs on all linear layers; 1 x 64 and 4 x 128
tokens. Each measurement is a process that takes ten steps after the first two. Processes with and without huge pages take turns;
the ratio is between the medians of their steps, the median over the rounds.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train_step import Step, model_directory

import peftjax
from peftjax.core.huge_pages import VALUE, VARIABLE, opt_in
from peftjax.training import config as configs

sys.path.append(str(Path(__file__).resolve().parent / "against_peft"))

from cells import RANK, SHAPES

STEPS = 10


def measure(directory: str, method: str, rows: int, length: int) -> tuple[float, float]:
    """The median seconds of a step, and the mean number of page faults, in this process."""
    fields = {
        "model.path": directory, "model.init": "random", "model.dtype": "float32", "model.param_dtype": "float32",
        "train.batch_size": rows, "data.max_length": length,
    }  # fmt: skip
    chosen = peftjax.Full() if method == "full" else peftjax.Lora(rank=RANK, targets="all-linear")
    step = Step(configs.changed(configs.Config(method=chosen), fields))
    step.run(2)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(STEPS):
        started = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / STEPS


def start(setting: str, *arguments: object) -> tuple[float, float]:
    """`measure` in a process with a value of GLIBC_TUNABLES."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    output = subprocess.run(
        command, env=os.environ | {VARIABLE: setting}, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds, faults = json.loads(output.stdout.splitlines()[-1])
    return seconds, faults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if not opt_in():
        sys.exit("huge pages are not opt-in on this machine (transparent_hugepage/enabled is not madvise)")
    with tempfile.TemporaryDirectory() as root:
        directory = model_directory(Path(root) / "model", SHAPES["110m"])
        for method in ("full", "lora"):
            for rows, length in ((1, 64), (4, 128)):
                cell = directory, method, rows, length
                found = [(*start("", *cell), *start(VALUE, *cell)) for _ in range(rounds)]
                ratio = statistics.median(small / huge for small, _, huge, _ in found)
                faults = [statistics.median(line[column] for line in found) for column in (1, 3)]
                print(
                    f"{method}, {rows} x {length} tokens: {ratio:.2f} times as fast with huge pages; page faults per step: "
                    f"{faults[0]:,.0f} and {faults[1]:,.0f}"
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
    else:
        main()
