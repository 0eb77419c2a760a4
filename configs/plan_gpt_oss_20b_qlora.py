"""QLoRA of gpt-oss-20b, a mixture of experts, on one 16 GB GPU: one sequence of 2048 tokens.

    peftjax plan --config=configs/plan_gpt_oss_20b_qlora.py --device=rtx4080

model.path contains only the config.json of openai/gpt-oss-20b, which is enough for a plan. To train, set it to
that hub id or to a directory with the weights, and set the data.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "benchmarks/models/gpt-oss-20b"
    config.model.dtype = "bfloat16"
    config.model.quantize = "nf4"
    config.model.remat = "offload"  # saves 0.3 of 15.2 GiB
    config.method = make_config("lora", rank=16, alpha=16.0, targets="all-linear", dtype="bfloat16")
    config.data.max_length = 2048
    config.train.batch_size = 1
    config.optim.momentum_dtype = "bfloat16"  # as method.dtype: adapters of all experts have many parameters
    return config
