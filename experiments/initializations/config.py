"""LoRA of rank 4 from six initializations on a float32 base, and from two on an NF4 base, with three learning rates and three seeds."""

from typing import Any

from ml_collections import ConfigDict

from experiments import small
from peftjax.methods import make_config

RATES = [5e-4, 1e-3, 2e-3]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = small.get_config()
    config.method = make_config("lora", rank=4, alpha=8.0, targets="all-linear")
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    runs: dict[str, list[Any]] = {"optim.learning_rate": RATES, "seed": SEEDS}
    return [
        {"method.init": ["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"], **runs},
        {"model.quantize": ["nf4"], "method.init": ["kaiming", "loftq"], **runs},
    ]
