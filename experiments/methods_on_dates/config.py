"""The config of every method: the quickstart's dates on the bundled model, with fewer steps and smaller batches."""

from ml_collections import ConfigDict

from peftjax.core.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.model.path = "embedded"
    config.data.train = ("tfds:rewrite_dates/train",)
    config.data.eval = ("tfds:rewrite_dates/test",)  # days that never occur in training
    config.data.format = "completion"
    config.data.prompt_template = "{prompt} ->"
    config.data.completion_template = " {completion}"
    config.data.max_length = 64
    config.data.pack = True
    config.optim.schedule = "cosine"
    config.optim.warmup_fraction = 0.1
    config.train.steps = 100
    config.train.batch_size = 8
    config.train.loss_chunk = 64
    return config
