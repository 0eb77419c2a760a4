"""Adapters of all experts of a layer from files with adapters of single experts, as in transformers 4."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.sites import Site, sites
from peftjax.core.errors import UserError
from peftjax.core.paths import applies, first_match, last_parts, matches
from peftjax.io.adapter_experts import MAGNITUDE, A, B, Pattern, table_entries
from peftjax.io.adapter_keys import bare_key
from peftjax.io.adapter_tensors import PREFIX
from peftjax.io.older_names import older_names, stored_names
from peftjax.methods.lora.lora import Lora
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear

Single = tuple[int, str]  # an expert, and the name of one of its layers

_KEY = re.compile(rf"(.*\.experts)\.(\d+)\.(\w+)\.({A}|{B}|{MAGNITUDE})(?:(?<=vector)\.weight)?")
_KEY_OF_ALL = re.compile(r".*\.experts\.(base_layer\.)*lora_.*")


def with_all_experts(
    method: Method, tensors: dict[str, np.ndarray], model: nnx.Module
) -> tuple[Method, dict[str, np.ndarray]]:
    """Replace the tensors of single experts in an adapter file by tensors of all experts.

    Experts without tensors get zeros.

    Returns:
        The method with the targets, ranks and alphas of all experts, and the tensors.

    Raises:
        UserError: A tensor is missing, or does not fit the model or its rank in the config; or the file has a DoRA of all
            experts of a layer.
    """
    if not isinstance(method, Lora):  # with other methods, single experts have adapters of their own
        return method, tensors
    if method.dora and (of_all := next(filter(_KEY_OF_ALL.fullmatch, tensors), None)):
        raise UserError(
            f"adapter file: use_dora=true is not supported for parameters, as in peft, but {of_all} adapts one; save the "
            "adapter again where it was trained, with modules of single experts (peftjax's save_adapter does this)"
        )
    found: dict[str, dict[Single, dict[str, np.ndarray]]] = {}
    rest: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        if (parsed := _KEY.fullmatch(key)) and (method.dora or parsed[4] != MAGNITUDE):
            found.setdefault(parsed[1], {}).setdefault((int(parsed[2]), parsed[3]), {})[parsed[4]] = tensor
        else:
            rest[key] = tensor
    if not found or not isinstance(model, Model) or not any(model.hf_experts.values()):
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
            first_match(name, table, default)
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
        table: Pattern = getattr(method, option)
        others = tuple(pair for pair in table if applies(pair, names) or not applies(pair, singles))
        changes[option] = (*table_entries(values, others, default), *others)
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


def _expert_sites(model: Model) -> list[Site]:
    return [site for site in sites(model) if isinstance(site.module, ExpertLinear)]
