"""The peer's side of a cell, PyTorch with Hugging Face PEFT: `python peer_torch.py CELL DIRECTORY`, started by run.py.

It runs in eager mode with sdpa attention, one thread per core, the fused AdamW, and adapters in the dtype of the base.
"""

import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from cells import BOTTLENECK, NEW, RANK, VIRTUAL, Cell
from child import Side, product_shape, serve


def make(cell: Cell, directory: Path) -> Side:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = {"step": train, "decode": decode, "load": load}[cell.kind](cell, directory)
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return Side(run, product(cell), {name: version(name) for name in names})


def load_model(cell: Cell, directory: Path) -> Any:
    dtype = getattr(torch, cell.dtype)
    options = {}
    if cell.quantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", **options
    )


def with_lora(model: Any) -> Any:
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if hasattr(model.config, "num_local_experts"):  # "all-linear" would leave out the experts, which are parameters
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": experts}
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **targets)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def with_method(cell: Cell, model: Any) -> Any:
    virtual = {"num_virtual_tokens": VIRTUAL, "task_type": "CAUSAL_LM"}
    if cell.method in ("lora", "qlora"):
        return with_lora(model)
    if cell.method == "prompt":
        return peft.get_peft_model(model, peft.PromptTuningConfig(**virtual), autocast_adapter_dtype=False)
    if cell.method == "prefix":
        return peft.get_peft_model(model, peft.PrefixTuningConfig(**virtual), autocast_adapter_dtype=False)
    return with_bottlenecks(model) if cell.method == "houlsby" else model


def with_bottlenecks(model: Any) -> Any:
    """Houlsby's adapters, which peft does not have: f(x) + up(silu(down(f(x)))) after attention and feed-forward."""
    model.requires_grad_(False)
    width, dtype = model.config.hidden_size, model.dtype
    for layer in model.model.layers:
        for name in ("self_attn", "mlp"):
            down, up = torch.nn.Linear(width, BOTTLENECK, dtype=dtype), torch.nn.Linear(BOTTLENECK, width, dtype=dtype)
            for linear in (down, up):
                torch.nn.init.normal_(linear.weight, std=0.02)
                torch.nn.init.zeros_(linear.bias)
            layer.register_module(f"{name}_adapter", torch.nn.Sequential(down, torch.nn.SiLU(), up))
            layer.get_submodule(name).register_forward_hook(_adding(layer.get_submodule(f"{name}_adapter")))
    return model


def _adding(adapter: Any) -> Callable[..., Any]:
    def hook(module: Any, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + adapter(output[0]), *output[1:])
        return output + adapter(output)

    return hook


def train(cell: Cell, directory: Path) -> Callable[[int], float]:
    model = with_method(cell, load_model(cell, directory)).train()
    model.config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if cell.compiled else model
    tokens = np.random.default_rng(0).integers(0, cell.sizes["vocab_size"], (cell.rows, cell.length), np.int32)
    batch = torch.from_numpy(tokens.astype(np.int64))

    def run(count: int) -> float:
        for _ in range(count * cell.runs):
            loss = forward(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def decode(cell: Cell, directory: Path) -> Callable[[int], float]:
    model = with_lora(load_model(cell, directory)).eval()
    model.generation_config.eos_token_id = None
    tokens = np.random.default_rng(0).integers(0, cell.sizes["vocab_size"], (cell.rows, cell.length))
    batch = torch.from_numpy(tokens)
    options = {"attention_mask": torch.ones_like(batch), "do_sample": False, "pad_token_id": 0}

    def run(count: int) -> float:
        with torch.inference_mode():
            for _ in range(count):
                answers = model.generate(
                    input_ids=batch, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=True, **options
                )
        return float((answers.shape[1] - cell.length) * cell.rows)

    return run


def load(cell: Cell, directory: Path) -> Callable[[int], float]:
    def run(count: int) -> float:
        for _ in range(count):
            model = load_model(cell, directory)
        return len(list(model.parameters()))

    return run


def product(cell: Cell) -> tuple[Callable[[], Any], float]:
    rows, width, mlp = product_shape(cell)
    dtype = getattr(torch, cell.dtype)
    a, b = torch.ones(rows, width, dtype=dtype), torch.ones(width, mlp, dtype=dtype)
    return lambda: torch.matmul(a, b), 2.0 * rows * width * mlp


if __name__ == "__main__":
    serve(make)
