"""Files with adapters of single experts, as in transformers 4, from adapters of all experts of a layer."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from peftjax.adapters.joint import adapter_parts
from peftjax.adapters.method import Method
from peftjax.adapters.registry import attached
from peftjax.adapters.selection import chosen_names
from peftjax.adapters.single_experts import SingleExperts
from peftjax.adapters.sites import Site
from peftjax.core import host_arrays
from peftjax.core.errors import UserError
from peftjax.core.paths import applies, last_parts
from peftjax.io.adapter_experts import MAGNITUDE, A, B, table_entries
from peftjax.io.adapter_tensors import PREFIX, tensors_of
from peftjax.io.older_names import new_to_older, stored_names, with_older_names
from peftjax.methods.lora.experts import DoraExperts, LoraExperts
from peftjax.methods.lora.lora import Lora
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear

T = TypeVar("T")


def requires_single_experts(model: nnx.Module, name: str) -> bool:
    """Whether the files of adapter `name` can only hold modules of single experts.

    This is so if single experts have their own adapters, if it is a DoRA, or if the ranks or alphas of a LoRA differ
    between the experts of a layer.
    """
    method = attached(model)[name]
    if not isinstance(method, Lora):
        return _are_single(model, name)
    return any(
        isinstance(adapter, DoraExperts)
        or any(
            (values != values[:, :1]).any()
            for values in (method.expert_ranks(site, np.array(adapter.ranks) > 0), method.expert_alphas(site))
        )
        for site, adapter in _of_experts(model, name)
    )


def _are_single(model: nnx.Module, name: str) -> bool:
    """Whether the layers of single experts have their own adapters."""
    return any(isinstance(adapter, SingleExperts) for _, adapter in adapter_parts(model, name))


def with_single_experts(
    model: nnx.Module, name: str, method: Method, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Replace the tensors of all experts in an adapter file by tensors of single experts, and their fields in `config`.

    If single experts have their own adapters, only names are replaced, by transformers 4's. In a LoRA, each part of a
    fused layer gets the ranks for which its part of B is not zero. If B is block diagonal, as it is in an adapter from
    such a file, these are their own; otherwise, each part gets all ranks.

    Raises:
        UserError: The adapter has no experts, or the model's family has no modules of single experts.
    """
    if isinstance(model, Model) and _are_single(model, name):
        return _with_older_names(model, tensors, config)
    experts = _of_experts(model, name)
    if not experts or not isinstance(model, Model) or not isinstance(method, Lora):
        raise UserError(f"save_adapter: single_experts=True requires adapted experts, and adapter {name!r} has none")
    if not any(model.hf_experts.values()):
        raise UserError(
            f"save_adapter: single_experts=True: {type(model).__name__} has no modules of single experts; leave it out"
        )
    older = new_to_older(model)
    kept = _of_others(model, name, tensors)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for site, adapter in experts:
        parts = model.hf_experts[site.names[0].rpartition(".")[2]]
        arrays = {leaf: np.asarray(host_arrays.whole(vars(adapter)[leaf].get_value())) for leaf in _leaves(adapter)}
        own_ranks, own_alphas = method.expert_ranks(site, np.array(adapter.ranks) > 0), method.expert_alphas(site)
        for index, (layer, stored) in enumerate(zip(site.layers, stored_names(model, site), strict=True)):
            of_layer = {leaf: array if layer is None else array[layer] for leaf, array in arrays.items()}
            for expert, part, single_tensors in _split(of_layer, parts, own_ranks[index]):
                single = f"{stored.rpartition('.')[0]}.{expert}.{part}"
                kept |= {f"{PREFIX}{single}.{suffix}": tensor for suffix, tensor in single_tensors.items()}
                ranks[single] = len(single_tensors[A])
                share = ranks[single] / own_ranks[index, expert]
                alphas[single] = float(own_alphas[index, expert] * (math.sqrt(share) if method.rslora else share))
    others = [(site, mask) for site, mask in method.chosen(model) if not isinstance(site.module, ExpertLinear)]
    modules = [older.get(module, module) for module in chosen_names(others)]
    fields = dict(config) | {"target_modules": [*modules, *_endings(ranks)], "lora_dropout": method.dropout}
    fields.pop("target_parameters", None)
    for option, values, default in (("rank_pattern", ranks, method.rank), ("alpha_pattern", alphas, method.alpha)):
        matched = tuple(pair for pair in getattr(method, option) if applies(pair, modules))
        fields[option] = dict((*table_entries(values, matched, default), *matched))
    return kept, fields


