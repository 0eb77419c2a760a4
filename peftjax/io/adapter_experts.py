"""Conversion between adapters of single experts, as in transformers 4, and adapters of all experts of a layer.

With A_g, B_g of an expert's gate and A_u, B_u of its `up`, the LoRA of gate_up is [A_g, A_u] and the block diagonal of B_g
and B_u. Its rank is the sum of theirs. peft does the same with transformers 5. Experts of smaller rank are padded with zeros
in A and B, which therefore get no gradient.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.sites import Site, adapters_named, sites
from peftjax.adapters.targeted import chosen_names
from peftjax.core import distributed
from peftjax.core.errors import UserError
from peftjax.core.paths import first_match, matches
from peftjax.io.adapter_fit import older_names, stored_names
from peftjax.io.adapter_keys import bare_key, with_older_names
from peftjax.io.adapter_tensors import PREFIX, tensors_of
from peftjax.methods.lora.experts import LoraExperts
from peftjax.methods.lora.lora import Lora
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear

Pattern = tuple[tuple[str, Any], ...]
Single = tuple[int, str]  # an expert, and the name of one of its layers

_KEY = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")


# --- Reading ---


def with_all_experts(
    method: Method, tensors: dict[str, np.ndarray], model: nnx.Module
) -> tuple[Method, dict[str, np.ndarray]]:
    """Replace the tensors of single experts in an adapter file by those of all experts.

    Experts without tensors get zeros.

    Returns:
        The method with the targets, ranks and alphas of all experts, and the tensors.

    Raises:
        UserError: A tensor is missing, or does not fit the model or its rank in the config, or it is DoRA.
    """
    found: dict[str, dict[Single, dict[str, np.ndarray]]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        if parsed := _KEY.fullmatch(key):
            found.setdefault(parsed[1], {}).setdefault((int(parsed[2]), parsed[3]), {})[parsed[4]] = tensor
        else:
            rest[key] = tensor
    if not found or not isinstance(model, Model) or not any(model.hf_experts.values()) or not isinstance(method, Lora):
        return method, tensors
    if method.dora:
        raise UserError(
            "adapter file: use_dora=true is not supported for single experts; merge it where it was trained"
        )
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
            own = {single: pair for single, pair in singles.items() if single[1] in parts}
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
    """A [E * R, in] and B [out, R * E] of a LoRA of all experts, in the order of `LoraExperts`; its rank and its alpha.

    Its scale is the first nonzero one. Where an expert has another scale, B is multiplied by the ratio.
    """
    width = layer.out_features // len(parts)
    scales: dict[Single, float] = {}
    for (expert, part), pair in singles.items():
        name = f"{container}.{expert}.{part}"
        rank, alpha = (
            _value(name, table, default)
            for table, default in ((method.rank_pattern, method.rank), (method.alpha_pattern, method.alpha))
        )
        for factor, shape in (("A", (rank, layer.in_features)), ("B", (width, rank))):
            if expert >= layer.experts or pair.keys() != {"A", "B"} or pair[factor].shape != shape:
                got = f"has shape {pair[factor].shape}" if factor in pair else "is missing"
                raise UserError(
                    f"adapter file: {name}.lora_{factor}.weight {got}, but this model, with {layer.experts} experts, and "
                    f"adapter_config.json require {shape}"
                )
        scales[expert, part] = alpha / (math.sqrt(rank) if method.rslora else rank)
    by_expert = [[(expert, part) for part in parts if (expert, part) in singles] for expert in range(layer.experts)]
    largest = max(sum(len(singles[one]["A"]) for one in own) for own in by_expert)
    some = next(iter(singles.values()))["A"]
    scale = next((value for value in scales.values() if value), 1.0)
    a = np.zeros((layer.experts, largest, layer.in_features), some.dtype)
    b = np.zeros((layer.experts, layer.out_features, largest), some.dtype)
    for own in by_expert:
        start = 0
        for expert, part in own:
            factors, row, ratio = singles[expert, part], width * parts.index(part), scales[expert, part] / scale
            stop = start + len(factors["A"])
            a[expert, start:stop] = factors["A"]
            b[expert, row : row + width, start:stop] = factors["B"] if ratio == 1 else factors["B"] * ratio
            start = stop
    alpha = scale * (math.sqrt(largest) if method.rslora else largest)
    joined = {
        "lora_A.weight": a.reshape(-1, layer.in_features),
        "lora_B.weight": b.transpose(1, 2, 0).reshape(layer.out_features, -1),
    }
    return joined, largest, alpha


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
        found += [".".join(of_layer[0].split(".")[-2:])] if of_layer and len(of_layer) == every else of_layer
    return tuple(found)


# --- Writing ---


def with_single_experts(
    model: nnx.Module, name: str, method: Method, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Replace the tensors of all experts in an adapter file by those of single experts, and their fields in the config.

    The parts of a fused layer get the ranks for which their part of B is not zero. If B is block diagonal, as it is in an
    adapter from such a file, these are their own; otherwise, each part gets all ranks.

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
    experts = [(site, adapter) for site, adapter in adapters_named(model, name) if isinstance(adapter, LoraExperts)]
    if not experts or not isinstance(model, Model) or not isinstance(method, Lora):
        raise UserError(f"save_adapter: single_experts=True requires a LoRA on experts, and adapter {name!r} has none")
    if not any(model.hf_experts.values()):
        raise UserError(
            f"save_adapter: single_experts=True: {type(model).__name__} has no modules of single experts; leave it out"
        )
    fused = {tensor.key for tensor in tensors_of(model, name) if isinstance(tensor.adapter, LoraExperts)}
    older = {
        new: old
        for site in sites(model)
        for new, old in zip(site.names, stored_names(model, site), strict=True)
        if new != old
    }
    kept = with_older_names({key: value for key, value in tensors.items() if key not in fused}, older)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for site, adapter in experts:
        parts = model.hf_experts[site.names[0].rpartition(".")[2]]
        a, b = (np.asarray(distributed.whole(leaf.get_value())) for leaf in (adapter.a, adapter.b))
        names = zip(site.layers, stored_names(model, site), method.alphas(site), adapter.ranks, strict=True)
        for layer, stored, alpha, rank in names:
            if rank:
                of_layer = [array if layer is None else array[layer] for array in (a, b)]
                for expert, part, one_a, one_b in _split(
                    of_layer[0][..., :rank], of_layer[1][:, :rank], parts, method.rank
                ):
                    single = f"{stored.rpartition('.')[0]}.{expert}.{part}"
                    kept[f"{PREFIX}{single}.lora_A.weight"], kept[f"{PREFIX}{single}.lora_B.weight"] = one_a, one_b
                    ranks[single] = len(one_a)
                    share = len(one_a) / rank
                    alphas[single] = float(alpha * (math.sqrt(share) if method.rslora else share))
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


def _split(a: np.ndarray, b: np.ndarray, parts: tuple[str, ...], rank: int) -> Iterable[tuple[int, str, Any, Any]]:
    """Yield the expert, the name, A [r, in] and B [out, r] of every single layer, from a [E, in, R] and b [E, R, out].

    An expert whose B is zero, as at initialization, keeps the first `rank` ranks at most, and none if its A is zero too. A
    layer of rank 0 is left out.
    """
    for expert, (of_a, of_b) in enumerate(zip(a, b, strict=True)):
        initial = None if of_b.any() else np.flatnonzero(of_a.any(axis=0))[:rank]
        for part, own in zip(parts, np.split(of_b, len(parts), axis=1), strict=True):
            used = np.flatnonzero(own.any(axis=1)) if initial is None else initial
            if len(used):
                yield expert, part, of_a[:, used].T, own[used].T


def _endings(names: Iterable[str]) -> list[str]:
    """Target modules for single experts: "experts.7.gate_proj" if all layers that have adapters have it, or full names."""
    by_ending: dict[str, list[str]] = {}
    for name in names:
        by_ending.setdefault(".".join(name.split(".")[-3:]), []).append(name)
    most = max(map(len, by_ending.values()))
    return [entry for ending, found in by_ending.items() for entry in ([ending] if len(found) == most else found)]


# --- Both ---


def _entries(values: Mapping[str, Any], table: Pattern, default: Any) -> Pattern:
    """Entries for rank_pattern or alpha_pattern, to precede `table`, that give each module its value.

    One entry for all modules of the same last name and, if it has one, parent, where their values are equal.
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
