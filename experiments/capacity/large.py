"""The same study with Llama 3.1 8B and ranks 1 to 256: one epoch, evaluated every 100 steps."""

from typing import Any

from ml_collections import ConfigDict

from experiments import large
from peftjax.core.config import defaults
from peftjax.methods import make_config

RATES = {"full": [1e-5, 3e-5], "lora": [1e-4, 3e-4]}
RANKS = [1, 4, 16, 64, 256]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = large.get_config()
    config.method = make_config("lora", alpha=32.0, targets="all-linear")
    config.train.steps = defaults().train.steps  # replaced by the number of epochs
    config.train.epochs = 1.0
    config.train.eval_every = 100
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    return [
        {"method.name": ["full"], "optim.learning_rate": RATES["full"], "seed": SEEDS},
        {"method.name": ["lora"], "method.rank": RANKS, "optim.learning_rate": RATES["lora"], "seed": SEEDS},
    ]