def _with_older_names(
    model: Model, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    older = new_to_older(model)
    lists = {field: value for field, value in config.items() if isinstance(value, list)}
    named = {field: [older.get(entry, entry) for entry in value] for field, value in lists.items()}
    return with_older_names(tensors, older), {**config, **named}


def shapes_of_single_experts(
    model: Model, name: str, method: Method, tensors: Mapping[str, T]
) -> dict[str, T | jax.ShapeDtypeStruct]:
    """The tensors that `with_single_experts` writes after training. Experts' tensors are shapes.

    The model may be abstract.
    """
    kept: dict[str, T | jax.ShapeDtypeStruct] = dict(_of_others(model, name, tensors))
    if not isinstance(method, Lora):
        return kept
    for site, adapter in _of_experts(model, name):
        parts = model.hf_experts[site.names[0].rpartition(".")[2]]
        ranks, width = method.expert_ranks(site, np.array(adapter.ranks) > 0), adapter.b.shape[-1] // len(parts)
        for stored, of_layer in zip(stored_names(model, site), ranks, strict=True):
            for expert, part in itertools.product(np.flatnonzero(of_layer), parts):
                rank, single = int(of_layer[expert]), f"{PREFIX}{stored.rpartition('.')[0]}.{expert}.{part}"
                shapes = {
                    "a": (A, (rank, adapter.a.shape[-2])),
                    "b": (B, (width, rank)),
                    "magnitude": (MAGNITUDE, (width,)),
                }
                for leaf in _leaves(adapter):
                    suffix, shape = shapes[leaf]
                    kept[f"{single}.{suffix}"] = jax.ShapeDtypeStruct(shape, vars(adapter)[leaf].dtype)
    return kept


def _of_experts(model: nnx.Module, name: str) -> list[tuple[Site, LoraExperts]]:
    return [(site, adapter) for site, adapter in adapter_parts(model, name) if isinstance(adapter, LoraExperts)]


def _leaves(adapter: LoraExperts) -> tuple[str, ...]:
    return ("a", "b", "magnitude") if isinstance(adapter, DoraExperts) else ("a", "b")


def _of_others(model: Model, name: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of the layers that are not experts, by the keys that files with single experts have."""
    of_all = {tensor.key for tensor in tensors_of(model, name) if isinstance(tensor.adapter, LoraExperts)}
    rest = {key: value for key, value in tensors.items() if key not in of_all}
    return with_older_names(rest, new_to_older(model))


def _split(
    arrays: Mapping[str, np.ndarray], parts: tuple[str, ...], ranks: np.ndarray
) -> Iterable[tuple[int, str, dict[str, np.ndarray]]]:
    """Yield the expert, the name, and the tensors of every single layer.

    An expert whose B is zero, as at initialization, keeps the ranks for which A is not. A layer of rank 0 is left out. A layer
    with magnitudes keeps all its ranks if it would have none, and one without is left out.

    Args:
        arrays: a [E, in, R], b [E, R, out] and, in a DoRA, magnitude [E, out].
        parts: The names of an expert's layers.
        ranks: The rank of each expert, at most R, int [E].
    """
    for expert, rank in enumerate(ranks):
        a, b = arrays["a"][expert, :, :rank], arrays["b"][expert, :rank]
        magnitudes = np.split(arrays["magnitude"][expert], len(parts)) if "magnitude" in arrays else [None] * len(parts)
        for part, own, magnitude in zip(parts, np.split(b, len(parts), axis=1), magnitudes, strict=True):
            used = np.flatnonzero(own.any(axis=1) if b.any() else a.any(axis=0))
            if magnitude is not None:
                used = (used if len(used) else np.arange(rank)) if magnitude.any() else used[:0]
            if len(used):
                tensors = {A: a[:, used].T, B: own[used].T}
                yield expert, part, tensors | ({} if magnitude is None else {MAGNITUDE: magnitude})


def _endings(names: Iterable[str]) -> list[str]:
    """Target modules for single experts: "experts.7.gate_proj" if all layers that have adapters have it, or full names."""
    by_ending: dict[str, list[str]] = {}
    for name in names:
        by_ending.setdefault(last_parts(name, 3), []).append(name)
    most = max(map(len, by_ending.values()))
    return [entry for ending, found in by_ending.items() for entry in ([ending] if len(found) == most else found)]
