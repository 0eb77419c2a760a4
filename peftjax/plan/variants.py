"""Variants of a config: some fields changed, full fine-tuning, and the standard methods that `--compare` shows."""

from collections.abc import Mapping
from typing import Any

from peftjax import methods
from peftjax.core import config as configs


def changed(config: Any, fields: Mapping[str, Any]) -> Any:
    """Return the config with other values of some fields.

    Args:
        config: The config; it is not modified.
        fields: New values by dotted name, such as {"model.remat": "block"}. "method.name" replaces the whole section
            by the defaults of that method, as on the command line; "method" and "mesh" replace a section by a mapping.

    Raises:
        UserError: The new values are not valid.
    """
    values = config.to_dict()
    for name, value in fields.items():
        section, _, field = name.partition(".")
        if name == "method.name":
            values["method"] = methods.method_defaults(value)
        else:
            values[section] = values[section] | {field: value} if field else value
    return configs.validate(values, method_defaults=methods.method_defaults)


def method_option(config: Any, name: str) -> Any:
    """Return an option of the config's method, or None if the method has no such option."""
    return config.method.get(name)


def full_fine_tuning(config: Any) -> Any:
    """Return the config of the same training without a method: all parameters are trained."""
    return changed(config, {"method.name": "full", "model.quantize": "", "model.skip_quantize": ()})


def comparison(config: Any) -> dict[str, Any]:
    """Return the configs that `--compare` shows, by name: full fine-tuning, LoRA, QLoRA, and the given config if it is
    none of these."""
    method = {} if config.method.name == "lora" else {"method.name": "lora"}
    lora = changed(config, {**method, "model.quantize": "", "model.skip_quantize": ()})
    found = {
        "full": full_fine_tuning(config),
        "lora": lora,
        "lora, nf4": changed(lora, {"model.quantize": "nf4"}),
    }
    if not any(config == other for other in found.values()):
        name = ", ".join(filter(None, (config.method.name, config.model.quantize)))
        found[f"{name} (the config)"] = config
    return found
