"""All defaults. `peftjax train --help` lists the fields and their meaning."""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.method = make_config("lora")
    return config
