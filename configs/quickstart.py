"""The quickstart: LoRA teaches the bundled model to rewrite dates, in about 90 seconds on two CPU cores and offline."""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "embedded"
    config.method = make_config("lora", rank=4, alpha=8.0, targets="all-linear")

    config.data.train = ("tfds:rewrite_dates/train",)
    config.data.eval = ("tfds:rewrite_dates/test",)  # days that never occur in training
    config.data.format = "completion"
    config.data.prompt_template = "{prompt} ->"
    config.data.completion_template = " {completion}"
    config.data.max_length = 64
    config.data.pack = True

    config.optim.learning_rate = 1e-2
    config.optim.schedule = "cosine"
    config.optim.warmup_fraction = 1 / 30

    config.train.steps = 600
    config.train.batch_size = 16
    config.train.loss_chunk = 64
    config.train.log_every = 40
    config.train.eval_every = 200
    config.train.eval_batches = 8
    config.eval.exact_match = 200
    config.eval.samples = 4
    config.eval.max_new_tokens = 12  # a space, ten characters and the end-of-text token
    config.checkpoint.every = 100
    return config
