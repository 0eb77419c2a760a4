"""QLoRA of Mixtral 8x7B on one 40 GB GPU: one sequence of 2048 tokens.

    peftjax plan --config=configs/plan_mixtral_8x7b_qlora.py --device=a100-40gb

model.path contains only the config.json of mistralai/Mixtral-8x7B-v0.1, which is enough for a plan. To train, set it to
that hub id or to a directory with the weights, and set the data.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "benchmarks/models/mixtral-8x7b"
    config.model.dtype = "bfloat16"
    config.model.quantize = "nf4"
    config.model.remat = "block"
    config.method = make_config("lora", rank=16, alpha=16.0, targets="all-linear")
    config.data.max_length = 2048
    config.train.batch_size = 1
    return config
