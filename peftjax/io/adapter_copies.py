"""Copies of the base's parameters in adapter files, which peft saves beside an adapter of the embedding or the head."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from peftjax.adapters.joint import adapter_parts
from peftjax.adapters.method import Method
from peftjax.adapters.sites import Site, sites, tied_kernel
from peftjax.adapters.targeted import Targeted
from peftjax.core import host_arrays
from peftjax.core.errors import UserError
from peftjax.core.listing import enumerate_some
from peftjax.io.adapter_keys import bare_key
from peftjax.models.base import LanguageModel

TOKENS = ".trainable_tokens_delta"  # the end of the key of trained tokens
# What peft puts before a parameter's name where it saves a copy: of a layer with an adapter, and of an embedding with
# trained tokens.
COPIES = ("", "base_layer.", "token_adapter.base_layer.")
ORIGINAL = ".original_module."  # stands before the name of a module in one that is trained in full


def copies_in(model: nnx.Module, name: str, tensors: Mapping[str, np.ndarray], keys: Iterable[str]) -> set[str]:
    """The `keys` that duplicate a parameter of the base or another tensor of the file, regardless of wrappers.

    If adapter `name` subtracts its initial update from the head's kernel, as PiSSA does, a copy of the head is the difference.

    If the base is sharded across processes, every process must call this function: they gather its parameters together.

    peft saves the embedding and the head beside a LoRA of them, and all their forms after a change of the vocabulary.

    Raises:
        UserError: Such a tensor differs from the parameter.
    """
    unexplained, copies = {bare_key(key): key for key in sorted(keys)}, set()
    others = {bare_key(key): tensors[key] for key in sorted(tensors.keys() - set(unexplained.values()))}
    for bare, key in unexplained.items():
        originals = [bare.replace(".modules_to_save.", ".")]
        if bare.endswith(TOKENS):  # a tied head's weights are the embedding's
            originals += [other for other in others if other.endswith(TOKENS)]
        if any(name in others and _same(tensors[key], others[name]) for name in originals):
            copies.add(key)
    unused = {bare.replace(ORIGINAL, "."): key for bare, key in unexplained.items() if ORIGINAL in bare}
    unstacked = ((site.path, part) for site, part in adapter_parts(model, name) if not site.stack)
    taken = {path: update for path, part in unstacked if (update := part.taken_from_kernel()) is not None}
    for site in sites(model):
        for leaf, (suffix, _) in site.module.hf_leaves.items():
            for layer, hf in zip(site.layers, site.names, strict=True):
                found = [unexplained.get(bare_key(f"{hf}.{before}{suffix}")) for before in COPIES]
                found.append(unused.get(bare_key(f"{hf}.{suffix}")))
                for key in (key for key in found if key is not None):
                    if (own := base_value(model, site, leaf, layer)) is None:
                        continue
                    if tensors[key].shape != own.shape:
                        raise UserError(
                            f"{key} differs from this model's parameter in shape: {tensors[key].shape} instead of "
                            f"{own.shape}. If tokens were added for the adapter, resize the embedding of this model first"
                        )
                    same = _same
                    if leaf == "kernel" and site.path in taken:
                        own, same = own - host_arrays.whole(taken[site.path]).T, _close
                    if not same(tensors[key], own):
                        raise UserError(f"{key} differs from this model's parameter{_where(tensors[key], own)}")
                    copies.add(key)
    return copies


def with_new_rows(method: Method, model: nnx.Module, tensors: Mapping[str, np.ndarray], path: Path) -> Method:
    """Add the embedding or the head to modules_to_save if its copy in the file at `path` differs from the model's in some rows.

    After tokens were added, peft saves the embedding and the head with the adapter, and loads both. Copies in which more than
    half of the rows differ are left to `copies_in`, which rejects them.
    """
    if not isinstance(method, Targeted) or not isinstance(model, LanguageModel) or method.adapts_tokens:
        return method
    if isinstance(model.embed.embedding.get_value(), jax.ShapeDtypeStruct):
        return method
    used = {site.path for site, _ in (*method.chosen(model), *method.saved(model))}
    keys = {bare_key(key): key for key in tensors}
    changed = {}
    for site in sites(model):
        if site.path in used or not (site.module is model.embed or site.module is model.head):
            continue
        for leaf, (suffix, _) in site.module.hf_leaves.items():
            key = keys.get(bare_key(f"{site.names[0]}.{suffix}"))
            if key is None or (value := base_value(model, site, leaf, None)) is None:
                continue
            if tensors[key].shape == value.shape and not _same(tensors[key], value):
                rows = _changed_rows(tensors[key], value)
                if 2 * len(rows) <= len(value):
                    changed[site.names[0]] = rows
    for name, rows in changed.items():
        warnings.warn(
            f"{path}: the rows {enumerate_some([str(row) for row in rows], 3)} of {name} differ from this model's, as "
            "after tokens were added for the adapter. The file's rows are used, as in peft, and modules_to_save now lists the module",
            stacklevel=4,
        )
    return dataclasses.replace(method, modules_to_save=(*method.modules_to_save, *changed)) if changed else method


def _where(one: np.ndarray, other: np.ndarray) -> str:
    """The end of an error message: where two arrays differ, and the likely reason."""
    rows = _changed_rows(one, other)
    if 2 * len(rows) > len(one):
        return ": the adapter was trained on another base"
    return (
        f" in {len(rows)} of {len(one)} rows ({enumerate_some([str(row) for row in rows], 3)}), as happens "
        "when tokens are added again: load the base with the rows that the adapter was trained with"
    )


def _changed_rows(one: np.ndarray, other: np.ndarray) -> list[int]:
    return [row for row in range(len(one)) if not _same(one[row : row + 1], other[row : row + 1])]


def base_value(model: nnx.Module, site: Site, leaf: str, layer: int | None) -> np.ndarray | None:
    """One layer of a base parameter as files store it, gathered from all processes; None if the module does not have it."""
    if leaf in site.parameters:
        value = site.parameters[leaf].get_value()
        one: Any = value if layer is None else jax.tree.map(lambda stack: stack[layer], value)
        one = one.astype(one.dtype)  # decodes a quantized kernel
    elif leaf == "kernel":
        one = tied_kernel(model)
    else:
        return None
    order = site.module.hf_leaves[leaf][1]
    whole = host_arrays.whole(one)
    return whole if order is None else whole.transpose(order)


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal up to the rounding of 16 bits."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    return bool(np.linalg.norm(one - other) <= 0.01 * np.linalg.norm(other))


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal once both are rounded to the narrower of their dtypes, or to either of float16 and bfloat16."""
    width = min(one.dtype.itemsize, other.dtype.itemsize)
    with np.errstate(over="ignore"):  # bfloat16 has a wider range than float16
        narrow = [dtype for dtype in (one.dtype, other.dtype) if dtype.itemsize == width]
        return any(np.array_equal(one.astype(dtype), other.astype(dtype)) for dtype in narrow)
