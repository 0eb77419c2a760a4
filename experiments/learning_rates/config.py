"""Full fine-tuning and LoRA of four ranks, each with five learning rates and three seeds."""

from typing import Any

from ml_collections import ConfigDict

from experiments import small
from peftjax.methods import make_config

RATES = {"full": [5e-5, 1e-4, 2e-4, 4e-4, 8e-4], "lora": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]}
RANKS = [1, 4, 16, 64]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = small.get_config()
    # the same alpha for all ranks: the scale is 32 / rank
    config.method = make_config("lora", alpha=32.0, targets="all-linear")
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    return [
        {"method.name": ["full"], "optim.learning_rate": RATES["full"], "seed": SEEDS},
        {"method.name": ["lora"], "method.rank": RANKS, "optim.learning_rate": RATES["lora"], "seed": SEEDS},
    ]
