"""Train the bundled model from random weights: full fine-tuning on the text of make_corpus.py."""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config

CORPUS = "runs/base_model/corpus"


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = f"{CORPUS}/base"
    config.model.init = "random"
    config.method = make_config("full")

    config.data.train = (f"{CORPUS}/train.jsonl",)
    config.data.eval = (f"{CORPUS}/validation.jsonl",)
    config.data.format = "text"
    config.data.max_length = 128
    config.data.pack = True

    config.optim.learning_rate = 4e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_fraction = 0.04
    config.optim.weight_decay = 0.1
    config.optim.b2 = 0.95

    config.train.steps = 2500
    config.train.batch_size = 16
    config.train.loss_chunk = 128
    config.train.log_every = 50
    config.train.eval_every = 500
    config.checkpoint.every = 250
    return config
