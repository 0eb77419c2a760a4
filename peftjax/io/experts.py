"""Experts in checkpoints: one tensor per expert, or one tensor for all of them.

transformers 5 computes with one tensor per layer, `mlp.experts.gate_up_proj`, [E, 2F, D], but writes what transformers 4
reads: `mlp.experts.7.gate_proj.weight`, [F, D], and `up_proj` for every expert. Both can be read; the latter is written.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.core.errors import UserError
from peftjax.core.listing import enumerate_some
from peftjax.io.bitsandbytes import Packed, Stored
from peftjax.io.entries import Entry
from peftjax.io.packed_experts import PackedExperts, join_kernels
from peftjax.io.safetensors_files import StoredTensor
from peftjax.models.base import Model
from peftjax.models.moe import MoeConfig


@dataclasses.dataclass(frozen=True)
class StoredExperts(StoredTensor):
    """The tensor [E, P * rows, columns] of all experts, assembled from tensors [rows, columns] when it is read.

    Attributes:
        parts: The tensors of every expert, E tuples of P.
    """

    parts: tuple[tuple[StoredTensor, ...], ...]

    def open(self) -> "StoredExperts":
        return self

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read the requested slices, and nothing else."""
        full = (slice(None),) * 3
        experts, rows, columns = full if index is Ellipsis else (*index, *full)[:3]
        return np.stack([self._expert(parts, rows, columns) for parts in self.parts[experts]])

    def _expert(self, parts: Sequence[StoredTensor], rows: slice, columns: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[1])
        height = parts[0].shape[0]
        taken = [
            part.open()[max(start - height * i, 0) : max(stop - height * i, 0), columns]
            for i, part in enumerate(parts)
            if start < height * (i + 1) and stop > height * i
        ]
        return np.concatenate(taken)


def single_names(model: Model, key: str) -> list[list[str]]:
    """The names of the single experts' tensors for a tensor of all experts: for each expert, one name per part.

    Empty if the tensor does not belong to experts.
    """
    container, _, last = key.rpartition(".")
    names = model.hf_experts.get(last)
    if not names or not container.endswith(".experts"):
        return []
    assert isinstance(model.config, MoeConfig)
    return [[f"{container}.{expert}.{name}.weight" for name in names] for expert in range(model.config.experts)]


def with_experts(model: Model, table: Iterable[Entry], stored: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """Replace the tensors of single experts in a checkpoint by one tensor for all of them.

    Raises:
        UserError: Experts are missing, or differ in shape or format.
    """
    if not any(model.hf_experts.values()):
        return stored
    found = {model.hf_stored(name): name for name in stored}
    result = dict(stored)
    for key in (key for entry in table for key in entry.keys):
        names = single_names(model, key)
        every = [name for of_expert in names for name in of_expert]
        if not any(name in found for name in every):
            continue
        if missing := [name for name in every if name not in found]:
            raise UserError(f"experts are missing: {enumerate_some(missing)}; config.json says {len(names)} experts")
        parts = [[result.pop(found[name]) for name in of_expert] for of_expert in names]
        result[key] = _joined(key, parts)
    return result


def _joined(key: str, parts: Sequence[Sequence[Stored]]) -> StoredExperts | PackedExperts:
    first = parts[0][0]
    for part in (part for of_expert in parts for part in of_expert):
        if isinstance(part, Packed) != isinstance(first, Packed):
            one, other = (first, part) if isinstance(first, Packed) else (part, first)
            raise UserError(
                f"{one.name} is stored in NF4, and {other.name} is not quantized: all experts of a layer must have one format"
            )
        if not isinstance(part, Packed) and (part.shape != first.shape or len(part.shape) != 2):
            raise UserError(f"{part.name} is stored as {list(part.shape)}, and {first.name} as {list(first.shape)}")
    given: Any = tuple(tuple(of_expert) for of_expert in parts)
    if isinstance(first, Packed):
        return join_kernels(key, given)
    shape = (len(parts), len(parts[0]) * first.shape[0], first.shape[1])
    return StoredExperts(first.file, key, first.dtype, shape, given)


def split_experts(model: Model, key: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of single experts, from one of all experts; other tensors are returned as they are."""
    names = single_names(model, key)
    if not names:
        return {key: array}
    return {
        name: part
        for of_expert, own in zip(names, array, strict=True)
        for name, part in zip(of_expert, np.split(own, len(of_expert)), strict=True)
    }
