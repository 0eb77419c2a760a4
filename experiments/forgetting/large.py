"""The same study with Llama 3.1 8B, and LoRA of ranks 16, 64 and 256, as in the original."""

from typing import Any

from ml_collections import ConfigDict

from experiments import large
from peftjax.methods import make_config

RATES = {
    "full": [3e-6, 1e-5, 3e-5, 1e-4],
    "lora": [3e-5, 1e-4, 3e-4, 1e-3],
    "prefix": [1e-3, 3e-3, 1e-2, 3e-2],
    "houlsby": [3e-5, 1e-4, 3e-4, 1e-3],
    "ia3": [1e-3, 3e-3, 1e-2, 3e-2],
}
RANKS = [16, 64, 256]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = large.get_config()
    config.method = make_config("lora", alpha=32.0, targets="all-linear")
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    ranks = {"lora": {"method.rank": RANKS}}
    return [
        {"method.name": [name], **ranks.get(name, {}), "optim.learning_rate": rates, "seed": SEEDS}
        for name, rates in RATES.items()
    ]
