"""QLoRA of Llama 3.1 8B on one TPU chip of 16 GB: one sequence of 2048 tokens.

    python -m peftjax.plan --config=configs/plan_llama_8b_qlora.py --device=v5e:1x1

model.path holds only the sizes of meta-llama/Llama-3.1-8B, enough for a plan. To train, give it a
directory with the weights, or that hub id, and name the data.
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
