"""Every field with its default; the declarations and their meaning are in peftjax/core/config.py."""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.method = make_config("lora")
    return config
