"""LoRA of attention, of the MLP and of both, with equally many parameters, four learning rates and three seeds."""

from typing import Any

from ml_collections import ConfigDict

from experiments import small
from peftjax.methods import make_config

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
RANKS = {ATTENTION: 26, MLP: 16, (*ATTENTION, *MLP): 10}  # 116,480, 115,200 and 116,800 parameters
RATES = [5e-4, 1e-3, 2e-3, 4e-3]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = small.get_config()
    config.method = make_config("lora", alpha=32.0)
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    return [
        {"method.targets": [targets], "method.rank": [rank], "optim.learning_rate": RATES, "seed": SEEDS}
        for targets, rank in RANKS.items()
    ]
