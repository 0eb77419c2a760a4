"""From a config and a device to a plan, with the device's own compiler or, if it is not installed, by estimate."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax.core import variables
from peftjax.io.adapter_size import weights_bytes
from peftjax.models.base import LanguageModel, Model
from peftjax.models.kernels import kernel_of
from peftjax.plan import hlo_cost
from peftjax.plan.advice import advice
from peftjax.plan.devices import Device
from peftjax.plan.plan import Plan
from peftjax.plan.traced import TracedStep, state_bytes, trace_step
from peftjax.plan.variants import full_fine_tuning
from peftjax.training import jaxpr_cost, precision
from peftjax.training.abstract import bytes_per_device
from peftjax.training.config import Config
from peftjax.training.memory import rejected_bytes

_EXPERTS = ".experts."  # in the path of a parameter
_COMPILERS = {"tpu": "libtpu", "cuda": "XLA:GPU", "cpu": "XLA:CPU"}


def measure(
    config: Config,
    hf_config: Mapping[str, Any],
    device: Device,
    *,
    members: int = 1,
    population: Sequence[Config] = (),
    advise: bool = True,
) -> Plan:
    """Return the plan of `config` on a device. This process must have been started with `device.environment()`.

    `hf_config` has the fields of the model's config.json. For `members` and `population`, see `trace_step`. With
    `advise`, a plan that does not fit lists changes that save memory.

    Raises:
        UserError: The model, the method and the config do not go together.
    """
    config, *alike = (_resolved(one, hf_config, device) for one in (config, *population))
    installed = not device.missing()
    mesh = device.mesh(config.mesh.sizes, simulated=not installed)
    step = trace_step(config, hf_config, mesh, members, alike)
    plan = _estimated(config, hf_config, device, mesh, step)
    if installed:
        plan = _compiled(plan, device, mesh, step)
    if advise and not plan.fits:
        plan = dataclasses.replace(plan, advice=tuple(advice(config, hf_config, mesh, step.needed, members)))
    return plan


def _resolved(config: Config, hf_config: Mapping[str, Any], device: Device) -> Config:
    """The config with a dtype, and with the options of its method that depend on the number of steps."""
    config = precision.resolve_dtype(config, hf_config, device.platform)
    # Without the data, train.epochs cannot be converted to steps. The number of steps changes no shape.
    return dataclasses.replace(config, method=config.method.in_steps(config.train.steps))


def _estimated(config: Config, hf_config: Mapping[str, Any], device: Device, mesh: Mesh, step: TracedStep) -> Plan:
    """The plan without a compiler."""
    full = config.method.trains_base
    base = _base(step.model)
    positions = step.members * config.train.batch_size * step.task.positions(step.model)
    dense = {name: value for name, value in hf_config.items() if name != "quantization_config"}
    return Plan(
        device=device.name,
        devices=device.count,
        memory=device.memory,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        arguments=step.argument_bytes,
        temporaries=step.temporary_bytes,
        gradients=step.gradient_bytes,
        members=step.members,
        positions=positions,
        base_parameters=sum(base.values()),
        active_parameters=sum(base.values()) - round((1 - step.use.active) * _expert_parameters(base)),
        trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(step.arguments.state.trainable)),
        adapter_bytes=0 if full else weights_bytes(step.model),
        full_bytes=state_bytes(full_fine_tuning(config), dense, mesh),
        flops=jaxpr_cost.matmul_flops(step.traced.jaxpr.jaxpr, step.use.blocks),
        closed_flops=(6 if full else 4) * _active_kernels(step, base) * positions,
        moved=_estimated_traffic(config, step),
        attention=_attention(config, step, mesh),
    )


def _compiled(plan: Plan, device: Device, mesh: Mesh, step: TracedStep) -> Plan:
    """The plan with the compiler's figures."""
    plan = dataclasses.replace(plan, compiler=_COMPILERS[device.platform])
    known = sum(plan.arguments.values())
    try:
        program = compile_step(step, device, mesh)
    except jax.errors.JaxRuntimeError as error:
        if (needed := rejected_bytes(str(error))) is None:
            raise
        needed = max(needed, device.memory + 1)
        return dataclasses.replace(plan, temporaries=needed - known, refused=" ".join(str(error).split()))
    memory = program.memory_analysis()
    assert memory is not None
    traffic = hlo_cost.traffic(program.as_text() or "", blocks_in_use=step.use.blocks)
    return dataclasses.replace(
        plan,
        padding=memory.argument_size_in_bytes - known,
        temporaries=memory.temp_size_in_bytes,
        others=memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        moved=traffic.memory,
        collectives=traffic.collectives,
    )


def compile_step(step: TracedStep, device: Device, mesh: Mesh) -> jax.stages.Compiled:
    """Compile a traced train step with the device's compiler."""
    with jax.set_mesh(mesh):
        return step.traced.lower(lowering_platforms=(device.platform,)).compile(device.compiler_options)


def _estimated_traffic(config: Config, step: TracedStep) -> int:
    """Bytes moved, without a compiler. Each microbatch reads the frozen base in the forward and in the backward pass, and
    once more if layers are recomputed. All other arguments and the temporaries are written once and read once."""
    passes = config.train.accumulate * (3 if config.model.remat in ("block", "offload") else 2)
    base = step.argument_bytes.get("frozen base", 0)
    experts = bytes_per_device([leaf for path, leaf in step.arguments.frozen.items() if _EXPERTS in path])
    return round(passes * (base + (step.use.reads - 1) * experts) + 2 * (step.needed - base))


def _attention(config: Config, step: TracedStep, mesh: Mesh) -> str:
    """The implementation of attention in the step."""
    length = step.task.positions(step.model) + step.model.virtual
    with jax.set_mesh(mesh):
        return kernel_of(step.model, length, packed=config.data.pack, padded=step.task.pads)


def _base(model: Model) -> dict[str, int]:
    """The number of elements of every parameter of the base."""
    return {path: leaf.get_value().size for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}


def _expert_parameters(base: Mapping[str, int]) -> int:
    return sum(size for path, size in base.items() if _EXPERTS in path)


def _active_kernels(step: TracedStep, base: Mapping[str, int]) -> int:
    """The number of parameters that one position uses in all kernels, and in the embedding if it is the head as well."""
    ends = (".kernel", ".embedding") if isinstance(step.model, LanguageModel) and step.model.tied else (".kernel",)
    kernels = {path: size for path, size in base.items() if path.endswith(ends)}
    return sum(kernels.values()) - round((1 - step.use.active) * _expert_parameters(kernels))
