"""Fit the options of an adapter file to a model: module names of older versions, and entries that match nothing.

An entry that matches nothing in the user's own config is a mistake. In a file it is not: the tensors show which modules
have an adapter, and peft ignores the rest.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from peftjax.adapters.biases import WithBiases
from peftjax.adapters.method import Method
from peftjax.adapters.saved_modules import is_saved, nested_entries, outermost
from peftjax.adapters.selection import chosen_names, chosen_spellings, ending_of, is_selected, target_entries
from peftjax.adapters.sites import SingleSite, Site, depth_of, single_sites, sites, spelled, tied_pair
from peftjax.adapters.targeted import Targeted
from peftjax.core.paths import applies, first_match, last_parts, matches, unmatched
from peftjax.io.adapter_keys import bare_key, has_single_experts
from peftjax.io.parts import in_other_parts
from peftjax.methods.adalora import AdaLora
from peftjax.methods.boft import Boft
from peftjax.methods.ia3 import Ia3, is_feedforward
from peftjax.methods.lokr import LoKr
from peftjax.methods.lora.lora import Lora, parameter_modules
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear

TABLES = ("rank_pattern", "alpha_pattern", "n_frequency_pattern")  # options that are tables by module name


def older_names(model: nnx.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return {older name: name} of the modules whose older names these keys of an adapter file use; empty if none does.

    The older names are those of transformers 4, which checkpoints keep.
    """
    if not isinstance(model, Model) or not model.hf_renamed:
        return {}
    older = {old: new for new, old in new_to_older(model).items()}
    keys = set(keys)
    own = [f".{key}" for key in keys.difference(in_other_parts(keys))]
    # In Llama 4 a name ends in the older one.
    found = any(f".{old}." in key and f".{name}." not in key for key in own for old, name in older.items())
    return older if found else {}


def new_to_older(model: Model) -> dict[str, str]:
    """Return the older names of the modules that have one, those of single experts too, as in transformers 4."""
    renamed = [site for site in sites(model) if site.path in model.hf_renamed]
    return {
        new: old
        for site in renamed
        for each in (site, *single_sites(site))
        for new, old in zip(each.names, stored_names(model, each), strict=True)
        if new != old
    }


def stored_names(model: Model, site: Site) -> tuple[str, ...]:
    """The older names of a site's layers, as in transformers 4; their names where they have not changed."""
    older = model.hf_renamed.get(site.path)
    if older is None:
        return site.names
    names = (older.format(number) for number in site.numbers)
    if not isinstance(site, SingleSite):
        return tuple(names)
    last = last_parts(site.names[0], 2)  # "7.w1"
    return tuple(f"{name.rpartition('.')[0]}.{last}" for name in names)


def with_names(method: Method, model: nnx.Module, older: Mapping[str, str]) -> Method:
    """Return the method with new names in its options where they select modules by older names."""
    if not older or not isinstance(method, Targeted):
        return method
    back = {name: old for old, name in older.items()}
    fitting = method.candidates(model)
    names = [name for site in sites(model) for name in site.names]

    def selected(layer: int | None, name: str) -> bool:
        every, layers = method.targets == method.every, method.layers_to_transform
        names = (back.get(name, name),)
        return is_selected(names, layer, method.targets, every=every, exclude=method.exclude, layers=layers)

    def select(rule: Callable[[int | None, str], bool]) -> tuple[str, ...]:
        masks = [[rule(*layer) for layer in zip(site.numbers, site.names, strict=True)] for site in fitting]
        return tuple(target_entries([(site, np.array(mask)) for site, mask in zip(fitting, masks, strict=True)]))

    changes: dict[str, Any] = {}
    if method.targets != method.every:
        changes |= {"targets": select(selected), "exclude": (), "layers_to_transform": ()}
    saved = method.modules_to_save
    changes["modules_to_save"] = tuple(
        name for name in names if any(is_saved(back.get(name, name), entry) for entry in saved)
    )
    for option, table in _tables(method).items():
        if table:
            found = ((name, first_match(back.get(name, name), table)) for site in fitting for name in site.names)
            changes[option] = tuple((name, value) for name, value in found if value is not None)
    if isinstance(method, Ia3):
        inputs: str | tuple[str, ...] = method.feedforward
        changes["feedforward"] = select(
            lambda layer, name: selected(layer, name) and is_feedforward(back.get(name, name), inputs)
        )
    return dataclasses.replace(method, **changes)


