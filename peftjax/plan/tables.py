"""Plans as printed text and tables."""

from collections.abc import Mapping, Sequence

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.core.terminal import simple_table
from peftjax.core.units import format_bytes
from peftjax.plan import devices
from peftjax.plan.advice import more_devices
from peftjax.plan.plan import Plan
from peftjax.training.config import Config

# `Plan` has names that its JSON keeps; these rows read better
_ARGUMENTS = {"adapters' frozen parts": "frozen adapter constants", "parameters, all trained": "trainable parameters"}
_TIMES = {"products": "compute time", "memory": "memory access time", "links": "communication time"}


def show(console: Console, config: Config, plan: Plan, missing: str) -> None:
    """Print a plan to a console from `make_console`. missing: how to install the compiler, if it is not installed."""
    _print_setup(console, config, plan, missing)
    console.print()
    console.print(_verdict(plan))
    for note in _notes(config, plan):
        console.print(note)
    console.print(_memory_table(plan))
    console.print(_step_table(plan, config))
    if not plan.fits:
        console.print(_advice_table(plan))


def _print_setup(console: Console, config: Config, plan: Plan, missing: str) -> None:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    share = f"{plan.trained_parameters / plan.base_parameters:.2%} of the base"
    active = f", {_count(plan.active_parameters)} active" if _has_experts(plan) else ""
    quantized = config.model.quantize and f"{config.model.quantize} kernels"
    weights = quantized or config.model.param_dtype or config.model.dtype
    base = f"{_count(plan.base_parameters)} parameters{active}, {weights}"
    console.print(Text.assemble((config.model.path, "bold"), f": {base}"))
    trained = f"{_count(plan.trained_parameters)} trainable parameters, {share}"
    together = f"{plan.members} members trained together, each with " if plan.members > 1 else ""
    console.print(f"{config.method.method}: {together}{trained}")
    console.print(f"attention: {plan.attention} (model.attention={config.model.attention!r})")
    console.print(f"{plan.device}: {plan.devices} device{'s' * (plan.devices > 1)}{mesh and f', mesh {mesh}'}")
    if plan.compiler:
        console.print(f"compiled by {plan.compiler}, jax {jax.__version__}")
    else:
        console.print(
            f"not compiled: {missing}. Lines marked as estimates do not come from a compiler.", style="yellow"
        )


def _verdict(plan: Plan) -> Text:
    """Whether the step fits, and by how much."""
    certainty, free = "" if plan.compiler else "estimate: ", plan.memory - plan.needed
    verdict = ("fits", "bold green") if plan.fits else ("does not fit", "bold red")
    rest = f"{format_bytes(free)} free" if plan.fits else f"{format_bytes(-free)} over"
    sizes = f": {format_bytes(plan.needed)} of {format_bytes(plan.memory)} per device, {rest}"
    return Text.assemble(certainty, verdict, sizes)


