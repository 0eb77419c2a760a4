"""Will it fit, and how fast could it be: the train step of a config, compiled for devices that need not be there.

    python -m peftjax.plan --config=FILE --device=v5e:4x4 [--config.x=y ...] [--search=batch|length|rank] [--compare]

Of the model only config.json is read. The compiler is the device's own, the TPU's (extra `tpu`) or XLA:GPU (extra
`cuda-plan`); where it is not installed, what it would say is estimated, and every line that rests on that says so.
docs/plan.md explains what is printed.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from peftjax import methods
from peftjax.core import cli
from peftjax.core import config as configs
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.io.hf_files import read_json, resolve
from peftjax.plan import devices
from peftjax.plan.plan import Plan
from peftjax.plan.search import Probe, compared, search
from peftjax.plan.tables import compare_table, search_table, show
from peftjax.plan.worker import ask


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
