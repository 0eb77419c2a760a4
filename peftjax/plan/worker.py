"""Plans made in a process of their own."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from peftjax.core import config as configs
from peftjax.core.errors import UserError
from peftjax.plan import devices
from peftjax.plan.devices import Device
from peftjax.plan.measure import measure
from peftjax.plan.plan import Plan


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
