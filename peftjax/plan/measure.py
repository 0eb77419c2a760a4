"""From a config and a device to a plan: compiled by the device's own compiler, else estimated."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import methods
from peftjax.core import variables
from peftjax.io.hf_adapter import weights_bytes
from peftjax.plan import hlo_cost, jaxpr_cost
from peftjax.plan.abstract import Sketch, full_fine_tuning, sketch
from peftjax.plan.advice import advice
from peftjax.plan.devices import GIB, Device
from peftjax.plan.plan import Plan


def measure(config: Any, hf_config: Mapping[str, Any], device: Device, *, advise: bool = True) -> Plan:
    """The plan of `config` on a device, in this process, which must have the device's `environment`. advise: if it does
    not fit, say what to change."""
    there = not device.missing()
    mesh = device.mesh(config.mesh, simulated=not there)
    drawn = sketch(config, hf_config, mesh)
    method = methods.from_config(config.method)
    full = method.trains is nnx.Param
    base = [leaf.get_value() for leaf in variables.flat(drawn.model)[1].values() if type(leaf) is nnx.Param]
    positions = _positions(drawn.model, drawn.arguments[2])
    plan = Plan(
        device=device.name,
        devices=device.count,
        memory=device.memory,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        arguments=drawn.groups,
        gradients=drawn.gradients,
        positions=positions,
        base_parameters=sum(value.size for value in base),
        trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(drawn.arguments[0].trainable)),
        adapter_bytes=0 if full else weights_bytes(drawn.model),
        full_bytes=_full_bytes(config, hf_config, mesh),
        flops=jaxpr_cost.matmul_flops(drawn.traced.jaxpr.jaxpr),
        closed_flops=(6 if full else 4) * _kernel_parameters(drawn.model) * positions,
        **(_compile(drawn, config, device, mesh) if there else _estimate(drawn, config)),
    )
    if advise and not plan.fits:
        plan = dataclasses.replace(plan, advice=tuple(advice(config, hf_config, mesh, drawn.needed)))
    return plan


def _compile(drawn: Sketch, config: Any, device: Device, mesh: Mesh) -> dict[str, Any]:
    """The fields of a plan that the compiler gives."""
    name = {"tpu": "libtpu", "cuda": "XLA:GPU", "cpu": "XLA:CPU"}[device.platform]
    known = sum(drawn.groups.values())
    try:
        compiled = compile_step(drawn, device, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _estimate(drawn, config) | _refused(str(error), device.memory, known) | {"compiler": name}
    memory = compiled.memory_analysis()
    traffic = hlo_cost.traffic(compiled.as_text())
    return {
        "compiler": name,
        "padding": memory.argument_size_in_bytes - known,
        "temporaries": memory.temp_size_in_bytes,
        "others": memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        "moved": traffic.memory,
        "collectives": traffic.collectives,
    }


def compile_step(drawn: Sketch, device: Device, mesh: Mesh) -> Any:
    """The train step as the device's compiler makes it."""
    with jax.set_mesh(mesh):
        return drawn.traced.lower(lowering_platforms=(device.platform,)).compile(device.compiler_options)


def _refused(said: str, memory: int, known: int) -> dict[str, Any]:
    """What is left to say when the TPU compiler makes no program, because it does not fit; its figure is of all memory."""
    total = re.search(r"(?:temporaries \(|Used )([\d.]+)G", said)
    needed = int(float(total[1]) * GIB) if total else memory + 1
    return {"temporaries": max(needed, memory + 1) - known, "refused": " ".join(said.split())}


def _estimate(drawn: Sketch, config: Any) -> dict[str, Any]:
    """Those fields without a compiler. Temporaries: `Sketch.live`. Memory traffic: the frozen base is read in each
    microbatch by the forward and the backward pass, and once more where that computes again; all else that is an
    argument, and the temporaries, are written once and read once."""
    passes = config.train.accumulate * (3 if config.model.remat in ("block", "offload") else 2)
    base = drawn.groups.get("frozen base", 0)
    moved = passes * base + 2 * (drawn.needed - base)
    return {"compiler": "", "padding": 0, "temporaries": drawn.live, "others": 0, "moved": moved, "collectives": {}}


def _positions(model: Any, batch: Mapping[str, Any]) -> int:
    """`Plan.positions`; of an encoder-decoder those of its encoder."""
    if "pixels" in batch:
        return math.prod(batch["pixels"].shape[:2]) * (1 + model.config.patches)
    return math.prod(batch["tokens"].shape)


def _kernel_parameters(model: Any) -> int:
    """Of all kernels, and of the embedding where it is the head as well."""
    leaves = {path: leaf for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}
    tied = getattr(model.config, "tied", False)
    return sum(
        leaf.get_value().size
        for path, leaf in leaves.items()
        if path.endswith(".kernel") or (tied and path.endswith(".embedding"))
    )


def _full_bytes(config: Any, hf_config: Mapping[str, Any], mesh: Mesh) -> int:
    """`Plan.full_bytes`, by shapes."""
    dense = {name: value for name, value in hf_config.items() if name != "quantization_config"}
    drawn = sketch(full_fine_tuning(config), dense, mesh)
    return sum(drawn.groups.values()) - drawn.groups["batch"] + drawn.gradients
