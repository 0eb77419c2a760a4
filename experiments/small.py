"""What the small studies have in common: a character-level model of 0.9 million parameters, pretrained on children's stories, is
fine-tuned on short descriptions of restaurants (E2E NLG; Novikova et al. 2017, arXiv:1706.09254)."""

from ml_collections import ConfigDict

from peftjax.core.config import defaults


def get_config() -> ConfigDict:
    """The config without a method. Give `model.path`, `data.train` and `data.eval` on the command line."""
    config = defaults()
    config.model.dtype = "float32"
    config.data.text_field = "ref"
    config.data.max_length = 128  # a description has 110 characters on average
    config.data.pack = True
    config.optim.schedule = "constant"
    config.train.steps = 200
    config.train.batch_size = 4
    config.train.log_every = 20
    config.train.eval_every = 0  # before the first and after the last step
    config.train.eval_batches = 100
    config.checkpoint.every = 100
    config.checkpoint.keep_best = False
    return config
