"""Full fine-tuning, LoRA of four ranks, prefix tuning, Houlsby adapters and (IA)3, each with several learning rates and three seeds.

The runs with full fine-tuning and LoRA are those of learning_rates.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import small
from peftjax.methods import make_config

RATES = {
    "full": [5e-5, 1e-4, 2e-4, 4e-4, 8e-4],
    "lora": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    "prefix": [1e-2, 3e-2, 1e-1, 3e-1],
    "houlsby": [1e-3, 3e-3, 1e-2, 3e-2],
    "ia3": [3e-3, 1e-2, 3e-2, 1e-1],
}
RANKS = [1, 4, 16, 64]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = small.get_config()
    config.method = make_config("lora", alpha=32.0, targets="all-linear")
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    ranks = {"lora": {"method.rank": RANKS}}
    return [
        {"method.name": [name], **ranks.get(name, {}), "optim.learning_rate": rates, "seed": SEEDS}
        for name, rates in RATES.items()
    ]
