"""LoRA on a Llama that continues plays (Tiny Shakespeare, one speech per record).

peftjax train --config=configs/shakespeare_llama_lora.py --workdir=runs/plays --config.model.path=DIR
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.method = make_config("lora", rank=8, alpha=16.0, targets="all-linear")
    config.data.train = ("data/tiny_shakespeare/train.jsonl.gz",)
    config.data.eval = ("data/tiny_shakespeare/validation.jsonl.gz",)
    config.data.max_length = 256
    config.data.pack = True
    config.optim.learning_rate = 3e-3
    config.optim.warmup_fraction = 1 / 15
    config.train.steps = 300
    config.train.batch_size = 8
    config.train.log_every = 20
    config.train.eval_batches = 8
    config.eval.samples = 4  # continuations of the first half of a speech
    config.eval.max_new_tokens = 80
    return config