def _notes(config: Config, plan: Plan) -> list[Text]:
    notes = []
    if plan.refused:
        notes.append(Text(f"The compiler rejected the program: {plan.refused}"))
    elif plan.fits and devices.find(plan.device).platform == "cuda" and plan.needed > 0.74 * plan.memory:
        notes.append(
            Text("By default, jax uses only 75% of a GPU's memory; set XLA_PYTHON_CLIENT_MEM_FRACTION=.98 for the run.")
        )
    if warning := sharding.uneven_rows(config.train.batch_size // config.train.accumulate, plan.mesh):
        notes.append(Text(f"Warning: {warning}.", "yellow"))
    return notes


def _memory_table(plan: Plan) -> Table:
    table = _table("memory per device", "", "", "source")
    source = plan.compiler or "estimate"
    rows = [(_ARGUMENTS.get(name, name), size, "shapes") for name, size in plan.arguments.items()]
    if plan.padding > 0:
        rows.append(("padding of the arguments", plan.padding, source))
    rows.append(("activations and temporaries", plan.temporaries, source))
    for name, size, origin in rows:
        table.add_row(name, format_bytes(size), f"{size / plan.needed:.1%}", origin)
    table.add_row("  including gradients", format_bytes(plan.gradients), "", "estimate")
    if plan.others > 0:
        share = f"{plan.others / plan.needed:.1%}"
        table.add_row("program and other outputs", format_bytes(plan.others), share, source)
    table.add_section()
    table.add_row("total", format_bytes(plan.needed), "", f"of {format_bytes(plan.memory)}")
    return table


def _step_table(plan: Plan, config: Config) -> Table:
    table = _table("one step", "", "source")
    compiled = plan.compiler and not plan.refused
    source = plan.compiler if compiled else "estimate"
    factor = 6 if config.method.trains_base else 4
    batches = "all batches" if plan.members > 1 else "a batch"
    table.add_row(f"positions in {batches}", f"{plan.positions:,}", "shapes")
    table.add_row("matrix products", f"{_count(plan.flops)}FLOP", "traced program")
    kernels = "active" if _has_experts(plan) else "kernels"
    table.add_row(f"  {factor} x {kernels} x positions", f"{_count(plan.closed_flops)}FLOP", "shapes")
    table.add_row("memory traffic per device", format_bytes(plan.moved), source)
    for kind, (count, size) in sorted(plan.collectives.items(), key=lambda item: -item[1][1]):
        table.add_row(f"{kind} x {count:,}", f"{format_bytes(size)} sent", source)
    if plan.devices > 1 and not plan.compiler:
        table.add_row("collectives", "unknown", "needs the compiler")
    if times := plan.seconds():
        longest = max(times, key=times.__getitem__)
        table.add_section()
        for name, value in times.items():
            bound = name == longest
            origin = "data sheet (bottleneck)" if bound else "data sheet"
            table.add_row(_TIMES[name], Text(_clock(value), "bold" if bound else ""), origin)
        speed, origin = plan.positions / times[longest], "roofline" if compiled else "roofline, estimate"
        table.add_row("throughput, at most", f"{speed:,.0f} tokens/s", origin)
        if plan.members > 1:
            table.add_row("  of each member", f"{speed / plan.members:,.0f} tokens/s", origin)
    table.add_section()
    if plan.adapter_bytes:
        each = " of each member" * (plan.members > 1)
        table.add_row(f"adapter file{each}", f"{plan.adapter_bytes:,} bytes", "shapes")
    table.add_row("full fine-tuning, per device", format_bytes(plan.full_bytes), "estimate, no activations")
    return table


def _advice_table(plan: Plan) -> Table:
    table = _table("to make it fit", "saves", "")
    excess = plan.needed - plan.memory
    for setting, saved in plan.advice:
        flags = " ".join(f"--config.{item}" for item in setting.split())
        table.add_row(flags, format_bytes(saved), "estimate; enough alone" if saved >= excess else "estimate")
    if (larger := more_devices(plan)) is not None:
        name, each = larger
        flags = f"--device={name} --config.mesh.fsdp=-1"
        table.add_row(flags, format_bytes(plan.needed - each), "estimate; enough alone")
    return table


def search_table(kind: str, probes: Sequence[tuple[int, Plan | UserError]]) -> Table:
    """Return the table of a search: each value with the memory it needs, or why it is not possible.

    Numbers of members also have the least time of a step, and its share for each member.
    """
    timed = kind == "members" and any(isinstance(plan, Plan) and plan.seconds() for _, plan in probes)
    table = _table(kind, "needs", "of", *["step, at least", "each member"] * timed, "")
    for value, plan in sorted(probes, key=lambda item: item[0]):
        if isinstance(plan, UserError):
            table.add_row(str(value), *["-"] * (4 if timed else 2), str(plan))
            continue
        bound = max(plan.seconds().values(), default=0.0)
        times = [_clock(bound), _clock(bound / plan.members)] if timed else []
        table.add_row(str(value), format_bytes(plan.needed), format_bytes(plan.memory), *times, _fits(plan))
    return table


def compare_table(plans: Mapping[str, Plan | UserError]) -> Table:
    """Return the table of a comparison: one row per method, or why it is not possible."""
    table = _table("method", "trainable", "adapter file", "memory", "products", "")
    for name, plan in plans.items():
        if isinstance(plan, UserError):
            table.add_row(name, "-", "-", "-", "-", str(plan))
            continue
        file = format_bytes(plan.adapter_bytes) if plan.adapter_bytes else "full model"
        trainable, flops = _count(plan.trained_parameters), f"{_count(plan.flops)}FLOP"
        table.add_row(name, trainable, file, format_bytes(plan.needed), flops, _fits(plan))
    return table


def _fits(plan: Plan) -> Text:
    fits = ("fits", "green") if plan.fits else ("does not fit", "red")
    return Text.assemble(fits, "" if plan.compiler else " (estimate)")


def _table(first: str, *others: str) -> Table:
    table = simple_table(first)
    for heading in others[:-1]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(others[-1])
    return table


def _has_experts(plan: Plan) -> bool:
    return plan.active_parameters < plan.base_parameters


def _count(value: float) -> str:
    """Format 1234567 as "1.23 M", with a space after numbers below 1000 as well."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "


def _clock(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
