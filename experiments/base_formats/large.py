"""The same study at the size of the QLoRA paper's smaller models: bfloat16, int8, NF4 and NF4 without double quantization."""

from typing import Any

from ml_collections import ConfigDict

from experiments import large
from peftjax.methods import make_config

RATES = [1e-4, 3e-4, 1e-3]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = large.get_config()
    config.method = make_config("lora", rank=16, alpha=32.0, targets="all-linear")
    return config


def get_sweep() -> dict[str, list[Any]]:
    return {"model.quantize": ["", "int8", "nf4", "nf4_single"], "optim.learning_rate": RATES, "seed": SEEDS}
