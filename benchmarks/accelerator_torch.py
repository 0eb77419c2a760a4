"""PEFT's side of accelerator.py, which starts it: a train step of a Llama with random weights and LoRA or QLoRA."""

import json
import statistics
import sys
import time
from typing import Any

import peft
import torch
import transformers

RANK, STEPS = 16, 3


def make_model(sizes: dict[str, Any], method: str, remat: str, device: str) -> Any:
    """The model on the device. For QLoRA, its linear layers except the head are quantized one after another."""
    config = transformers.AutoConfig.for_model(**sizes)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if method == "qlora":
        quantize(model.model, device)
    model.config.use_cache = False
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    if remat == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def quantize(model: Any, device: str) -> None:
    from bitsandbytes import nn

    for parent in model.modules():
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear:
                continue
            made = nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            made.weight = nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(parent, name, made.to(device))


def measure(sizes: dict[str, Any], method: str, length: int, remat: str, rounds: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(sizes, method, remat, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    tokens = torch.randint(sizes["vocab_size"], (1, length), device=device)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    step()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        losses = [step() for _ in range(STEPS)]
        seconds.append((time.perf_counter() - started) / STEPS)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"seconds": seconds, "first": first, "loss": statistics.mean(losses), "peak": peak}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[2]))))
