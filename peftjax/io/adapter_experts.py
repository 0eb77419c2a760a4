"""Conversion between adapters of single experts, as in transformers 4, and adapters of all experts of a layer.

With A_g, B_g of an expert's gate and A_u, B_u of its `up`, the LoRA of gate_up is [A_g, A_u] and the block diagonal of B_g
and B_u. Its rank is the sum of theirs. peft does the same with transformers 5. If A_g and A_u are equal, as in files that peftjax
has written, the LoRA of gate_up is A_g and [B_g, B_u]. Experts of smaller rank are padded with zeros in A and B, which therefore
get no gradient. The magnitudes of DoRA are those of the gate followed by those of `up`; they are 0 where a file has none.
"""

import dataclasses
import itertools
import math
import re
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
from peftjax.adapters.sites import Site, sites
from peftjax.core import host_arrays
from peftjax.core.errors import UserError
from peftjax.core.paths import first_match, last_parts, matches
from peftjax.io.adapter_fit import new_to_older, older_names, stored_names
from peftjax.io.adapter_keys import bare_key, with_older_names
from peftjax.io.adapter_tensors import PREFIX, tensors_of
from peftjax.methods.lora.experts import DoraExperts, LoraExperts
from peftjax.methods.lora.lora import Lora
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear

T = TypeVar("T")
Pattern = tuple[tuple[str, Any], ...]
Single = tuple[int, str]  # an expert, and the name of one of its layers

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_KEY = re.compile(rf"(.*\.experts)\.(\d+)\.(\w+)\.({A}|{B}|{MAGNITUDE})(?:(?<=vector)\.weight)?")
_KEY_OF_ALL = re.compile(r".*\.experts\.(base_layer\.)*lora_.*")


# --- Reading ---


