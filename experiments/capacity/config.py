"""Full fine-tuning and LoRA of four ranks on growing amounts of data, each with two learning rates and three seeds."""

from typing import Any

from ml_collections import ConfigDict

from experiments import small
from peftjax.methods import make_config

RATES = {"full": [1e-4, 2e-4], "lora": [5e-4, 1e-3]}
RANKS = [1, 4, 16, 64]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = small.get_config()
    config.method = make_config("lora", alpha=32.0, targets="all-linear")
    config.train.steps = 800  # no record is seen twice: the step is the amount of data
    config.train.eval_every = 100
    config.train.eval_batches = 50
    config.train.log_every = 100
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    return [
        {"method.name": ["full"], "optim.learning_rate": RATES["full"], "seed": SEEDS},
        {"method.name": ["lora"], "method.rank": RANKS, "optim.learning_rate": RATES["lora"], "seed": SEEDS},
    ]
