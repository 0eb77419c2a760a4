"""What each knob does to the memory of a train step, by a device's compiler: no such device is needed.

    python benchmarks/knobs.py [7b-24gb]

The LoRA step of a case of qlora_memory.py, whose base is in NF4, with 2048 positions, each knob against model.remat=block
with the defaults. Needs what qlora_memory.py needs. On the GPU case model.attention stays xla: cuDNN has to be there to compile.
"""

import sys

from qlora_memory import CASES, make_config, sizes

from peftjax.plan import devices
from peftjax.plan import measure as plan
from peftjax.plan.devices import GIB

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
    name = sys.argv[1] if len(sys.argv) > 1 else "7b-24gb"
    model, device_name, fields = CASES[name]
    device = devices.find(device_name)
    print(f"{model} on {device_name}, NF4, rank {fields['method.rank']}, 2048 positions: GiB")
    for knobs in KNOBS:
        config = make_config(fields | {"data.max_length": 2048}, knobs)
        mesh = device.mesh(config.mesh)
        found = plan.compile_step(plan.sketch(config, sizes(model), mesh), device, mesh).memory_analysis()
        arguments, temporary = (size / GIB for size in (found.argument_size_in_bytes, found.temp_size_in_bytes))
        described = " ".join(knob.removeprefix("--config.") for knob in knobs) or "remat=block"
        print(f"  {described}: arguments {arguments:.2f}, temporaries {temporary:.2f}", flush=True)


if __name__ == "__main__":
    main()