def with_named_layers(method: Method, model: nnx.Module, layers_pattern: Any) -> Method:
    """Return the method with whole names as targets where layers_pattern numbers other modules than the model's layers.

    In a T5 these are the sublayers: `layer` in `encoder.block.0.layer.1`.
    """
    if not isinstance(method, Targeted) or not method.layers_to_transform or isinstance(method.targets, str):
        return method
    targets = method.targets
    containers = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []

    def number(name: str) -> int | None:
        found = (re.match(rf"(?:^|.*?\.){container}\.(\d+)\.", name) for container in containers)
        return next((int(match[1]) for match in found if match), None)

    layers = [
        (own, name) for site in method.candidates(model) for own, name in zip(site.numbers, site.names, strict=True)
    ]
    if all(number(name) in (None, own) for own, name in layers):
        return method
    named = (name for _, name in layers if matches(name, targets))
    kept = tuple(name for name in named if name in targets or number(name) in method.layers_to_transform)
    return dataclasses.replace(method, targets=kept, layers_to_transform=()) if kept else method


def with_all_parameters(method: Method, model: nnx.Module, parameters: Iterable[str]) -> Method:
    """Return the method with whole names as targets if its options leave out some of target_parameters.

    peft applies exclude_modules and layers_to_transform to target_modules only.
    """
    if not isinstance(method, Targeted) or method.targets == method.every:
        return method
    names = parameter_modules(parameters)
    exclude, layers = method.exclude, method.layers_to_transform
    kept: list[str] = []
    left_out = False
    for site in method.candidates(model):
        for number, name in zip(site.numbers, site.names, strict=True):
            selected = is_selected((name,), number, method.targets, every=False, exclude=exclude, layers=layers)
            if selected or matches(name, names):
                kept.append(name)
                left_out |= not selected
    return dataclasses.replace(method, targets=tuple(kept), exclude=(), layers_to_transform=()) if left_out else method


def with_joined_experts(method: Method, model: nnx.Module) -> Method:
    """Return the method with all experts selected by one name, where its options name every one of them."""
    if not isinstance(method, Targeted) or not method.splits_experts:
        return method
    changes = {key: value for key, value in vars(method).items() if key in ("targets", "feedforward")}
    for option, entries in changes.items():
        for site in sites(model) if isinstance(entries, tuple) else ():
            every = {ending_of(single) for single in single_sites(site)}
            if every and every.issubset(entries):
                joint = last_parts(site.names[0], 2)  # "experts.down_proj"
                entries = (*(entry for entry in entries if entry not in every), joint)
        changes[option] = entries
    return dataclasses.replace(method, **changes)


def without_parameters(method: Method, model: nnx.Module, keys: Iterable[str], parameters: Iterable[str]) -> Method:
    """Return the method without the experts that target_modules matches, but not `parameters`, the target_parameters.

    In peft, experts are parameters of a module. Unchanged if they are modules: in a file whose `keys` are those of single
    experts, or if peft converts target_modules to target_parameters, as it does for LoRA in families whose experts were
    modules in transformers 4.
    """
    if not isinstance(method, Targeted) or not isinstance(model, Model) or method.targets == method.every:
        return method
    if (isinstance(method, Lora) and any(model.hf_experts.values())) or has_single_experts(keys):
        return method
    experts = [site for site in sites(model) if isinstance(site.module, ExpertLinear)]
    whole = [name for site in experts for name in site.names]
    candidates = method.candidates(model)
    adaptable = {site.path for site in candidates}
    if not any(site.path in adaptable for site in experts):
        return dataclasses.replace(method, targets=_besides(whole, method.targets, spelled(candidates)))
    spellings: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in whole]
    if method.splits_experts:
        singles = (single for site in experts for single in single_sites(site))
        spellings += [(names[-1], names) for single in singles for names in single.spellings]
    named = {name for name in whole if matches(name, tuple(parameters))}
    matched = {name for name, names in spellings if any(matches(each, method.targets) for each in names)} - named
    if not matched:
        return method
    left_out = sorted(matched if named else {last_parts(name, 2) for name in matched})  # "experts.down_proj"
    if isinstance(method.exclude, str):
        either = "|".join(map(re.escape, left_out))
        return dataclasses.replace(method, exclude=rf"(?:{method.exclude})|(?:.*\.)?(?:{either})")
    return dataclasses.replace(method, exclude=(*method.exclude, *left_out))


