"""The time of one step of several runs trained together by `peftjax sweep`, relative to separate steps.

    PYTHONPATH=. JAX_PLATFORMS=cpu python benchmarks/sweep.py [--width=1024] [--batch=4] [--runs 2 4 8] [--dense | --full]

A random Llama of 4 layers with NF4 kernels, rank-4 LoRAs on all linear layers, packed sequences of 64 tokens. With --dense, the
kernels are float32; --full trains all of them. A separate step is a population of one. Times are medians over rounds in which
all populations take turns.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from train_step import model_directory

from peftjax import sharding
from peftjax.io.hf_files import find_model
from peftjax.training import sweep_members
from peftjax.training.population import Population
from peftjax.training.united import unite_runs

ROUNDS = 7


def sizes(width: int) -> dict[str, Any]:
    """The fields of the bundled model's config.json, with other widths."""
    bundled: dict[str, Any] = json.loads((find_model("embedded") / "config.json").read_text())
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    return bundled | heads | {"hidden_size": width, "intermediate_size": 11 * width // 4}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=int, nargs="+", default=[2, 4, 8], help="Sizes of the populations")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--dense", action="store_true", help="LoRA on a float32 base instead of an NF4 base")
    kinds.add_argument("--full", action="store_true", help="Full fine-tuning in float32")
    options = parser.parse_args()
    counts = [1, *options.runs]
    name = "runs" if options.full else "LoRAs"
    method = {"method.name": "full"} if options.full else {} if options.dense else {"model.quantize": "nf4"}
    with contextlib.ExitStack() as opened:
        root = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        fields = {
            "model.path": model_directory(root / "model", sizes(options.width)),
            "model.init": "random",
            "train.batch_size": options.batch,
            **method,
        }
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        rates = ",".join(f"{rate}e-3" for rate in range(1, max(counts) + 1))
        swept = [f"--sweep.optim.learning_rate={rates}"]
        mesh = sharding.make_mesh()
        opened.enter_context(jax.set_mesh(mesh))
        together = {}
        for count in counts:
            members = sweep_members.members("configs/quickstart.py", overrides, swept, root / str(count))[:count]
            (united,) = unite_runs(members, mesh)
            together[count] = Population(united, count, None, lambda: None)
            opened.enter_context(together[count].start())
            together[count].advance()  # compiles
        seconds: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(ROUNDS):
            for count, population in together.items():
                jax.block_until_ready([one.state for one in population.live])
                started = time.perf_counter()
                population.advance()
                jax.block_until_ready([one.state for one in population.live])
                seconds[count].append(time.perf_counter() - started)
    print(f"{jax.devices()[0].device_kind}: width {options.width}, {options.batch} x 64 tokens each")
    for count in options.runs:
        ratio = statistics.median(many / one for many, one in zip(seconds[count], seconds[1], strict=True)) / count
        print(f"one step of {count} {name} together takes {ratio:.2f} of the time of {count} separate steps")


if __name__ == "__main__":
    main()
