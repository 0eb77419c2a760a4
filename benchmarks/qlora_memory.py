"""The device memory that a QLoRA train step needs, according to the device's compiler.

    python benchmarks/qlora_memory.py 65b-a6000 [--base=bfloat16] [--text=FILE] [--config.train.loss_chunk=64 ...]

Prints the bytes of arguments, temporaries and outputs on each device, their total and the memory left. --base=bfloat16
compiles the same step over a base that is not quantized; --text writes the compiled program to a file. The step is the one
that `peftjax train` runs, built from shapes alone. The device need not be attached: TPU cases need the extra
`tpu`, GPU cases the extra `cuda-plan`. `peftjax plan` prints more, for any config.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# before jax is imported, so that it does not look for hardware
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

from peftjax.plan import devices
from peftjax.plan.chips import GIB
from peftjax.plan.measure import compile_step
from peftjax.plan.traced import trace_step
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
    """The fields of a model's config.json."""
    return json.loads((HERE / "models" / model / "config.json").read_text())


def make_config(fields: dict[str, Any], overrides: Sequence[str]) -> Any:
    """The config of `peftjax train --config=configs/base.py` with these fields and overrides."""
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    base = HERE.parent / "configs" / "base.py"
    return configs.load(base, [*given, *overrides])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--base", choices=("nf4", "bfloat16"), default="nf4", help="Format of the base")
    parser.add_argument("--text", type=Path, metavar="FILE", help="File for the compiled program")
    options, overrides = parser.parse_known_args(arguments)
    model, device_name, fields = CASES[options.case]
    if options.base == "bfloat16":
        fields = fields | {"model.quantize": ""}
    config, device = make_config(fields, overrides), devices.find(device_name)
    if missing := device.missing():
        sys.exit(missing)
    base = config.model.quantize or config.model.dtype
    print(f"{options.case}: {model} on {device_name}: {' '.join(overrides)} {base}", flush=True)
    started = time.perf_counter()
    mesh = device.mesh(config.mesh.sizes)
    compiled = compile_step(trace_step(config, sizes(model), mesh), device, mesh)
    found = compiled.memory_analysis()
    assert found is not None
    if options.text:
        options.text.write_text(compiled.as_text() or "")
    total = (
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    )
    print(
        f"arguments {found.argument_size_in_bytes / GIB:.2f} GiB, temporaries {found.temp_size_in_bytes / GIB:.2f}, outputs "
        f"{found.output_size_in_bytes / GIB:.2f} ({found.alias_size_in_bytes / GIB:.2f} of them in the arguments' memory); "
        f"total {total / GIB:.2f} of {device.memory / GIB:.2f}, {(device.memory - total) / GIB:.2f} left"
        f"  [compiled in {time.perf_counter() - started:.0f} s]"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