def _besides(experts: list[str], targets: str | tuple[str, ...], names: list[str]) -> str | tuple[str, ...]:
    """The targets without experts: an entry that selects experts is replaced by the other `names` that it selects."""
    if isinstance(targets, str):
        selected = tuple(name for name in names if matches(name, targets))
        return selected if any(matches(name, targets) for name in experts) else targets
    others = {entry: [name for name in names if matches(name, (entry,))] for entry in targets}
    kept = unmatched(experts, targets)
    return tuple(name for entry in targets for name in ([entry] if entry in kept else others[entry]))


def with_factors_of(method: Method, tensors: Mapping[str, np.ndarray]) -> tuple[Method, str | None]:
    """Return a BOFT with as many factors as its tensors have, and what its config says if that differs.

    Without its CUDA extension peft trains with one factor but saves the configured number.
    """
    stored = {len(tensor) for key, tensor in tensors.items() if key.endswith(".boft_R") and tensor.ndim == 4}
    if not isinstance(method, Boft) or len(stored) != 1 or stored == {method.factors}:
        return method, None
    return dataclasses.replace(method, factors=stored.pop()), f"boft_n_butterfly_factor={method.factors}"


def with_full_factors(
    method: Method, model: nnx.Module, tensors: dict[str, np.ndarray]
) -> tuple[Method, dict[str, np.ndarray]]:
    """Multiply the factors of LoKr's matrices in layers of a stack whose other layers are not factored.

    All layers of a stack must have the same form. The products get the rank of a full matrix, and an alpha that keeps the scale.
    """
    if not isinstance(method, LoKr):
        return method, tensors
    keys = {bare_key(key): key for key in tensors}
    made, ranks, alphas = dict(tensors), [], []
    for site, mask in method.chosen(model):
        if len(method.forms(site, mask)) == 1:
            continue
        full = method.full_rank(site)
        layers = zip(site.names, mask, method.ranks(site, mask), method.alphas(site), strict=True)
        for name, used, rank, alpha in layers:
            if not used or rank >= full:
                continue
            ranks.append((name, full))
            alphas.append((name, float(alpha * full / rank)))
            for matrix in ("lokr_w1", "lokr_w2"):
                a, b = (keys.get(bare_key(f"{name}.{matrix}_{factor}")) for factor in "ab")
                if a is not None and b is not None:
                    product = tensors[a].astype(np.float32) @ tensors[b].astype(np.float32)
                    made[a.removesuffix("_a")] = product
                    del made[a], made[b]
    rank_pattern, alpha_pattern = (*ranks, *method.rank_pattern), (*alphas, *method.alpha_pattern)
    return dataclasses.replace(method, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern), made


def without_nested(method: Method, model: nnx.Module) -> tuple[Method, list[str]]:
    """Return the method with the outermost modules of modules_to_save only, and the entries that also select modules inside them.

    peft trains the outermost modules. It writes the others as it found them, and cannot load such a file.
    """
    if not isinstance(method, Targeted) or not (found := nested_entries(sites(model), method.modules_to_save)):
        return method, []
    return dataclasses.replace(method, modules_to_save=outermost(model, method.modules_to_save)), list(found)


