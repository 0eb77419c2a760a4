"""The same study at about the size of the original: ranks 1 to 256."""

from typing import Any

from ml_collections import ConfigDict

from experiments import large
from peftjax.methods import make_config

RATES = {"full": [3e-6, 1e-5, 3e-5, 1e-4], "lora": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}
RANKS = [1, 4, 16, 64, 256]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = large.get_config()
    config.method = make_config("lora", alpha=32.0, targets="all-linear")
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    return [
        {"method.name": ["full"], "optim.learning_rate": RATES["full"], "seed": SEEDS},
        {"method.name": ["lora"], "method.rank": RANKS, "optim.learning_rate": RATES["lora"], "seed": SEEDS},
    ]
