"""The command that plans a training run: does its train step fit a device, and how fast can it be?

    peftjax plan --config=FILE --device=v5e:4x4 [--config.x=y ...] [--members=N]
        [--search=batch|length|rank|members] [--compare] [--sweep] [--sweep.FIELD=V,V] [--or] [--trials=N]

The devices need not be attached, and no weights of the model are read. The step is compiled by the device's own
compiler: the TPU's (extra `tpu`) or XLA:GPU (extra `cuda-plan`). If it is not installed, its figures are estimated, and
every line that depends on them says so. docs/plan.md explains the output.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.json_numbers import to_json
from peftjax.core.terminal import make_console
from peftjax.io.hf_config import read_fields, stored_quantization
from peftjax.io.hf_files import find_model
from peftjax.plan import devices
from peftjax.plan.devices import Device
from peftjax.plan.plan import Plan
from peftjax.plan.search import search
from peftjax.plan.tables import compare_table, search_table, show
from peftjax.plan.variants import comparison
from peftjax.plan.worker import ask
from peftjax.training import config as configs
from peftjax.training import precision, space, start_from
from peftjax.training.alike import populations
from peftjax.training.concurrency import one_at_a_time, usable
from peftjax.training.config import Config

_SUMMARY = """\
Plan a training run: whether its train step fits a device, and how fast it can be at best.

The devices need not be attached, and no weights are read. Exits with 0 if the step fits and with 1 if it does not."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", required=True, metavar="NAME", help="Target device: v5e:4x4, a6000, h100:8, cpu, ..."
    )
    parser.add_argument(
        "--members",
        type=int,
        default=1,
        metavar="N",
        help="Number of runs of a sweep that are trained together over one frozen base (default: 1)",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--search",
        choices=("batch", "length", "rank", "members"),
        help="Find the largest batch size, sequence length, rank or number of members that fits",
    )
    modes.add_argument(
        "--compare", action="store_true", help="Compare full fine-tuning, LoRA, QLoRA and the config's method"
    )
    modes.add_argument(
        "--sweep",
        action="store_true",
        help="Find how many runs of the config file's search space fit side by side, and what their steps cost",
    )
    parser.add_argument(
        "--sweep.FIELD", metavar="V,V", help="Plan a sweep over these values of a config field, as for peftjax sweep"
    )
    space.add_search_options(parser)
    parser.add_argument("--json", type=cli.path, metavar="FILE", help="Also write all figures to FILE")


def main(argv: list[str]) -> int:
    """Run the command and return its exit code: 0 if the step fits, 1 if it does not."""
    fields, rest = space.split_arguments(argv)
    given = cli.parse_command(rest, "plan", _SUMMARY, workdir=False, options=_add_options)
    if given.members < 1:
        raise UserError(f"--members={given.members} must be at least 1")
    space.check_search_options(given)
    cli.require_value(given, "json")
    output = Path(given.json) if given.json else None
    if output:  # before the plan, which may take minutes
        if output.is_dir():
            raise UserError(f"--json={output} is a directory; give the name of a file")
        output.parent.mkdir(parents=True, exist_ok=True)
    swept = bool(given.sweep or fields or given.trials)
    if swept and (given.search or given.compare or given.members > 1):
        raise UserError("a sweep cannot be combined with --members, --search or --compare; omit one of them")
    device = devices.find(given.device)
    config = start_from.with_options(configs.load(given.config, given.overrides))
    shape = device.mesh_shape(config.mesh.sizes)
    fields_of = cache(_hf_config)  # runs of a sweep may have different models
    config = precision.resolve_dtype(config, fields_of(config.model.path, config.model.revision), device.platform)
    console = make_console(soft_wrap=True)
    one = not (given.search or given.compare or swept)

    def probe(other: Config, members: int, population: Sequence[Config] = ()) -> Plan:
        with make_console(file=sys.stderr).status(Text(f"compiling for {device.name}")):
            hf_config = fields_of(other.model.path, other.model.revision)
            return ask(other, hf_config, device, members=members, population=population, advise=one)

    result: Any
    missing = device.missing()
    if missing and not one:
        console.print(f"{missing}\n", style="yellow")
    if given.search:
        parts = shape["data"] * shape["fsdp"]
        positions = fields_of(config.model.path, config.model.revision).get("max_position_embeddings")
        most = positions if given.search == "length" else None
        probes = list(search(given.search, config, parts, probe, given.members, most))
        fits, result = _search(console, given.search, probes)
    elif swept:
        runs = _swept_configs(given, fields)
        fits, result = _plan_sweep(console, populations(runs, lambda config: config), device, probe)
    elif given.compare:
        fits, result = _compare(console, config, partial(probe, members=given.members))
    else:
        plan = probe(config, given.members)
        show(console, config, plan, missing)
        fits, result = plan.fits, _record(plan)
    if output:
        write_atomically(output, to_json(result, indent=1) + "\n")
    return 0 if fits else 1


