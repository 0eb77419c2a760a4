"""Will it fit, and how fast could it be: the train step of a config, compiled for devices that need not be there.

    python -m peftjax.plan --config=FILE --device=v5e:4x4 [--config.x=y ...] [--search=batch|length|rank] [--compare]

Of the model only config.json is read. The compiler is the device's own, the TPU's (extra `tpu`) or XLA:GPU (extra
`cuda-plan`); where it is not installed, what it would say is estimated, and every line that rests on that says so.
docs/plan.md explains what is printed.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftjax import cost, devices, methods, sharding, tasks
from peftjax.core import cli, variables
from peftjax.core import config as configs
from peftjax.core.errors import UserError
from peftjax.data.rows import empty_row
from peftjax.devices import GIB, Device
from peftjax.io.bitsandbytes import check_config
from peftjax.io.hf_adapter import weights_bytes
from peftjax.io.hf_files import read_json, resolve
from peftjax.io.hf_model import make_quantized
from peftjax.methods.attach import attach_unchecked
from peftjax.metrics import format_bytes, write_atomically
from peftjax.models import from_hf_config
from peftjax.step import TrainState, abstract_state, prepare

Arguments = tuple[TrainState, variables.FlatTree, dict[str, jax.ShapeDtypeStruct]]  # state, frozen, batch


# --- The train step from shapes alone ---


def abstract_model(config: Any, hf_config: Mapping[str, Any]) -> Any:
    """The model that `config` trains, quantized and with its adapters, as shapes. Outside of any `jax.set_mesh`: within,
    `nnx.eval_shape` would make a plain array of a quantized kernel."""
    dtype, param_dtype, remat = (config.model[field] for field in ("dtype", "param_dtype", "remat"))
    fields = dict(hf_config)
    stored = fields.pop("quantization_config", None)  # a directory that is quantized already
    quantize = config.model.quantize
    if stored:
        check_config(stored, config.model.path)
        quantize = "nf4" if stored.get("bnb_4bit_use_double_quant") else "nf4_single"
    head = tasks.head_options(config, config.task.labels)
    family = from_hf_config(fields, dtype=dtype, param_dtype=param_dtype, remat=remat, **head)
    method = methods.from_config(config.method).tokenized(lambda text: [0])  # which tokens does not change a shape

    def make() -> Any:
        model = make_quantized(family, quantize or None, config.model.skip_quantize, config.seed)
        method.check(model)
        # `attach` would ask for the data or the kernels that the adapters begin with, which do not change their shapes
        return attach_unchecked(model, method, "default", rngs=nnx.Rngs(config.seed))

    return nnx.eval_shape(make)


def abstract_step(config: Any, model: Any, mesh: Mesh) -> tuple[Any, Arguments]:
    """The train step that `config` describes and its arguments (state, frozen, batch) as shapes with their places."""
    method = methods.from_config(config.method)
    model.train()
    _, leaves = variables.flat(model)
    variables.update(model, {path: place(leaf.get_value(), leaf.axes, mesh) for path, leaf in leaves.items()})
    loss = tasks.of(config).totals(config.train.loss_chunk)
    step, state, frozen = prepare(config, model, method, loss, abstract_state)
    image = (*model.config.image, model.config.channels) if hasattr(model.config, "image") else ()
    row = empty_row(config, classes=len(getattr(model.config, "labels", ())), image=image)
    lead = (config.train.accumulate, config.train.batch_size // config.train.accumulate)
    batch = {
        name: place(jax.ShapeDtypeStruct((*lead, *array.shape), array.dtype), sharding.batch_axes(array.ndim), mesh)
        for name, array in row.items()
    }
    return step.jitted(state), (state, frozen, batch)


def place(value: Any, axes: Sequence[str | None], mesh: Mesh) -> Any:
    """Shapes with the places that `sharding.placement` gives them."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        value,
        sharding.placement(value, axes, mesh),
    )


