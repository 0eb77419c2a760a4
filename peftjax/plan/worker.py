"""The process that compiles: plans are made in a separate process.

A compiler must find its environment before jax is imported, and a compiler that fails may take its process with it.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from peftjax.core.errors import UserError
from peftjax.plan import devices
from peftjax.plan.devices import Device
from peftjax.plan.measure import measure
from peftjax.plan.plan import Plan
from peftjax.training import config as configs
from peftjax.training.config import Config


def ask(
    config: Config,
    hf_config: Mapping[str, Any],
    device: Device,
    *,
    members: int = 1,
    population: Sequence[Config] = (),
    advise: bool = True,
) -> Plan:
    """Call `measure` in another process.

    Raises:
        UserError: `measure` raises it, or the process ends without an answer.
    """
    request = {
        "config": configs.to_dict(config),
        "hf_config": hf_config,
        "device": device.name,
        "members": members,
        "population": [configs.to_dict(one) for one in population],
        "advise": advise,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "peftjax.plan.worker"],
        input=json.dumps(request),
        env=os.environ
        | device.environment()
        | {"JAX_TRACEBACK_FILTERING": "off"},  # else jax adds lines after the error
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        message = f"the process that compiles for {device.name} ended with code {ended.returncode}: {last[0]}"
        raise UserError(message) from RuntimeError(ended.stderr)  # its traceback, for PEFTJAX_TRACEBACK=1
    reply = json.loads(ended.stdout.splitlines()[-1])
    if "error" in reply:
        raise UserError(reply["error"])
    return Plan(**reply)


def serve() -> None:
    """Read a request from stdin and print the plan, or the user's mistake, as one line of JSON: the other end of `ask`."""
    request = json.load(sys.stdin)
    config = configs.validate(request["config"])
    try:
        options = {name: request[name] for name in ("members", "advise")}
        population = [configs.validate(one) for one in request["population"]]
        plan = measure(config, request["hf_config"], devices.find(request["device"]), population=population, **options)
        print(json.dumps(dataclasses.asdict(plan)))
    except UserError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    serve()
