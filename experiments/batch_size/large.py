"""The same study with Llama 3.1 8B: a quarter of an epoch with batches of 32 and 256."""

from typing import Any

from ml_collections import ConfigDict

from experiments import large
from peftjax.core.config import defaults
from peftjax.methods import make_config

RATES = {"full": [3e-6, 1e-5, 3e-5, 1e-4], "lora": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}
BATCH_SIZES = [32, 256]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = large.get_config()
    config.method = make_config("lora", rank=32, alpha=32.0, targets="all-linear")
    config.train.steps = defaults().train.steps  # replaced by the number of epochs
    config.train.epochs = 0.25
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    runs = {"train.batch_size": BATCH_SIZES, "seed": SEEDS}
    return [{"method.name": [name], "optim.learning_rate": rates, **runs} for name, rates in RATES.items()]