def _hf_config(path: str, revision: str | None) -> dict[str, Any]:
    """The fields of a model's config.json, with the quantization of its weights."""
    directory = find_model(path, revision, files=("config.json",))
    return read_fields(directory)[0] | {"quantization_config": stored_quantization(directory)}


def _search(
    console: Console, kind: str, probes: Sequence[tuple[int, Plan | UserError]]
) -> tuple[bool, list[dict[str, Any]]]:
    """Print a search; return whether any value fits, and the record of all plans."""
    best = max((value for value, plan in probes if isinstance(plan, Plan) and plan.fits), default=None)
    console.print(search_table(kind, probes))
    name = "number of members" if kind == "members" else kind
    console.print(f"largest {name} that fits: {best or 'none'}")
    return best is not None, [{kind: value} | _record(plan) for value, plan in probes]


def _swept_configs(given: argparse.Namespace, fields: Sequence[str]) -> list[Config]:
    """The config of each run that `peftjax sweep` would train with the same arguments in a new workdir."""
    spaces = space.read_spaces(given.config, fields)
    chosen = space.chosen_values(given.config, given.overrides, spaces, given.trials, given.search_seed)
    different = dict.fromkeys(tuple(texts.items()) for texts in chosen)  # as in a sweep, repeated draws count once
    found = [space.load_run(given.config, given.overrides, spaces, dict(texts)) for texts in different]
    return [start_from.with_options(config) for config in found]


def _plan_sweep(
    console: Console, populations: Sequence[Sequence[Config]], device: Device, probe: Callable[..., Plan]
) -> tuple[bool, list[list[dict[str, Any]]]]:
    """Print how many members of each population fit; return whether one of each does, and the record of all plans."""
    everything, records = True, []
    for number, population in enumerate(populations, 1):

        def probe_members(config: Config, members: int, population: Sequence[Config] = population) -> Plan:
            plan = probe(config, members, population)
            return dataclasses.replace(plan, memory=usable(plan.memory, device.platform))

        count = len(population)
        alone = one_at_a_time(population[0], device.platform)
        probes = list(search("members", population[0], 1, probe_members, most=1 if alone else count))
        best = max((value for value, plan in probes if isinstance(plan, Plan) and plan.fits), default=0)
        console.print(f"population {number} of {len(populations)}: {count} run{'s' * (count > 1)}")
        console.print(search_table("members", probes))
        why = " (without a shared base, runs are trained one at a time on a CPU)" if alone and count > 1 else ""
        console.print(f"runs side by side: {best} of {count}{why}\n" if best else "not even one run fits\n")
        everything = everything and best > 0
        records.append([{"members": value} | _record(plan) for value, plan in probes])
    return everything, records


def _compare(console: Console, config: Config, probe: Callable[[Config], Plan]) -> tuple[bool, dict[str, Any]]:
    """Print a comparison; return True, and the record of all plans."""
    plans = {name: _plan_or_error(probe, other) for name, other in comparison(config).items()}
    console.print(compare_table(plans))
    return True, {name: _record(plan) for name, plan in plans.items()}


def _plan_or_error(probe: Callable[[Config], Plan], config: Config) -> Plan | UserError:
    try:
        return probe(config)
    except UserError as error:
        return error


def _record(plan: Plan | UserError) -> dict[str, Any]:
    """A plan for the JSON file, with its derived figures."""
    if isinstance(plan, UserError):
        return {"error": str(plan)}
    return dataclasses.asdict(plan) | {"needed": plan.needed, "fits": plan.fits, "seconds": plan.seconds()}


if __name__ == "__main__":
    cli.run(main)
