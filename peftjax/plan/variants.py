"""Variants of a config: full fine-tuning, and the standard methods that `--compare` shows."""

from peftjax.training.config import Config, changed


def full_fine_tuning(config: Config) -> Config:
    """Return the config of the same training without a method: all parameters are trained."""
    full = {"method.name": "full", "method.start_from": "", "model.quantize": "", "model.skip_quantize": ()}
    return changed(config, full)


def comparison(config: Config) -> dict[str, Config]:
    """Return the configs that `--compare` shows, by name: full fine-tuning, LoRA, QLoRA, and the given config if it is
    none of these."""
    method = {} if config.method.method == "lora" else {"method.name": "lora", "method.start_from": ""}
    lora = changed(config, {**method, "model.quantize": "", "model.skip_quantize": ()})
    found = {"full": full_fine_tuning(config), "lora": lora, "lora, nf4": changed(lora, {"model.quantize": "nf4"})}
    if config not in found.values():
        name = ", ".join(filter(None, (config.method.method, config.model.quantize)))
        found[f"{name} (the config)"] = config
    return found
