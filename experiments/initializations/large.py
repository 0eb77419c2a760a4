"""The same study with Llama 3.1 8B and rank 16. PiSSA and LoftQ take randomized decompositions."""

from typing import Any

from ml_collections import ConfigDict

from experiments import large
from peftjax.methods import make_config

RATES = [3e-5, 1e-4, 3e-4, 1e-3]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = large.get_config()
    config.method = make_config("lora", rank=16, alpha=32.0, targets="all-linear")
    return config


def get_sweep() -> list[dict[str, list[Any]]]:
    runs: dict[str, list[Any]] = {"optim.learning_rate": RATES, "seed": SEEDS}
    return [
        {"method.init": ["kaiming", "gaussian", "orthogonal", "pissa_niter_16", "olora", "eva"], **runs},
        {"model.quantize": ["nf4"], "method.init": ["kaiming", "loftq_niter_16"], **runs},
    ]