def with_all_experts(
    method: Method, tensors: dict[str, np.ndarray], model: nnx.Module
) -> tuple[Method, dict[str, np.ndarray]]:
    """Replace the tensors of single experts in an adapter file by those of all experts.

    Experts without tensors get zeros.

    Returns:
        The method with the targets, ranks and alphas of all experts, and the tensors.

    Raises:
        UserError: A tensor is missing, or does not fit the model or its rank in the config, or a DoRA is one of all experts.
    """
    dora = isinstance(method, Lora) and method.dora
    if dora and (of_all := next(filter(_KEY_OF_ALL.fullmatch, tensors), None)):
        raise UserError(
            f"adapter file: use_dora=true is not supported for parameters, as in peft, but {of_all} adapts one; save the "
            "adapter again where it was trained, with modules of single experts (peftjax's save_adapter does this)"
        )
    found: dict[str, dict[Single, dict[str, np.ndarray]]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        if (parsed := _KEY.fullmatch(key)) and (dora or parsed[4] != MAGNITUDE):
            found.setdefault(parsed[1], {}).setdefault((int(parsed[2]), parsed[3]), {})[parsed[4]] = tensor
        else:
            rest[key] = tensor
    if not found or not isinstance(model, Model) or not any(model.hf_experts.values()) or not isinstance(method, Lora):
        return method, tensors
    layers = {
        bare_key(stored): (site, name)
        for site in _expert_sites(model)
        for stored, name in zip(stored_names(model, site), site.names, strict=True)
    }
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for container, singles in found.items():
        used = {part for _, part in singles}
        adapted = [(whole, parts) for whole, parts in model.hf_experts.items() if used & set(parts)]
        for depth, (whole, parts) in enumerate(reversed(adapted)):
            if (layer := layers.get(bare_key(f"{container}.{whole}"))) is None:
                raise UserError(f"adapter file: this model has no experts {container}")
            site, name = layer
            module = f"{PREFIX}{name.rpartition('.')[0]}{'.base_layer' * depth}"
            own = {single: given for single, given in singles.items() if single[1] in parts}
            joined, ranks[name], alphas[name] = _joined(method, container, own, parts, site.module)
            rest |= {f"{module}.{suffix}": tensor for suffix, tensor in joined.items()}
    singles_found = [f"{container}.{expert}.{part}" for container in found for expert, part in found[container]]
    if older := older_names(model, rest):  # then all names in the config are older ones
        back = {name: old for old, name in older.items()}
        ranks = {back.get(name, name): rank for name, rank in ranks.items()}
        alphas = {back.get(name, name): alpha for name, alpha in alphas.items()}
    return _with_targets(method, ranks, alphas, singles_found, model), rest


def _joined(
    method: Lora,
    container: str,
    singles: Mapping[Single, Mapping[str, np.ndarray]],
    parts: tuple[str, ...],
    layer: ExpertLinear,
) -> tuple[dict[str, np.ndarray], int, float]:
    """The tensors of a LoRA of all experts, as `LoraExperts` or `DoraExperts` reads them; its rank and its alpha.

    Its scale is the first nonzero one. Where an expert has another scale, B is multiplied by the ratio.
    """
    width = layer.out_features // len(parts)
    scales: dict[Single, float] = {}
    for (expert, part), given in singles.items():
        name = f"{container}.{expert}.{part}"
        rank, alpha = (
            _value(name, table, default)
            for table, default in ((method.rank_pattern, method.rank), (method.alpha_pattern, method.alpha))
        )
        shapes: dict[str, tuple[int, ...]] = {A: (rank, layer.in_features), B: (width, rank)}
        for suffix, shape in (shapes | ({MAGNITUDE: (width,)} if method.dora else {})).items():
            if expert >= layer.experts or suffix not in given or given[suffix].shape != shape:
                got = f"has shape {given[suffix].shape}" if suffix in given else "is missing"
                raise UserError(
                    f"adapter file: {name}.{suffix} {got}, but this model, with {layer.experts} experts, and "
                    f"adapter_config.json require {shape}"
                )
        scales[expert, part] = alpha / (math.sqrt(rank) if method.rslora else rank)
    placed = _ranks_of_parts({single: given[A] for single, given in singles.items()}, parts)
    largest = max(own.stop for own in placed.values())
    some = next(iter(singles.values()))[A]
    scale = next((value for value in scales.values() if value), 1.0)
    a = np.zeros((layer.experts, largest, layer.in_features), some.dtype)
    b = np.zeros((layer.experts, layer.out_features, largest), some.dtype)
    magnitude = np.zeros((layer.experts, layer.out_features), np.float32)
    for (expert, part), own in placed.items():
        tensors, ratio, first = singles[expert, part], scales[expert, part] / scale, width * parts.index(part)
        a[expert, own] = tensors[A]
        b[expert, first : first + width, own] = tensors[B] if ratio == 1 else tensors[B] * ratio
        if method.dora:
            magnitude[expert, first : first + width] = tensors[MAGNITUDE]
    alpha = scale * (math.sqrt(largest) if method.rslora else largest)
    joined = {A: a.reshape(-1, layer.in_features), B: b.transpose(1, 2, 0).reshape(layer.out_features, -1)}
    return joined | ({MAGNITUDE: magnitude} if method.dora else {}), largest, alpha


def _ranks_of_parts(a: Mapping[Single, np.ndarray], parts: tuple[str, ...]) -> dict[Single, slice]:
    """The ranks of the LoRA of all experts that belong to A of each single layer. Equal A of one expert share them."""
    found: dict[Single, slice] = {}
    for expert in sorted({expert for expert, _ in a}):
        own = [(expert, part) for part in parts if (expert, part) in a]
        for index, one in enumerate(own):
            alike = (found[other] for other in own[:index] if np.array_equal(a[other], a[one]))
            start = max((found[other].stop for other in own[:index]), default=0)
            found[one] = next(alike, slice(start, start + len(a[one])))
    return found


def _with_targets(
    method: Lora, ranks: Mapping[str, int], alphas: Mapping[str, float], singles: list[str], model: Model
) -> Lora:
    """The method whose targets, ranks and alphas name all experts of a layer instead of single ones."""
    names = [name for site in sites(model) for name in site.names]
    changes: dict[str, Any] = {}
    targets = _shortest(ranks, model, method.layers_to_transform)
    if not isinstance(method.targets, str):
        kept = (
            entry
            for entry in method.targets
            if any(matches(name, (entry,)) for name in names) or not any(matches(name, (entry,)) for name in singles)
        )
        changes["targets"] = (*kept, *targets)
    elif method.targets != method.every:
        changes["targets"] = rf"(?:{method.targets})|(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"
    for option, values, default in (("rank_pattern", ranks, method.rank), ("alpha_pattern", alphas, method.alpha)):
        table: Pattern = tuple(
            pair
            for pair in getattr(method, option)
            if any(first_match(name, (pair,)) is not None for name in names)
            or not any(first_match(name, (pair,)) is not None for name in singles)
        )
        changes[option] = (*_entries(values, table, default), *table)
    return dataclasses.replace(method, **changes)


def _shortest(ranks: Iterable[str], model: Model, layers: tuple[int, ...]) -> tuple[str, ...]:
    """Targets that select these layers of experts: "experts.down_proj" if all layers are among them, or full names."""
    found: list[str] = []
    for site in _expert_sites(model):
        spelled = zip(site.names, stored_names(model, site), strict=True)
        of_layer = [name for either in spelled for name in dict.fromkeys(either) if name in ranks]
        every = len([number for number in site.numbers if not layers or number in layers])
        found += [last_parts(of_layer[0], 2)] if of_layer and len(of_layer) == every else of_layer
    return tuple(found)


# --- Writing ---


def requires_single_experts(model: nnx.Module, name: str) -> bool:
    """Whether the files of adapter `name` can only hold modules of single experts.

    They can if single experts have adapters of their own, if it is a DoRA, or if the ranks or alphas of a LoRA differ between
    the experts of a layer.
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
    """Whether the layers of single experts have adapters of their own."""
    return any(isinstance(adapter, SingleExperts) for _, adapter in adapter_parts(model, name))


def with_single_experts(
    model: nnx.Module, name: str, method: Method, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Replace the tensors of all experts in an adapter file by those of single experts, and their fields in the config.

    If single experts have adapters of their own, only names are replaced, by those of transformers 4. Of a LoRA, the parts of
    a fused layer get the ranks for which their part of B is not zero. If B is block diagonal, as it is in an adapter from
    such a file, these are their own; otherwise, each part gets all ranks.

    Args:
        model: The model.
        name: The adapter.
        method: Its method.
        tensors: The tensors of the file.
        config: The fields of adapter_config.json.

    Returns:
        The tensors, and the fields.

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
        table = tuple(
            pair for pair in getattr(method, option) if any(first_match(n, (pair,)) is not None for n in modules)
        )
        fields[option] = dict((*_entries(values, table, default), *table))
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
    """The tensors that `with_single_experts` writes after training, as shapes. The model may be abstract.

    Args:
        model: The model.
        name: The adapter.
        method: Its method.
        tensors: The tensors of all experts in the file; the others are kept.
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


# --- Both ---


def _entries(values: Mapping[str, Any], table: Pattern, default: Any) -> Pattern:
    """Entries for rank_pattern or alpha_pattern, to precede `table`, that give each module its value.

    Modules with equal endings, such as "experts.7.gate_proj" apart from the number, share one entry if their values are equal.
    """
    by_ending: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        ending = r"\.".join(r"\d+" if part.isdigit() else part for part in name[name.index("experts.") :].split("."))
        by_ending.setdefault(ending, {})[name] = value
    entries: list[tuple[str, Any]] = []
    for ending, own in by_ending.items():
        wrong = {name: value for name, value in own.items() if _value(name, table, default) != value}
        same = len(set(own.values())) == 1
        entries += [(ending, next(iter(own.values())))] if wrong and same else wrong.items()
    return tuple(entries)


def _value(name: str, table: Pattern, default: Any) -> Any:
    """The value of a module in rank_pattern or alpha_pattern."""
    found = first_match(name, table)
    return default if found is None else found


def _expert_sites(model: Model) -> list[Site]:
    return [site for site in sites(model) if isinstance(site.module, ExpertLinear)]
