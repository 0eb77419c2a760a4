"""Experts in NF4 as bitsandbytes quantizes them one by one under transformers 4."""

import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peftjax
from peftjax import sharding
from peftjax.core import variables
from peftjax.core.fingerprint import fingerprint
from peftjax.quant.nf4 import BLOCK, CODEBOOK, Nf4
from tests.interop import peers
from tests.interop.test_decoders import COMMON, their_logits, their_model, tokens
from tests.interop.test_llama import our_logits

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*peers.THEIRS)]

TWO = COMMON | {"num_hidden_layers": 2, "head_dim": 16}
QWEN = transformers.Qwen3MoeConfig(
    **TWO | {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
)
# Rows that are no multiple of 64.
MIXTRAL = transformers.MixtralConfig(**TWO | {"hidden_size": 48, "intermediate_size": 80, "num_local_experts": 3})
VARIANTS = {"qwen3-moe": (QWEN, True), "qwen3-moe-plain": (QWEN, False), "mixtral": (MIXTRAL, True)}
EXPERTS = ("blocks.feedforward.experts.gate_up.kernel", "blocks.feedforward.experts.down.kernel")


def write(folder: Path, config: Any, nested: bool) -> tuple[Path, Path]:
    """A random model quantized kernel by kernel, as transformers 4 writes it, and the dense model of its decoded kernels."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.3)
    original, packed, dense = folder / "original", folder / "packed", folder / "dense"
    model.save_pretrained(original)
    stored = load_file(original / "model.safetensors")
    decoded = dict(stored)
    for name in [name for name in stored if is_kernel(name)]:
        codes, state = bitsandbytes.functional.quantize_4bit(
            stored.pop(name), compress_statistics=nested, quant_type="nf4"
        )
        decoded[name] = decode(codes, state)
        stored |= {name: codes} | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    quantization = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
    }  # fmt: skip
    fields = json.loads((original / "config.json").read_text())
    for path, tensors, more in ((packed, stored, {"quantization_config": quantization}), (dense, decoded, {})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(fields | more))
    return packed, dense


def is_kernel(name: str) -> bool:
    """Whether transformers 4 quantizes the tensor. Its routers are Linears too."""
    return name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight", "gate.weight"))


def decode(codes: torch.Tensor, state: Any) -> torch.Tensor:
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    pairs = codes.reshape(-1)
    values = torch.tensor(CODEBOOK)[torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1).int()]
    result = (values * absmax.repeat_interleave(BLOCK)[: len(values)]).reshape(state.shape)
    if state.shape[1] % BLOCK == 0:  # bitsandbytes' own decoder is wrong for other rows
        assert torch.equal(result, bitsandbytes.functional.dequantize_4bit(codes, state))
    return result


def values(model: Any) -> dict[str, Any]:
    return {path: variable.get_value() for path, variable in variables.flat(model)[1].items()}


def dequantized(directory: Path) -> dict[str, np.ndarray]:
    """The kernels that bitsandbytes reads from a directory, by name; it decides by the parts of each."""
    stored = load_file(directory / "model.safetensors")
    names = [name.partition(".quant_state")[0] for name in stored if ".quant_state" in name]
    return {
        name: decode(stored[name], bitsandbytes.functional.QuantState.from_dict(parts_of(name, stored), "cpu")).numpy()
        for name in names
    }


def parts_of(name: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_experts_have_the_values_of_bitsandbytes_here_and_when_they_are_written_again(
    name: str, tmp_path: Path
) -> None:
    config, nested = VARIANTS[name]
    packed, dense = write(tmp_path, config, nested)
    model, plain = peftjax.load_model(packed), values(peftjax.load_model(dense))
    ours = values(model)
    gate_up, down = (ours[path] for path in EXPERTS)
    assert (gate_up.format, down.format) == ("nf4_single", "nf4" if nested else "nf4_single")
    assert ours["blocks.attention.query.kernel"].format == down.format
    for path, kernel in ours.items():
        if isinstance(kernel, Nf4):
            np.testing.assert_array_equal(jax.jit(lambda kernel: kernel.astype(jnp.float32))(kernel), plain[path])
    expected = their_logits(their_model(dense))
    assert np.abs(our_logits(model, tokens()) - expected).max() < 5e-5 * np.abs(expected).max()

    peftjax.save_model(model, tmp_path / "again")
    stored, again = (load_file(path / "model.safetensors") for path in (packed, tmp_path / "again"))
    decoded = [key for key in stored if not torch.equal(stored[key], again.get(key, torch.zeros(0)))]
    gates = ("gate_proj", "up_proj", "w1", "w3")
    assert all(any(f".{part}.weight." in key for part in gates) or "quant_state" in key for key in decoded)
    np.testing.assert_equal(dequantized(tmp_path / "again"), dequantized(packed))
    assert fingerprint(values(peftjax.load_model(tmp_path / "again"))) == fingerprint(ours)
    # 8 does not divide the number of experts, so their outputs are split.
    for axes in {"qwen3-moe": [{"fsdp": 2, "tensor": 4}, {"tensor": 8}], "mixtral": [{"tensor": 3}]}.get(name, []):
        mesh = sharding.make_mesh(axes, jax.devices()[: math.prod(axes.values())])
        split = values(peftjax.load_model(packed, mesh=mesh))
        assert not split[EXPERTS[0]].codes.sharding.is_fully_replicated
        assert fingerprint(split) == fingerprint(ours)


@pytest.mark.slow
def test_experts_quantized_here_are_read_by_bitsandbytes(tmp_path: Path) -> None:
    write(tmp_path, QWEN, True)
    model = peftjax.load_model(tmp_path / "original", quantize="nf4")
    peftjax.save_model(model, tmp_path / "ours")
    found = dequantized(tmp_path / "ours")
    gate_up, down = (jax.jit(lambda kernel: kernel.astype(jnp.float32))(values(model)[path]) for path in EXPERTS)
    for layer, expert in ((0, 0), (1, 3)):
        kernel = f"model.layers.{layer}.mlp.experts.{expert}.{{}}.weight"
        both = np.concatenate([found[kernel.format(part)] for part in ("gate_proj", "up_proj")])
        np.testing.assert_array_equal(both.T, gate_up[layer, expert])
        np.testing.assert_array_equal(found[kernel.format("down_proj")].T, down[layer, expert])
    again = peftjax.load_model(tmp_path / "ours")
    np.testing.assert_array_equal(our_logits(again, tokens()), our_logits(model, tokens()))
