"""Plan the memory of each method for LLaMA 7B, 13B and 65B with the compiler of a GPU, and write plans.json:

    PYTHONPATH=. python experiments/peft_table/plans.py

One sequence of 1024 tokens, activations recomputed per block, AdamW. The base is bfloat16, NF4 for QLoRA; adapters, their
gradients and moments are float32. In full fine-tuning, the parameters and their gradients are bfloat16, the moments float32.
The compiler needs `pip install -e ".[cuda-plan]"`, but no GPU.
"""

import json
from pathlib import Path
from typing import Any

import jax

from experiments.peft_table.setting import METHODS, methods_of
from experiments.peft_table.table import PLANS
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.methods import make_config
from peftjax.plan import devices
from peftjax.plan.worker import ask
from peftjax.training import config as configs

ROOT = Path(__file__).parents[2]
SIZES = ("7b", "13b", "65b")
DEVICE = devices.find("h200")  # its compiler plans; whether the step fits does not matter


def bytes_of(size: str, method: str) -> int:
    """The memory of a train step; method: a key of `METHODS`."""
    model, options = ROOT / f"benchmarks/models/llama-{size}", dict(METHODS[method])
    changes = {
        "model.path": str(model),
        "model.quantize": "nf4" if method == "qlora" else "",
        "method": make_config(options.pop("name"), **options).to_dict(),
        "train.batch_size": 1,
    }
    config = configs.changed(configs.load(ROOT / "configs" / "plan_llama_7b_qlora.py"), changes)
    return ask(config, json.loads((model / "config.json").read_text()), DEVICE, advise=False).needed


def main() -> None:
    if missing := DEVICE.missing():
        raise UserError(missing)
    found: dict[str, Any] = {size: {method: bytes_of(size, method) for method in methods_of("e2e")} for size in SIZES}
    write_atomically(PLANS, json.dumps({"jax": jax.__version__, "bytes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
