"""The tensors of peft's variants of LoRA and VB-LoRA, as tensors of the plain methods with the same outputs.

- VeLoRA and MonteCLoRA change only the training. Their additional tensors are its state.
- In BD-LoRA, A or B of some modules is block diagonal. The file holds only the blocks, one below the other.
- With save_only_topk_weights, the file of a VB-LoRA holds the indices and the weights of the k largest logits in place of all
  logits. The weights add up to 1, and the last one is left out.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.io.adapter_tensors import CONFIG

TRAINING_STATE = re.compile(r"\.lora_(velora_embed|monteclora_sampler)(\.|$)")
TOPK_INDICES, TOPK_WEIGHTS = "_topk_indices", "_topk_weights"
NOT_CHOSEN = -1e4  # the logit of a vector that is not chosen; its softmax is 0, as with -inf


def as_plain(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert the tensors of an adapter file to the plain method.

    Raises:
        UserError: The fields of the config do not fit the tensors.
    """
    found = {key: tensor for key, tensor in tensors.items() if not TRAINING_STATE.search(key)}
    if config.get("use_bdlora"):
        found = _with_dense_factors(found, config["use_bdlora"])
    if config.get("save_only_topk_weights"):
        found = _with_logits(found)
    return found


def _with_dense_factors(tensors: Mapping[str, np.ndarray], blocks: Any) -> dict[str, np.ndarray]:
    """The tensors with whole matrices in place of their diagonal blocks."""
    if not isinstance(blocks, dict):
        raise UserError(f"{CONFIG}: use_bdlora={blocks!r} must be an object with nblocks and the names of modules")
    count = blocks.get("nblocks", 1)
    warnings.warn(
        f"{CONFIG}: use_bdlora={blocks!r}: the block-diagonal matrices become whole ones; the outputs are the same",
        stacklevel=5,
    )

    def dense(key: str, tensor: np.ndarray) -> np.ndarray:
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        names = blocks.get({"lora_A": "target_modules_bd_a", "lora_B": "target_modules_bd_b"}.get(factor, "")) or ()
        if not any(name in module for name in names):
            return tensor
        if tensor.ndim != 2 or not isinstance(count, int) or count < 1 or len(tensor) % count:
            raise UserError(f"{CONFIG}: use_bdlora has nblocks={count}, which does not divide {key}, {tensor.shape}")
        rows = len(tensor) // count
        before = range(0, len(tensor), rows)
        parts = [
            np.pad(block, ((start, len(tensor) - start - rows), (0, 0)))
            for start, block in zip(before, np.split(tensor, count), strict=True)
        ]
        return np.concatenate(parts, axis=1)

    return {key: dense(key, tensor) for key, tensor in tensors.items()}


def _with_logits(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with all logits, from the indices and the weights of the largest ones."""
    vectors = next((len(tensor) for key, tensor in tensors.items() if key.endswith("vblora_vector_bank")), 0)
    found = {key: tensor for key, tensor in tensors.items() if not key.endswith((TOPK_INDICES, TOPK_WEIGHTS))}
    for key, indices in tensors.items():
        name = key.removesuffix(TOPK_INDICES)
        if not vectors or name == key or name + TOPK_WEIGHTS not in tensors:
            continue
        weights = tensors[name + TOPK_WEIGHTS].astype(np.float32)
        weights = np.concatenate([weights, 1 - weights.sum(axis=-1, keepdims=True)], axis=-1)
        logits = np.full((*indices.shape[:-1], vectors), NOT_CHOSEN, np.float32)
        largest = np.log(np.maximum(weights, np.finfo(np.float32).tiny))
        np.put_along_axis(logits, indices.astype(np.int64), largest, axis=-1)
        found[name] = logits
    return found
