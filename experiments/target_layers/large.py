"""The same study with Llama 3.1 8B."""

from typing import Any

from ml_collections import ConfigDict

from experiments import large
from peftjax.methods import make_config

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
RANKS = {ATTENTION: 200, MLP: 96, (*ATTENTION, *MLP): 65}  # 170 million parameters each
RATES = [3e-5, 1e-4, 3e-4, 1e-3]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = large.get_config()
    config.method = make_config("lora", alpha=32.0)
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    return [
        {"method.targets": [targets], "method.rank": [rank], "optim.learning_rate": RATES, "seed": SEEDS}
        for targets, rank in RANKS.items()
    ]
