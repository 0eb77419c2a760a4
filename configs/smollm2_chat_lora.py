"""LoRA on SmolLM2-135M-Instruct: answer questions about dates with the ISO date only.

    peftjax train --config=configs/smollm2_chat_lora.py --workdir=runs/chat [--config.model.path=DIR]

Training takes a few minutes and 3 GB of memory on a laptop without a GPU. The model (270 MB) is downloaded from the
Hugging Face hub unless DIR contains it. The loss covers only the assistant's turns.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.method = make_config("lora", rank=8, alpha=16.0, targets="all-linear")

    config.data.train = ("configs/data/date_chats/train.jsonl",)
    config.data.eval = ("configs/data/date_chats/test.jsonl",)  # days that never occur in training
    config.data.format = "chat"
    config.data.max_length = 128
    config.data.pack = True

    config.optim.learning_rate = 1e-3
    config.optim.warmup_fraction = 1 / 8

    config.train.steps = 40
    config.train.batch_size = 4
    config.train.log_every = 5
    config.train.eval_every = 0  # answers take most of the time on a laptop
    config.train.eval_batches = 4
    config.eval.exact_match = 20
    config.eval.samples = 4
    config.eval.max_new_tokens = 32
    config.checkpoint.every = 20
    return config