# --- What it needs ---


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step takes. Bytes are those of one device, operations those of all devices together.

    Without a compiler, temporaries and moved are estimates, and collectives are not known.
    """

    device: str
    devices: int
    memory: int  # that a program can have
    mesh: dict[str, int]  # the axes that split something
    compiler: str  # empty: it is not installed
    arguments: dict[str, int]  # by what they are
    padding: int  # what the compiler's layouts add to them
    temporaries: int
    others: int  # the program itself, and results that do not take an argument's place
    gradients: int  # a part of temporaries; an estimate, since no compiler tells
    positions: int  # of a batch's sequences, padding included; of images, their patches and class tokens
    base_parameters: int
    trained_parameters: int
    adapter_bytes: int  # of the file; 0 in full fine-tuning
    full_bytes: int  # parameters, gradients and optimizer state of full fine-tuning, without activations
    flops: int  # of the matrix products
    closed_flops: int  # 4 (6 in full fine-tuning) for each parameter of a kernel at each position
    moved: int  # read from and written to the device's memory
    collectives: dict[str, tuple[int, int]]  # by kind, how many and the bytes sent
    refused: str = ""  # what the TPU compiler said, which makes no program that does not fit
    advice: tuple[tuple[str, int], ...] = ()  # what to change, and what it saves

    @property
    def needed(self) -> int:
        """Bytes of a device's memory."""
        return sum(self.arguments.values()) + self.padding + self.temporaries + self.others

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    def seconds(self) -> dict[str, float]:
        """The least that a step can take, by what bounds it; empty for a device without a data sheet."""
        chip = devices.find(self.device).chip
        if chip is None:
            return {}
        sent = sum(size for _, size in self.collectives.values())
        found = {
            "products": self.flops / self.devices / chip.flops,
            "memory": self.moved / chip.bandwidth,
            "links": sent / chip.links,
        }
        return {name: value for name, value in found.items() if value}


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A train step that is traced, not compiled."""

    model: Any
    arguments: Arguments
    traced: Any
    groups: dict[str, int]  # bytes of a device's share of the arguments, by what they are
    gradients: int  # bytes of a device's share of them
    live: int  # `cost.live_bytes` over the number of devices: an estimate of the temporaries

    @property
    def needed(self) -> int:
        return sum(self.groups.values()) + self.live


def sketch(config: Any, hf_config: Mapping[str, Any], mesh: Mesh) -> Sketch:
    """The train step of `config` on a mesh, traced.

    Raises:
        UserError: as `tasks.check_length`, building the model and attaching the method do.
    """
    model = abstract_model(config, hf_config)
    tasks.check_length(config, model, mesh)
    with jax.set_mesh(mesh):
        step, arguments = abstract_step(config, model, mesh)
        traced = step.trace(*arguments)
    state, frozen, batch = arguments
    base = {path for path, leaf in variables.flat(model)[1].items() if type(leaf) is nnx.Param}
    full = methods.from_config(config.method).trains is nnx.Param
    groups = {
        "frozen base": _share([leaf for path, leaf in frozen.items() if path in base]),
        "adapters' frozen parts": _share([leaf for path, leaf in frozen.items() if path not in base]),
        "parameters, all trained" if full else "adapters": _share(state.trainable),
        "optimizer state": _share((state.step, state.optimizer, state.key)),
        "batch": _share(batch),
    }
    return Sketch(
        model=model,
        arguments=arguments,
        traced=traced,
        groups={name: size for name, size in groups.items() if size},
        gradients=_share(state.trainable, 32 if config.train.accumulate > 1 else 0),
        live=cost.live_bytes(traced.jaxpr.jaxpr) // mesh.size,
    )


def _share(tree: Any, bits: int = 0) -> int:
    """Bytes of what one device holds of the leaves, an element in so many bits, or in its own number (4 of int4)."""
    leaves = jax.tree.leaves(tree)
    return sum(
        -(-math.prod(leaf.sharding.shard_shape(leaf.shape)) * (bits or cost.bits(leaf.dtype)) // 8) for leaf in leaves
    )


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
        flops=cost.matmul_flops(drawn.traced.jaxpr.jaxpr),
        closed_flops=(6 if full else 4) * _kernel_parameters(drawn.model) * positions,
        **(_compile(drawn, config, device, mesh) if there else _estimate(drawn, config)),
    )
    if advise and not plan.fits:
        plan = dataclasses.replace(plan, advice=tuple(_advice(config, hf_config, mesh, drawn.needed)))
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
    traffic = cost.traffic(compiled.as_text())
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


def changed(config: Any, **fields: Any) -> Any:
    """The config with other values of some fields, named as in model__remat="block", or of a whole section."""
    values = config.to_dict()
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section] = values[section] | {field: value} if field else value
    return configs.validate(values, method_defaults=methods.method_defaults)


def full_fine_tuning(config: Any) -> Any:
    """The same training without a method."""
    return changed(config, method=methods.method_defaults("full"), model__quantize="", model__skip_quantize=())


# --- What to change ---


def _advice(config: Any, hf_config: Mapping[str, Any], mesh: Mesh, now: int) -> Iterator[tuple[str, int]]:
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


# --- In a process of its own ---


def ask(config: Any, hf_config: Mapping[str, Any], device: Device, *, advise: bool = True) -> Plan:
    """`measure` in another process, since compilers must find their environment before jax is imported, and may take
    it with them when they fail.

    Raises:
        UserError: what was wrong with the request; or the process ended without an answer.
    """
    request = {"config": config.to_dict(), "hf_config": hf_config, "device": device.name, "advise": advise}
    command = [sys.executable, "-c", "from peftjax.plan import answer; answer()"]
    environment = os.environ | device.environment()
    ended = subprocess.run(
        command, input=json.dumps(request), env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"the process that compiles for {device.name} ended with code {ended.returncode}: {last[0]}")
    reply = json.loads(ended.stdout.splitlines()[-1])
    if "error" in reply:
        raise UserError(reply["error"])
    return Plan(**reply)


def answer() -> None:
    """The other end of `ask`."""
    request = json.load(sys.stdin)
    config = configs.from_json(json.dumps(request["config"]))
    try:
        plan = measure(config, request["hf_config"], devices.find(request["device"]), advise=request["advise"])
        print(json.dumps(dataclasses.asdict(plan)))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))


# --- Several of them ---

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


# --- What is printed ---


def show(console: Console, config: Any, plan: Plan, missing: str) -> None:
    """All of a plan."""
    device = devices.find(plan.device)
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(f"[bold]{config.model.path}[/]: {_count(plan.base_parameters)} parameters, {_format(config)}")
    trains = f"{_count(plan.trained_parameters)}, {plan.trained_parameters / plan.base_parameters:.2%} of their number"
    console.print(f"{config.method.name}: trains {trains}")
    console.print(f"{plan.device}: {plan.devices} device{'s' * (plan.devices > 1)}{mesh and f', mesh {mesh}'}")
    if plan.compiler:
        console.print(f"compiled by {plan.compiler}, jax {jax.__version__}")
    else:
        console.print(f"[yellow]not compiled: {missing}. Lines marked estimate rest on no compiler.[/]")
    console.print()
    console.print(verdict(plan))
    if plan.refused:
        console.print(f"The compiler made no program: {plan.refused}")
    elif plan.fits and device.platform == "cuda" and plan.needed > 0.74 * plan.memory:
        console.print("jax takes 75 % of a GPU's memory unless told: run with XLA_PYTHON_CLIENT_MEM_FRACTION=.98")
    parts = math.prod(plan.mesh.get(axis, 1) for axis in ("data", "fsdp"))
    if (rows := config.train.batch_size // config.train.accumulate) % parts:
        console.print(
            f"[yellow]Each device computes all {rows} sequences: they cannot be split over {parts} devices; let "
            f"train.batch_size / train.accumulate be a multiple of {parts}.[/]"
        )
    console.print(_memory_table(plan))
    console.print(_step_table(plan, config))
    if not plan.fits:
        console.print(_advice_table(plan))


def verdict(plan: Plan) -> str:
    sizes = f"{format_bytes(plan.needed)} of {format_bytes(plan.memory)} on each device"
    sure = "" if plan.compiler else "estimate: "
    if plan.fits:
        return f"{sure}[bold green]fits[/]: {sizes}, {format_bytes(plan.memory - plan.needed)} left"
    return f"{sure}[bold red]does not fit[/]: {sizes}, {format_bytes(plan.needed - plan.memory)} too much"


def _memory_table(plan: Plan) -> Table:
    table = _table("memory of each device", "", "", "known by")
    said = plan.compiler or "estimate"
    rows = [(name, size, "shapes") for name, size in plan.arguments.items()]
    rows += [("padding of their layouts", plan.padding, said)] if plan.padding > 0 else []
    rows += [("activations and temporaries", plan.temporaries, said)]
    for name, size, how in rows:
        table.add_row(name, format_bytes(size), f"{size / plan.needed:.1%}", how)
    table.add_row("  of them gradients", format_bytes(plan.gradients), "", "estimate")
    if plan.others > 0:
        table.add_row("program and other results", format_bytes(plan.others), f"{plan.others / plan.needed:.1%}", said)
    table.add_section()
    table.add_row("in all", format_bytes(plan.needed), "", f"of {format_bytes(plan.memory)}")
    return table


def _step_table(plan: Plan, config: Any) -> Table:
    table = _table("a step", "", "known by")
    said = plan.compiler if plan.compiler and not plan.refused else "estimate"
    factor = 6 if config.method.name == "full" else 4
    table.add_row("positions", f"{plan.positions:,}", "shapes")
    table.add_row("matrix products", f"{_count(plan.flops)}FLOP", "the traced program")
    table.add_row(f"  {factor} x kernels x positions", f"{_count(plan.closed_flops)}FLOP", "shapes")
    table.add_row("memory traffic, a device", format_bytes(plan.moved), said)
    for kind, (count, size) in sorted(plan.collectives.items(), key=lambda item: -item[1][1]):
        table.add_row(f"{kind} x {count:,}", f"{format_bytes(size)} sent", said)
    if plan.devices > 1 and not plan.compiler:
        table.add_row("collectives", "not known", "needs the compiler")
    if times := plan.seconds():
        table.add_section()
        for name, value in times.items():
            bound = name == max(times, key=times.__getitem__)
            table.add_row(
                f"time, by {name}", f"{'[bold]' * bound}{_clock(value)}", "data sheet" + ", the bound" * bound
            )
        sure = "roofline" if plan.compiler and not plan.refused else "roofline, estimate"
        table.add_row("speed, at that bound", f"{plan.positions / max(times.values()):,.0f} tokens/s", sure)
    table.add_section()
    if plan.adapter_bytes:
        table.add_row("adapter file", f"{plan.adapter_bytes:,} bytes", "shapes")
    table.add_row("full fine-tuning, a device", format_bytes(plan.full_bytes), "estimate, no activations")
    return table


def _advice_table(plan: Plan) -> Table:
    table = _table("to make it fit", "saves", "")
    over = plan.needed - plan.memory
    for setting, saved in plan.advice:
        flags = " ".join(f"--config.{item}" for item in setting.split())
        table.add_row(flags, format_bytes(saved), "estimate" + ("; enough alone" if saved >= over else ""))
    if (larger := more_devices(plan)) is not None:
        name, each = larger
        table.add_row(
            f"--device={name} --config.mesh.fsdp=-1", format_bytes(plan.needed - each), "estimate; enough alone"
        )
    return table


def search_table(kind: str, probes: Sequence[tuple[int, Plan | UserError]]) -> Table:
    table = _table(kind, "needs", "of", "")
    for value, plan in sorted(probes, key=lambda item: item[0]):
        if isinstance(plan, UserError):
            table.add_row(str(value), "-", "-", Text(str(plan)))
        else:
            table.add_row(str(value), format_bytes(plan.needed), format_bytes(plan.memory), _fits(plan))
    return table


def compare_table(plans: Mapping[str, Plan | UserError]) -> Table:
    table = _table("", "trains", "adapter file", "memory", "products", "")
    for name, plan in plans.items():
        if isinstance(plan, UserError):
            table.add_row(name, "-", "-", "-", "-", Text(str(plan)))
            continue
        file = format_bytes(plan.adapter_bytes) if plan.adapter_bytes else "the model"
        trains, flops = _count(plan.trained_parameters), f"{_count(plan.flops)}FLOP"
        table.add_row(name, trains, file, format_bytes(plan.needed), flops, _fits(plan))
    return table


def _fits(plan: Plan) -> str:
    return ("[green]fits[/]" if plan.fits else "[red]does not fit[/]") + ("" if plan.compiler else " (estimate)")


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in others[:-1]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(others[-1])
    return table


def _format(config: Any) -> str:
    return (
        f"kernels in {config.model.quantize}"
        if config.model.quantize
        else config.model.param_dtype or config.model.dtype
    )


def _count(value: float) -> str:
    """1234567 as 1.23 M."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "


