"""LoRA of rank 4 from six initializations on a float32 base, and from two on an NF4 base, with three seeds and three or more
learning rates, so that the best one is not the lowest or the highest."""

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
    higher, lower = [*RATES, 4e-3], [2.5e-4, *RATES]
    return [
        {"method.init": ["kaiming", "orthogonal"], "optim.learning_rate": higher, "seed": SEEDS},
        {"method.init": ["gaussian"], "optim.learning_rate": lower, "seed": SEEDS},
        {"method.init": ["pissa", "olora", "eva"], "optim.learning_rate": RATES, "seed": SEEDS},
        {"method.init": ["eva"], "method.eva_rho": [1.0], "optim.learning_rate": RATES, "seed": SEEDS},
        {
            "model.quantize": ["nf4"],
            "method.init": ["kaiming", "loftq"],
            "optim.learning_rate": higher,
            "seed": SEEDS,
        },
    ]
