"""Plans of several configs: the largest that fits, and methods beside each other."""

from collections.abc import Callable, Iterator
from typing import Any

from peftjax import methods
from peftjax.core.errors import UserError
from peftjax.plan.abstract import changed, full_fine_tuning
from peftjax.plan.plan import Plan

Probe = Callable[[Any], Plan]


def search(kind: str, config: Any, parts: int, probe: Probe) -> Iterator[tuple[int, Plan | UserError]]:
    """Plans of ever larger batches, lengths or ranks, or ever smaller ones, beginning with the config's own: doubled
    while they fit (halved until one does), then bisected until what fits and what does not are within an eighth, or one
    step, of each other. A step is what the devices that split a batch (`parts`) and the microbatches share alike; 64
    positions; a rank of 1. The largest that fits is among them."""
    section, field, step = {
        "batch": ("train", "batch_size", parts * config.train.accumulate),
        "length": ("data", "max_length", 64),
        "rank": ("method", "rank", 1),
    }[kind]
    if field not in config[section]:
        raise UserError(f"--search={kind}: {section}.name={config[section].name!r} has no {field}")

    def plan_of(value: int) -> tuple[bool, Plan | UserError]:
        try:
            plan = probe(changed(config, **{f"{section}__{field}": value}))
        except UserError as error:  # more positions than the model has, a rank larger than a layer
            return False, error
        return plan.fits, plan

    low, high, value = 0, 0, max(config[section][field] // step, 1) * step
    while not (low and high and high - low <= max(step, low // 8)):
        fits, found = plan_of(value)
        yield value, found
        low, high = (value, high) if fits else (low, value)
        if not high:
            value = 2 * low
        elif not low:
            if high == step:
                return
            value = max(high // 2 // step, 1) * step
        else:
            value = (low + high) // 2 // step * step


def compared(config: Any) -> dict[str, Any]:
    """Configs by name: full fine-tuning, LoRA, QLoRA, and the config's own where it is none of them."""
    own = config.method.to_dict()
    lora = own if own["name"] == "lora" else methods.method_defaults("lora")
    dense = changed(config, method=lora, model__quantize="", model__skip_quantize=())
    found = {"full": full_fine_tuning(config), "lora": dense, "lora, nf4": changed(dense, model__quantize="nf4")}
    if not any(config == other for other in found.values()):
        found[f"{own['name']}{', ' if config.model.quantize else ''}{config.model.quantize} (the config)"] = config
    return found
