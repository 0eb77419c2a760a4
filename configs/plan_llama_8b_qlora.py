"""QLoRA of Llama 3.1 8B on one TPU chip with 16 GB: one sequence of 2048 tokens.

    peftjax plan --config=configs/plan_llama_8b_qlora.py --device=v5e:1x1

model.path contains only the config.json of meta-llama/Llama-3.1-8B, which is enough for a plan. To train, set it to
that hub id or to a directory with the weights, and set the data.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "benchmarks/models/llama-3.1-8b"
    config.model.dtype = "bfloat16"
    config.model.quantize = "nf4"
    config.model.remat = "block"
    config.method = make_config("lora", rank=16, alpha=16.0, targets="all-linear")
    config.data.max_length = 2048
    config.train.batch_size = 1
    return config
