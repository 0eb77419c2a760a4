"""What to change if a step does not fit, and what each change saves."""

from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from peftjax.core.errors import UserError
from peftjax.plan import devices
from peftjax.plan.plan import Plan
from peftjax.plan.traced import trace_step
from peftjax.training.config import Config, changed, to_dict


def advice(
    config: Config, hf_config: Mapping[str, Any], mesh: Mesh, needed: int, members: int = 1
) -> list[tuple[str, int]]:
    """Return changes to the config and the bytes per device that each of them alone saves, the largest first.

    The savings are differences of two estimates (`TracedStep.needed`), of which `needed` is for the unchanged config.
    """
    savings = []
    for fields in _candidates(config, mesh):
        try:
            step = trace_step(changed(config, fields), hf_config, mesh, members)
        except UserError:  # this change does not go with the rest of the config
            continue
        savings.append((" ".join(f"{name}={value}" for name, value in fields.items()), needed - step.needed))
    return sorted((item for item in savings if item[1] > 0), key=lambda item: -item[1])


def _candidates(config: Config, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Changes that may save memory, as the fields that `changed` takes."""
    yield from _method_changes(config)
    yield from _batch_changes(config, mesh.shape["data"] * mesh.shape["fsdp"])
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if config.model.remat == "none":
        yield {"model.remat": "block"}
    if config.optim.momentum_dtype == "float32" and config.optim.name != "adafactor":
        yield {"optim.momentum_dtype": "bfloat16"}


def _method_changes(config: Config) -> Iterator[dict[str, Any]]:
    if config.method.trains_base:
        yield {"method.name": "lora"}
        yield {"method.name": "lora", "model.quantize": "nf4"}
    elif not config.model.quantize:
        yield {"model.quantize": "nf4"}
    options = to_dict(config)["method"]
    if options.get("dtype") == "float32":
        yield {"method.dtype": "bfloat16"}
    if (rank := options.get("rank", 0)) >= 8:
        yield {"method.rank": rank // 2}


def _batch_changes(config: Config, parts: int) -> Iterator[dict[str, Any]]:
    """Smaller microbatches, batches, sequences and loss chunks. parts: the number of devices that split a batch."""
    size, accumulate, length = config.train.batch_size, config.train.accumulate, config.data.max_length
    if size // accumulate >= 2 * parts and size % (2 * accumulate) == 0:
        yield {"train.accumulate": 2 * accumulate}
    if size >= 2 * parts * accumulate:
        yield {"train.batch_size": size // 2 // accumulate * accumulate}
    if length >= 256:
        yield {"data.max_length": length // 2}
    if (chunk := min(config.train.loss_chunk, length)) >= 64:
        yield {"train.loss_chunk": chunk // 4}


def more_devices(plan: Plan) -> tuple[str, int] | None:
    """Return the fewest devices of the same kind on which the step might fit if fsdp splits it, and the bytes on each.

    Base and state are divided by the number of devices; batch and temporaries stay as they are. None if even the most
    devices do not suffice.
    """
    device = devices.find(plan.device)
    if device.chip is None:
        return None
    sizes = [f"{device.kind}:{shape}" for shape in device.chip.shapes] or [f"{device.kind}:{n}" for n in (2, 4, 8)]
    split = sum(size for name, size in plan.arguments.items() if name != "batch") * device.count
    for larger in map(devices.find, sizes):
        each = split // larger.count + plan.needed - split // device.count
        if larger.count > device.count and each <= device.memory:
            return larger.name, each
    return None
