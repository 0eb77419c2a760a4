"""LoRA on the base in float32, bfloat16, int8 and NF4, each with three learning rates and three seeds."""

from typing import Any

from ml_collections import ConfigDict

from experiments import small
from peftjax.methods import make_config

RATES = [5e-4, 1e-3, 2e-3]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = small.get_config()
    config.method = make_config("lora", rank=16, alpha=32.0, targets="all-linear")
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    runs: dict[str, list[Any]] = {"optim.learning_rate": RATES, "seed": SEEDS}
    return [
        {"model.param_dtype": ["float32", "bfloat16"], **runs},
        {"model.quantize": ["int8", "nf4"], **runs},
    ]