def _clock(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", required=True, help="v5e:4x4, a6000, h100:8, cpu and so on")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--search", choices=("batch", "length", "rank"), help="the largest that fits")
    several.add_argument("--compare", action="store_true", help="full fine-tuning, LoRA, QLoRA and the config's method")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def main(argv: list[str]) -> int:
    summary = "What a config's train step needs of a device that need not be there. Exits with 1 if it does not fit."
    given = cli.parse(argv, "plan", summary, workdir=False, options=_options)
    device = devices.find(given.device)
    config = configs.load(given.config, given.overrides, method_defaults=methods.method_defaults)
    shape = device.mesh_shape(config.mesh)
    directory = resolve(config.model.path, config.model.revision, files=("config.json",))
    hf_config = read_json(directory / "config.json")
    console = Console(highlight=False, soft_wrap=True)
    several = bool(given.search or given.compare)

    def probe(other: Any) -> Plan:
        with Console(stderr=True).status(f"compiling for {device.name}"):
            return ask(other, hf_config, device, advise=not several)

    if missing := device.missing():
        console.print(f"[yellow]{missing}[/]\n") if several else None
    if given.search:
        parts = shape["data"] * shape["fsdp"]
        probes = []
        for value, found in search(given.search, config, parts, probe):
            probes.append((value, found))
        console.print(search_table(given.search, probes))
        best = max((value for value, found in probes if isinstance(found, Plan) and found.fits), default=None)
        console.print(f"largest {given.search} that fits: {best or 'none'}")
        result: Any = [{given.search: value} | _record(found) for value, found in probes]
        code = best is None
    elif given.compare:
        plans = {name: _asked(probe, other) for name, other in compared(config).items()}
        console.print(compare_table(plans))
        result, code = {name: _record(plan) for name, plan in plans.items()}, False
    else:
        plan = probe(config)
        show(console, config, plan, missing)
        result, code = _record(plan), not plan.fits
    if given.json:
        write_atomically(given.json, json.dumps(result, indent=1) + "\n")
    return int(code)


def _asked(probe: Probe, config: Any) -> Plan | UserError:
    try:
        return probe(config)
    except UserError as error:
        return error


def _record(plan: Plan | UserError) -> dict[str, Any]:
    if isinstance(plan, UserError):
        return {"error": str(plan)}
    bound = plan.seconds()
    return dataclasses.asdict(plan) | {"needed": plan.needed, "fits": plan.fits, "seconds": bound}


if __name__ == "__main__":
    cli.run(main)
