"""Plans as text and tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftjax.core.errors import UserError
from peftjax.core.units import format_bytes
from peftjax.plan import devices
from peftjax.plan.advice import more_devices
from peftjax.plan.plan import Plan


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
