"""QLoRA of LLaMA 7B on one 24 GB GPU: 4 sequences of 1024 tokens.

    peftjax plan --config=configs/plan_llama_7b_qlora.py --device=rtx4090

model.path contains only the config.json of huggyllama/llama-7b, which is enough for a plan. To train, set it to
that hub id or to a directory with the weights, and set the data.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "benchmarks/models/llama-7b"
    config.model.dtype = "bfloat16"
    config.model.quantize = "nf4"
    config.model.remat = "block"
    config.method = make_config("lora", rank=16, alpha=16.0, targets="all-linear")
    config.data.max_length = 1024
    config.train.batch_size = 4
    return config
