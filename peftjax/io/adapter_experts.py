"""Adapters of single experts, as in transformers 4, converted to adapters of all experts of a layer.

With A_g, B_g of an expert's gate and A_u, B_u of its `up`, both of rank r, the LoRA of gate_up is [A_g, A_u] and the block
diagonal of B_g and B_u, of rank 2r and with the same scale. peft does the same with transformers 5.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from flax import nnx

from peftjax.adapters.method import Method
from peftjax.core.errors import UserError
from peftjax.methods.lora.lora import Lora
from peftjax.models.base import Model

_KEY = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")


def with_all_experts(
    method: Method, tensors: dict[str, np.ndarray], model: nnx.Module
) -> tuple[Method, dict[str, np.ndarray]]:
    """Replace the tensors of single experts in an adapter file by those of all experts.

    Returns:
        The method with the targets, ranks and alphas of all experts, and the tensors.

    Raises:
        UserError: Experts or one of two fused layers are missing, or the experts' ranks differ.
    """
    found: dict[str, dict[tuple[int, str, str], np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        if parsed := _KEY.fullmatch(key):
            found.setdefault(parsed[1], {})[int(parsed[2]), parsed[3], parsed[4]] = tensor
        else:
            rest[key] = tensor
    if not found or not isinstance(model, Model) or not any(model.hf_experts.values()) or not isinstance(method, Lora):
        return method, tensors
    used = {layer for of_layer in found.values() for _, layer, _ in of_layer}
    fused = {whole: parts for whole, parts in model.hf_experts.items() if used & set(parts)}
    for container, of_layer in found.items():
        for depth, parts in enumerate(reversed(fused.values())):
            module = (container + ".base_layer" * depth).replace(".block_sparse_moe.", ".mlp.")
            rest |= _stacked(container, module, parts, of_layer, vars(model.config)["experts"])
    return _with_targets(method, fused), rest


def _stacked(
    container: str,
    module: str,
    parts: tuple[str, ...],
    tensors: Mapping[tuple[int, str, str], np.ndarray],
    experts: int,
) -> dict[str, np.ndarray]:
    """The two tensors of a LoRA of all experts: A [E * R, in] and B [out, R * E], in the order of `LoraExperts`."""
    wanted = [(expert, part, factor) for expert in range(experts) for part in parts for factor in "AB"]
    if missing := [key for key in wanted if key not in tensors]:
        expert, part, factor = missing[0]
        raise UserError(
            f"adapter file: {container}.{expert}.{part}.lora_{factor}.weight is missing; the file must contain "
            f"{' and '.join(parts)} of every expert of a layer"
        )
    if len({tensors[key].shape for key in wanted if key[2] == "A"}) > 1:
        raise UserError(f"adapter file: the experts of {container} have different ranks, which is not supported")
    a = np.stack([np.concatenate([tensors[e, part, "A"] for part in parts]) for e in range(experts)])  # [E, R, in]
    b = np.stack([_block_diagonal([tensors[e, part, "B"] for part in parts]) for e in range(experts)])  # [E, out, R]
    return {
        f"{module}.lora_A.weight": a.reshape(-1, a.shape[2]),
        f"{module}.lora_B.weight": b.transpose(1, 2, 0).reshape(b.shape[1], -1),
    }


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    result = np.zeros((rows, columns), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        result[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return result


def _with_targets(method: Lora, fused: Mapping[str, tuple[str, ...]]) -> Lora:
    """The method with the experts among its targets. Where two layers are fused, the rank is doubled and the scale kept."""
    changes: dict[str, object] = {}
    names = tuple(f"experts.{whole}" for whole in fused)
    if isinstance(method.targets, str):
        if method.targets != method.every:
            ends = "|".join(map(re.escape, names))
            changes["targets"] = rf"(?:{method.targets})|.*\.(?:{ends})"
    else:
        single = {part for parts in fused.values() for part in parts}
        kept = tuple(
            name for name in method.targets if name.rpartition(".")[2] not in single or ".experts." not in f".{name}"
        )
        changes["targets"] = tuple(name for name in kept if name not in single) + names
    for whole, parts in fused.items():
        if (count := len(parts)) > 1:
            scale = count**0.5 if method.rslora else count
            changes["rank_pattern"] = ((f"experts.{whole}", method.rank * count), *method.rank_pattern)
            changes["alpha_pattern"] = ((f"experts.{whole}", method.alpha * scale), *method.alpha_pattern)
    return dataclasses.replace(method, **changes)  # type: ignore[arg-type]
