"""Fit the options of an adapter file to a model: module names of older versions, and entries that match nothing.

An entry that matches nothing in the user's own config is a mistake. In a file it is not: the tensors show which modules
have an adapter, and peft ignores the rest.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.saved_modules import is_saved, nested_entries, outermost
from peftjax.adapters.selection import chosen_names, chosen_spellings, ending_of, is_selected, target_entries
from peftjax.adapters.sites import depth_of, single_sites, sites, spelled
from peftjax.adapters.targeted import Targeted
from peftjax.core.errors import UserError
from peftjax.core.paths import applies, first_match, last_parts, matches, matching, unmatched
from peftjax.io.adapter_keys import bare_key, has_single_experts
from peftjax.io.adapter_tensors import CONFIG
from peftjax.io.older_names import older_names, with_older_names
from peftjax.methods.lora.lora import parameter_modules
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear


def fitted(
    method: Method, tensors: dict[str, np.ndarray], model: nnx.Module, path: Path, config: Mapping[str, Any]
) -> tuple[Method, dict[str, np.ndarray]]:
    """Return the method and the tensors of directory `path` in this model's names, without what peft ignores, with warnings.

    Raises:
        UserError: The adapter needs a changed base that cannot be computed.
    """
    older = older_names(model, tensors)
    tensors = with_older_names(tensors, older)
    if isinstance(method, Targeted):
        parameters = config.get("target_parameters") or ()
        options = ("targets", "exclude", *method.tables, *method.selections)
        with matching(str(path / CONFIG), *(getattr(method, option) for option in options)):
            method = _with_names(method, model, older)
            method = _with_joined_experts(method, model)
            method = _with_named_layers(method, model, config.get("layers_pattern"))
            method = _with_all_parameters(method, model, parameters)
            method = _without_parameters(method, model, tensors, parameters)
            method, inner = _without_nested(method, model)
            method, removed = _without_unmatched(method, model, tensors)
        if inner:
            warnings.warn(
                f"{path / CONFIG}: modules_to_save {', '.join(map(repr, inner))} also matches modules inside others that are "
                "trained in full, and is ignored for the inner ones",
                stacklevel=3,
            )
        if removed:
            warnings.warn(
                f"{path / CONFIG}: ignoring entries that match nothing in this model: {'; '.join(removed)}",
                stacklevel=3,
            )
    try:
        method.check_file(model)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from error
    keys = {bare_key(key): key for key in tensors}
    return method.reconciled(model, tensors, lambda name: keys.get(bare_key(name)))


def _with_names(method: Targeted, model: nnx.Module, older: Mapping[str, str]) -> Targeted:
    """Return the method with new names in its options where they select modules by older names."""
    if not older:
        return method
    back = {name: old for old, name in older.items()}
    fitting = method.candidates(model)
    names = [name for site in sites(model) for name in site.names]

    def selected(layer: int | None, name: str) -> bool:
        every, layers = method.targets == method.every, method.layers_to_transform
        names = (back.get(name, name),)
        return is_selected(names, layer, method.targets, every=every, exclude=method.exclude, layers=layers)

    def selected_by(option: str, layer: int | None, name: str) -> bool:
        return selected(layer, name) and method.selections[option](back.get(name, name), getattr(method, option))

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
    for option in method.tables:
        if table := getattr(method, option):
            found = ((name, first_match(back.get(name, name), table)) for site in fitting for name in site.names)
            changes[option] = tuple((name, value) for name, value in found if value is not None)
    changes |= {option: select(partial(selected_by, option)) for option in method.selections}
    return dataclasses.replace(method, **changes)


def _with_named_layers(method: Targeted, model: nnx.Module, layers_pattern: Any) -> Targeted:
    """Return the method with whole names as targets where layers_pattern numbers other modules than the model's layers.

    In a T5 these are the sublayers: `layer` in `encoder.block.0.layer.1`.
    """
    if not method.layers_to_transform or isinstance(method.targets, str):
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


def _with_all_parameters(method: Targeted, model: nnx.Module, parameters: Iterable[str]) -> Targeted:
    """Return the method with whole names as targets if its options leave out some of target_parameters.

    peft applies exclude_modules and layers_to_transform to target_modules only.
    """
    if method.targets == method.every:
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


def _with_joined_experts(method: Targeted, model: nnx.Module) -> Targeted:
    """Return the method with all experts selected by one name, where its options name every one of them."""
    if not method.splits_experts:
        return method
    changes = {option: getattr(method, option) for option in ("targets", *method.selections)}
    for option, entries in changes.items():
        for site in sites(model) if isinstance(entries, tuple) else ():
            every = {ending_of(single) for single in single_sites(site)}
            if every and every.issubset(entries):
                joint = last_parts(site.names[0], 2)  # "experts.down_proj"
                entries = (*(entry for entry in entries if entry not in every), joint)
        changes[option] = entries
    return dataclasses.replace(method, **changes)


def _without_parameters(
    method: Targeted, model: nnx.Module, keys: Iterable[str], parameters: Iterable[str]
) -> Targeted:
    """Return the method without the experts that target_modules matches, but not `parameters`, the target_parameters.

    In peft, experts are parameters of a module. Unchanged if they are modules: in a file whose `keys` name single
    experts, or if peft converts target_modules to target_parameters, as it does for LoRA in families whose experts were
    modules in transformers 4.
    """
    if not isinstance(model, Model) or method.targets == method.every:
        return method
    if (method.adapts_parameters and any(model.hf_experts.values())) or has_single_experts(keys):
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


def _without_nested(method: Targeted, model: nnx.Module) -> tuple[Targeted, list[str]]:
    """Return the method with the outermost modules of modules_to_save only, and the entries that also select modules inside them.

    peft trains the outermost modules. It writes the others as it found them, and cannot load such a file.
    """
    if not (found := nested_entries(sites(model), method.modules_to_save)):
        return method, []
    return dataclasses.replace(method, modules_to_save=outermost(model, method.modules_to_save)), list(found)


def _without_unmatched(method: Targeted, model: nnx.Module, keys: Iterable[str]) -> tuple[Targeted, list[str]]:
    """Remove the options that match nothing in the model and that peft ignores.

    If no target matches, such as a regular expression for the names of a multimodal model, the modules that have tensors
    in the file, which has these keys, are the targets.

    Returns:
        The method, and what was removed: "target_modules 'v_porj'".
    """
    keys = [bare_key(key) for key in keys]
    removed: list[str] = []

    def keep(option: str, entries: Iterable[Any], fits: Callable[[Any], bool]) -> tuple[Any, ...]:
        entries = tuple(entries)
        kept = tuple(entry for entry in entries if fits(entry))
        if dropped := [repr(entry[0] if option in method.tables else entry) for entry in entries if not fits(entry)]:
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
    chosen = Targeted.chosen(dataclasses.replace(method, **changes, **dict.fromkeys(method.tables, ())), model)
    targeted, spellings = chosen_names(chosen), chosen_spellings(chosen)
    for option in method.tables:
        table = [each for pair in getattr(method, option) for each in _by_whole_name(pair, targeted)]
        changes[option] = keep(option, table, lambda pair: applies(pair, targeted))

    def is_used(option: str, entry: str) -> bool:
        rule = entry if isinstance(getattr(method, option), str) else (entry,)
        return any(method.selections[option](name, rule) for name in spellings)

    for option in method.selections:
        given = getattr(method, option)
        kept = keep(option, _entries(given), partial(is_used, option))
        changes[option] = given if isinstance(given, str) and kept else kept
    method = dataclasses.replace(method, **changes)
    idle = method.without_effect(model, lambda name: any(key.startswith(f"{bare_key(name)}.") for key in keys))
    removed += [f"{option}={getattr(method, option)!r}" for option in idle]
    return dataclasses.replace(method, **idle), removed


def _entries(rule: str | tuple[str, ...]) -> tuple[str, ...]:
    """The entries of an option; a regular expression is one."""
    return (rule,) if isinstance(rule, str) else rule


def _by_whole_name(pair: tuple[str, Any], names: Iterable[str]) -> list[tuple[str, Any]]:
    """An entry of a table, or its value for each name that it matches without wrappers, as in a model without its head."""
    if applies(pair, names):
        return [pair]
    return [(name, pair[1]) for name in names if first_match(bare_key(name), (pair,)) is not None] or [pair]


def _with_adapter(names: Iterable[str], keys: Iterable[str]) -> tuple[str, ...]:
    """The modules that have tensors of an adapter, not only copies of their parameters; the keys are without wrappers."""
    of_adapters = [key for key in keys if ".lora_" in key]
    return tuple(name for name in names if any(key.startswith(f"{bare_key(name)}.lora_") for key in of_adapters))
