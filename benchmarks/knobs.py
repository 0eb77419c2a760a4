"""The effect of single config fields on the memory of a train step, according to the device's compiler.

    python benchmarks/knobs.py [7b-24gb]

Compiles the LoRA step of a case of qlora_memory.py (NF4 base) for 2048 positions: first with model.remat=block and all
other fields at their defaults, then with one change at a time. The device need not be attached; the requirements are
those of qlora_memory.py. model.attention is "auto", which chooses triton for a GPU that is not attached.
"""

import argparse
import sys

from qlora_memory import CASES, make_config, sizes

from peftjax.plan import devices
from peftjax.plan.chips import GIB
from peftjax.plan.measure import compile_step
from peftjax.plan.traced import trace_step

KNOBS = (
    (),
    ("--config.model.remat=offload",),
    ("--config.model.remat=dots",),
    ("--config.model.remat=none",),
    ("--config.train.loss_chunk=2048",),
    ("--config.train.batch_size=4",),
    ("--config.train.batch_size=4", "--config.train.accumulate=4"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=CASES, default="7b-24gb")
    model, device_name, fields = CASES[parser.parse_args().case]
    device = devices.find(device_name)
    if missing := device.missing():
        sys.exit(missing)
    print(f"{model} on {device_name}, NF4 base, rank {fields['method.rank']}, 2048 positions; sizes in GiB")
    for knobs in KNOBS:
        config = make_config(fields | {"data.max_length": 2048}, knobs)
        mesh = device.mesh(config.mesh.sizes)
        found = compile_step(trace_step(config, sizes(model), mesh), device, mesh).memory_analysis()
        assert found is not None
        arguments, temporary = (size / GIB for size in (found.argument_size_in_bytes, found.temp_size_in_bytes))
        described = " ".join(knob.removeprefix("--config.") for knob in knobs) or "remat=block"
        print(f"  {described}: arguments {arguments:.2f}, temporaries {temporary:.2f}", flush=True)


if __name__ == "__main__":
    main()
