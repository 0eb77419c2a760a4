"""Full fine-tuning and LoRA with two batch sizes, each with five learning rates and three seeds."""

from typing import Any

from ml_collections import ConfigDict

from experiments import small
from peftjax.core.config import defaults
from peftjax.methods import make_config

RATES = {"full": [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3], "lora": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]}
BATCH_SIZES = [4, 32]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = small.get_config()
    config.method = make_config("lora", rank=16, alpha=32.0, targets="all-linear")
    config.train.steps = defaults().train.steps  # replaced by the number of epochs
    config.train.epochs = 0.03  # about 1,210 rows, the same for each batch size
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    runs = {"train.batch_size": BATCH_SIZES, "seed": SEEDS}
    return [{"method.name": [name], "optim.learning_rate": rates, **runs} for name, rates in RATES.items()]
