"""The default config of a method, with which the report of a run compares its config."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.methods import make_config
from peftjax.training import config as configs
from peftjax.training import duration, precision
from peftjax.training.config import Config


def default_values(config: Config, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The default config of a run's method, as nested dicts, resolved as the config of the run.

    `hf_config` has the fields of the model's config.json.
    """
    options = json.loads(json.dumps(make_config(config.method.method).to_dict()))
    try:
        default, own = configs.validate({"method": options}), dict[str, Any]()
    except UserError:  # the default of a required option is not valid, such as token_indices of trainable tokens
        default, own = dataclasses.replace(configs.validate({}), method=config.method), {"method": options}
    values: dict[str, Any] = json.loads(configs.to_json(_resolved(default, config.train.steps, hf_config)))
    return values | own


def _resolved(default: Config, steps: int, hf_config: Mapping[str, Any]) -> Config:
    """The default config as it would be resolved in a run of `steps` steps; the report shows which of its values differ."""
    same = dataclasses.replace(default, train=dataclasses.replace(default.train, steps=steps))
    resolved = precision.resolve_dtype(duration.in_steps(same, lambda: 0), hf_config)
    return dataclasses.replace(resolved, train=dataclasses.replace(resolved.train, steps=default.train.steps))
