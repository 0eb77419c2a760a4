"""What a QLoRA train step needs of a device's memory, by the compiler of that device: no such device is needed.

    python benchmarks/qlora_memory.py 65b-a6000 [--base=bfloat16] [--text=FILE] [--config.train.loss_chunk=64 ...]

Prints arguments, temporaries and the sum for each device, and what it leaves free; --base=bfloat16 is the same step
over a base that is not quantized, --text writes down the compiled program. The train step is that of `python -m
peftjax.train`, from shapes alone. TPU cases need the extra `tpu`, GPU cases the extra `cuda-plan`. `python -m
peftjax.plan` says more, of any config.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# before jax: it shall not look for hardware
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

from peftjax.plan import devices
from peftjax.plan import measure as plan
from peftjax.plan.devices import GIB
from peftjax.training import config as configs

HERE = Path(__file__).parent


def case(model: str, device: str, rank: int, length: int, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    own = {"method.rank": rank, "data.max_length": length, "model.quantize": "nf4", "model.remat": "block"}
    return model, device, own | {"model.dtype": "bfloat16", "train.batch_size": 1} | fields


CASES = {
    "7b-24gb": case("llama-7b", "rtx3090", 16, 512),
    "8b-v5e": case("llama-3.1-8b", "v5e:1x1", 16, 2048),
    "65b-a6000": case("llama-65b", "a6000", 64, 512, **{"optim.momentum_dtype": "bfloat16"}),
    "70b-v5e-4x4": case("llama-3.1-70b", "v5e:4x4", 16, 2048, **{"train.batch_size": 16, "mesh.fsdp": 16}),
}


def sizes(model: str) -> dict[str, Any]:
    """A model's config.json."""
    return json.loads((HERE / "models" / model / "config.json").read_text())


def make_config(fields: dict[str, Any], overrides: Sequence[str]) -> Any:
    """The config that `python -m peftjax.train --config=configs/base.py` would make of these."""
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    base = HERE.parent / "configs" / "base.py"
    return configs.load(base, [*given, *overrides])


def main(arguments: Sequence[str]) -> None:
    name, *rest = arguments
    model, device_name, fields = CASES[name]
    if dumped := [item.removeprefix("--text=") for item in rest if item.startswith("--text=")]:
        rest = [item for item in rest if not item.startswith("--text=")]
    if "--base=bfloat16" in rest:
        rest.remove("--base=bfloat16")
        fields = fields | {"model.quantize": ""}
    config, device = make_config(fields, rest), devices.find(device_name)
    if missing := device.missing():
        sys.exit(missing)
    print(
        f"{name}: {model} on {device_name}: {' '.join(rest)} {config.model.quantize or config.model.dtype}", flush=True
    )
    started = time.perf_counter()
    mesh = device.mesh(config.mesh)
    compiled = plan.compile_step(plan.sketch(config, sizes(model), mesh), device, mesh)
    found = compiled.memory_analysis()
    if dumped:
        Path(dumped[0]).write_text(compiled.as_text())
    total = (
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    )
    print(
        f"arguments {found.argument_size_in_bytes / GIB:.2f} GiB, temporaries {found.temp_size_in_bytes / GIB:.2f}, outputs "
        f"{found.output_size_in_bytes / GIB:.2f} (of which in place of arguments {found.alias_size_in_bytes / GIB:.2f}); "
        f"total {total / GIB:.2f} of {device.memory / GIB:.2f}, {(device.memory - total) / GIB:.2f} left"
        f"  [{time.perf_counter() - started:.0f} s to compile]"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
