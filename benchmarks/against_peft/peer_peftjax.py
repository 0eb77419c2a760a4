"""peftjax's side of a cell: `python peer_peftjax.py CELL DIRECTORY`, started by run.py."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cells import BOTTLENECK, NEW, RANK, VIRTUAL, Cell
from child import Side, product_shape, serve
from flax import nnx
from train_step import PopulationStep, Step

import peftjax
from peftjax.core import variables
from peftjax.training import config as configs


def make(cell: Cell, directory: Path) -> Side:
    run = {"step": train, "decode": decode, "load": load}[cell.kind](cell, directory)
    names = ("jax", "jaxlib", "flax", "optax")
    return Side(run, product(cell), {"peftjax": peftjax.__version__} | {name: version(name) for name in names})


def make_method(cell: Cell) -> peftjax.Method:
    lora = peftjax.Lora(rank=RANK, alpha=2 * RANK, targets="all-linear")
    return {
        "lora": lora,
        "qlora": lora,
        "full": peftjax.Full(),
        "prompt": peftjax.PromptTuning(tokens=VIRTUAL),
        "prefix": peftjax.PrefixTuning(tokens=VIRTUAL),
        "houlsby": peftjax.Houlsby(reduction_factor=cell.sizes["hidden_size"] / BOTTLENECK),
    }[cell.method]


def train(cell: Cell, directory: Path) -> Callable[[int], float]:
    """The train step of `peftjax train`, or of several runs in `peftjax sweep`."""
    config = step_config(cell, directory)
    return PopulationStep(config, cell.runs).run if cell.runs > 1 else Step(config).run


def step_config(cell: Cell, directory: Path) -> configs.Config:
    """The config of a cell's train step; all other fields have their defaults."""
    fields = {
        "model.path": str(directory), "model.dtype": cell.dtype, "model.param_dtype": cell.dtype,
        "model.quantize": "nf4" if cell.quantized else "", "train.batch_size": cell.rows, "data.max_length": cell.length,
    }  # fmt: skip
    return configs.changed(configs.Config(method=make_method(cell)), fields)


def decode(cell: Cell, directory: Path) -> Callable[[int], float]:
    """Greedy answers of a model with a LoRA."""
    model = peftjax.load_model(directory, cell.dtype, quantize="nf4" if cell.quantized else None)
    peftjax.attach(model, peftjax.Lora(rank=RANK, targets="all-linear"), rngs=nnx.Rngs(0))
    prompts = np.random.default_rng(0).integers(0, cell.sizes["vocab_size"], (cell.rows, cell.length)).tolist()

    def run(count: int) -> float:
        answers = [peftjax.generate(model, prompts, max_new_tokens=NEW) for _ in range(count)]
        return sum(map(len, answers[-1]))

    return run


def load(cell: Cell, directory: Path) -> Callable[[int], float]:
    def run(count: int) -> float:
        for _ in range(count):
            model = peftjax.load_model(directory, cell.dtype, quantize="nf4" if cell.quantized else None)
            leaves = jax.block_until_ready(variables.flat(model)[1])
        return len(leaves)

    return run


def product(cell: Cell) -> tuple[Callable[[], Any], float]:
    """One product of the cell's dtype with a float32 result, and its FLOP."""
    rows, width, mlp = product_shape(cell)
    a, b = jnp.ones((rows, width), cell.dtype), jnp.ones((width, mlp), cell.dtype)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: jax.block_until_ready(multiply(a, b)), 2.0 * rows * width * mlp


if __name__ == "__main__":
    serve(make)
