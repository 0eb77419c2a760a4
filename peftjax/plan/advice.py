"""What to change where a step does not fit, and what each change saves."""

from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from peftjax import methods
from peftjax.plan import devices
from peftjax.plan.abstract import changed, sketch
from peftjax.plan.plan import Plan


def advice(config: Any, hf_config: Mapping[str, Any], mesh: Mesh, now: int) -> Iterator[tuple[str, int]]:
    """Changes and what each of them alone saves, the largest first: the difference of two sketches. now: bytes without
    a change."""
    found = []
    for setting, other in _alternatives(config, mesh):
        try:
            found.append((setting, now - sketch(other, hf_config, mesh).needed))
        except ValueError:  # it does not go with the rest of the config
            continue
    yield from sorted((item for item in found if item[1] > 0), key=lambda item: -item[1])


def _alternatives(config: Any, mesh: Mesh) -> Iterator[tuple[str, Any]]:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    train, model, method = config.train, config.model, config.method
    if method.name == "full":
        lora = methods.method_defaults("lora")
        yield "method.name=lora", changed(config, method=lora)
        yield "method.name=lora model.quantize=nf4", changed(config, method=lora, model__quantize="nf4")
    elif not model.quantize:
        yield "model.quantize=nf4", changed(config, model__quantize="nf4")
    if model.dtype == "float32":
        yield "model.dtype=bfloat16", changed(config, model__dtype="bfloat16")
    if model.remat == "none":
        yield "model.remat=block", changed(config, model__remat="block")
    if train.batch_size // train.accumulate >= 2 * parts and train.batch_size % (2 * train.accumulate) == 0:
        yield f"train.accumulate={2 * train.accumulate}", changed(config, train__accumulate=2 * train.accumulate)
    if train.batch_size >= 2 * parts * train.accumulate:
        half = train.batch_size // 2 // train.accumulate * train.accumulate
        yield f"train.batch_size={half}", changed(config, train__batch_size=half)
    if config.data.max_length >= 256:
        half = config.data.max_length // 2
        yield f"data.max_length={half}", changed(config, data__max_length=half)
    if min(train.loss_chunk, config.data.max_length) >= 64:
        chunk = min(train.loss_chunk, config.data.max_length) // 4
        yield f"train.loss_chunk={chunk}", changed(config, train__loss_chunk=chunk)
    if config.optim.momentum_dtype == "float32" and config.optim.name != "adafactor":
        yield "optim.momentum_dtype=bfloat16", changed(config, optim__momentum_dtype="bfloat16")
    if method.get("dtype") == "float32":
        yield "method.dtype=bfloat16", changed(config, method__dtype="bfloat16")
    if isinstance(method.get("rank"), int) and method.rank >= 8:
        yield f"method.rank={method.rank // 2}", changed(config, method__rank=method.rank // 2)


def more_devices(plan: Plan) -> tuple[str, int] | None:
    """The fewest devices of the same kind on which it might fit, split by fsdp, and bytes on each of them: the state and
    the base divided, batch and temporaries as they are."""
    device = devices.find(plan.device)
    if device.chip is None:
        return None
    counts = [f"{device.kind}:{shape}" for shape in device.chip.shapes] or [f"{device.kind}:{n}" for n in (2, 4, 8)]
    split = sum(size for name, size in plan.arguments.items() if name != "batch") * device.count
    for larger in map(devices.find, counts):
        each = split // larger.count + plan.needed - split // device.count
        if larger.count > device.count and each <= device.memory:
            return larger.name, each
    return None
