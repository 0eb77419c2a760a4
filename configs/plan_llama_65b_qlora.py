"""QLoRA of LLaMA 65B, rank 64, on one 48 GB GPU: one sequence of 512 tokens.

    peftjax plan --config=configs/plan_llama_65b_qlora.py --device=a6000

model.path contains only the config.json of huggyllama/llama-65b, which is enough for a plan. To train, set it to
that hub id or to a directory with the weights, and set the data.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "benchmarks/models/llama-65b"
    config.model.dtype = "bfloat16"
    config.model.quantize = "nf4"
    config.model.remat = "block"
    config.method = make_config("lora", rank=64, alpha=64.0, targets="all-linear")
    config.data.max_length = 512
    config.train.batch_size = 1
    config.optim.momentum_dtype = "bfloat16"  # saves 1.5 of 45.8 GiB
    return config