def without_unmatched(method: Method, model: nnx.Module, keys: Iterable[str]) -> tuple[Method, list[str]]:
    """Remove the options that match nothing in the model and that peft ignores.

    If no target matches, such as a regular expression for the names of a multimodal model, the modules that have tensors
    in the file, which has these keys, are the targets.

    Returns:
        The method, and what was removed: "target_modules 'v_porj'".
    """
    keys = tuple(keys)
    if not isinstance(method, Targeted):
        return method, []
    removed: list[str] = []

    def keep(option: str, entries: Iterable[Any], fits: Callable[[Any], bool]) -> tuple[Any, ...]:
        entries = tuple(entries)
        kept = tuple(entry for entry in entries if fits(entry))
        if dropped := [repr(entry[0] if option in TABLES else entry) for entry in entries if not fits(entry)]:
            removed.append(f"{method.hf_fields.get(option, (option,))[0]} {', '.join(dropped)}")
        return kept

    fitting = method.candidates(model)
    names = spelled(fitting)
    every = [name for site in sites(model) for name in site.names]
    depth = depth_of(fitting)

    changes: dict[str, Any] = {}
    if method.targets != method.every:
        given, missing = _entries(method.targets), unmatched(names, method.targets)
        if 0 < len(missing) < len(given):
            changes["targets"] = keep("targets", given, lambda entry: entry not in missing)
        elif len(missing) == len(given) and (with_tensors := _with_adapter(names, keys)):
            removed.append(f"target_modules {', '.join(map(repr, given))}")
            changes["targets"] = with_tensors
    if unused := unmatched(names, method.exclude):
        changes["exclude"] = keep("exclude", _entries(method.exclude), lambda entry: entry not in unused)
    if any(0 <= layer < depth for layer in method.layers_to_transform):
        changes["layers_to_transform"] = keep(
            "layers_to_transform", method.layers_to_transform, lambda layer: 0 <= layer < depth
        )
    changes["modules_to_save"] = keep(
        "modules_to_save", method.modules_to_save, lambda entry: any(is_saved(name, entry) for name in every)
    )
    tables = _tables(method)
    method = dataclasses.replace(method, **changes, **dict.fromkeys(tables, ()))
    chosen = Targeted.chosen(method, model)
    targeted, spellings = chosen_names(chosen), chosen_spellings(chosen)
    for option, table in tables.items():
        table = tuple(each for pair in table for each in _by_whole_name(pair, targeted))
        tables[option] = keep(option, table, lambda pair: applies(pair, targeted))
    later: dict[str, Any] = dict(tables)
    if isinstance(method, Ia3):
        rule = method.feedforward

        def is_used(entry: str) -> bool:
            return any(is_feedforward(name, entry if isinstance(rule, str) else (entry,)) for name in spellings)

        kept = keep("feedforward", _entries(rule), is_used)
        later["feedforward"] = rule if isinstance(rule, str) and kept else kept
    method = dataclasses.replace(method, **later)
    if isinstance(method, Lora | WithBiases) and method.bias != "none" and not _has_bias(method, model):
        removed.append(f"bias={method.bias!r}")
        method = dataclasses.replace(method, bias="none")
    if isinstance(method, Lora) and method.ensure_weight_tying and _is_untied(method, model, keys):
        removed.append("ensure_weight_tying=True")
        method = dataclasses.replace(method, ensure_weight_tying=False)
    return method, removed


def _entries(rule: str | tuple[str, ...]) -> tuple[str, ...]:
    """The entries of an option; a regular expression is one."""
    return (rule,) if isinstance(rule, str) else rule


def _by_whole_name(pair: tuple[str, Any], names: Iterable[str]) -> list[tuple[str, Any]]:
    """An entry of a table, or its value for each name that it matches without wrappers, as in a model without its head."""
    if applies(pair, names):
        return [pair]
    return [(name, pair[1]) for name in names if first_match(bare_key(name), (pair,)) is not None] or [pair]


def _tables(method: Method) -> dict[str, tuple[tuple[str, Any], ...]]:
    """The options that are tables by module name. AdaLoRA's has the names of tensors, which it checks itself."""
    return {} if isinstance(method, AdaLora) else {key: value for key, value in vars(method).items() if key in TABLES}


def _with_adapter(names: Iterable[str], keys: Iterable[str]) -> tuple[str, ...]:
    """The modules that have tensors of an adapter, not only copies of their parameters, apart from wrappers in the keys."""
    bare = [bare_key(key) for key in keys if ".lora_" in key]
    return tuple(name for name in names if any(key.startswith(f"{bare_key(name)}.lora_") for key in bare))


def _is_untied(method: Lora, model: nnx.Module, keys: Iterable[str]) -> bool:
    """Whether the embedding has an adapter that a tied head does not follow: peft ties only modules of two names."""
    if (pair := tied_pair(model)) is None:
        return False
    embed, head = pair
    adapted = {site.path for site, _ in (*Targeted.chosen(method, model), *Targeted.saved(method, model))}
    return embed.path in adapted and not any(bare_key(key).startswith(f"{bare_key(head.names[0])}.") for key in keys)


def _has_bias(method: Lora | WithBiases, model: nnx.Module) -> bool:
    """Whether the option `bias` applies to any bias of the model."""
    layers = sites(model) if method.bias == "all" else [site for site, _ in Targeted.chosen(method, model)]
    return any("bias" in site.parameters for site in layers)
