"""The same study with Llama 3.1 8B on UltraChat (Ding et al. 2023, arXiv:2305.14233), about as large as the original. Not run yet.

peftjax sweep --config=experiments/learning_rates/large.py --workdir=DIR
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config

RATES = {"full": [3e-6, 1e-5, 3e-5, 1e-4], "lora": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}
RANKS = [1, 4, 16, 64, 256]
SEEDS = [0, 1, 2]


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.model.dtype = "bfloat16"
    config.model.remat = "block"
    config.method = make_config("lora", alpha=32.0, targets="all-linear")
    config.data.train = ("hf:HuggingFaceH4/ultrachat_200k/train_sft",)
    config.data.eval = ("hf:HuggingFaceH4/ultrachat_200k/test_sft",)
    config.data.format = "chat"
    config.data.max_length = 2048
    config.data.pack = True
    config.optim.schedule = "constant"
    config.train.steps = 2000
    config.train.batch_size = 32
    config.train.eval_batches = 50
    config.mesh.fsdp = -1
    return config


def get_sweep() -> list[dict[str, list[object]]]:
    return [
        {"method.name": ["full"], "optim.learning_rate": RATES["full"], "seed": SEEDS},
        {"method.name": ["lora"], "method.rank": RANKS, "optim.learning_rate": RATES["lora"], "seed": SEEDS},
    ]
