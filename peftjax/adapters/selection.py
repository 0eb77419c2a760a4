"""Which layers of a model a method's options select, and the values of options that differ between layers."""

import itertools
import re
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from peftjax.adapters.sites import SingleSite, Site, depth_of, spelled
from peftjax.core.errors import UserError
from peftjax.core.paths import applies, first_match, last_parts, matches, matching, suggest, unmatched

Chosen = list[tuple[Site, np.ndarray]]  # sites, each with a bool per layer

_OF_ALL_EXPERTS = re.compile(r"[\w.\\]*experts\\?\.\w+")  # "experts.down_proj", which names no single one


def choose(
    candidates: list[Site],
    targets: str | tuple[str, ...],
    *,
    every: bool = False,
    exclude: str | tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    what: str = "targets",
) -> Chosen:
    """Select sites by name.

    Args:
        candidates: The sites to select from.
        targets: Names, name endings or a regular expression, as in `core.paths.matches`.
        every: Select all candidates. `targets` is then the word for them, for messages.
        exclude: Names to leave out, in the same format.
        layers: Only these layers, and those that `targets` gives by their whole name; empty: all.
        what: The option that `targets` comes from, for messages.

    Returns:
        The selected sites, each with a bool for every layer of its stack.

    Raises:
        UserError: An entry matches nothing, a layer does not exist, or nothing is selected.
    """
    names = spelled(candidates)
    if not names:
        raise UserError(f"method.{what}={targets!r}: this model has no suitable layer with an adapter slot")
    for option, pattern in ((what, () if every else targets), ("exclude", exclude)):
        with matching(f"method.{option}", pattern):
            missing = [entry for entry in unmatched(names, pattern) if entry]
        if missing:
            last = last_names(names)
            raise UserError(
                f"method.{option}: {', '.join(map(repr, missing))} matches no layer of this model."
                f"{suggest(missing[0], last)} Its layers: {', '.join(last)}"
            )
    depth = depth_of(candidates)
    if beyond := [layer for layer in layers if not 0 <= layer < depth]:
        known = f"the model has layers 0 to {depth - 1}" if depth else "the layers of this model are not numbered"
        raise UserError(f"method.layers_to_transform: layer {beyond[0]} does not exist; {known}")
    chosen = []
    with matching(f"method.{what}", targets, exclude):
        for site in candidates:
            mask = np.array([
                is_selected(names, number, targets, every=every, exclude=exclude, layers=layers)
                for number, names in zip(site.numbers, site.spellings, strict=True)
            ])  # fmt: skip
            if mask.any():
                chosen.append((site, mask))
    if not chosen:
        raise UserError(f"method.{what}={targets!r} with exclude={exclude!r} and layers {list(layers)} selects nothing")
    return chosen


def is_selected(
    names: Collection[str],
    number: int | None,
    targets: str | tuple[str, ...],
    *,
    every: bool,
    exclude: str | tuple[str, ...],
    layers: tuple[int, ...],
) -> bool:
    """Whether options, as in `choose`, select a layer with these names and this number in the model."""
    if not every and not any(matches(name, targets) for name in names):
        return False
    if exclude and any(matches(name, exclude) for name in names):
        return False
    by_whole_name = not every and isinstance(targets, tuple) and any(name in targets for name in names)
    return not layers or number in layers or by_whole_name


def joined(chosen: Chosen) -> Chosen:
    """Replace the layers of single experts by all experts, with a mask of bools, [layers, E, parts]."""
    found: Chosen = []
    masks: dict[str, np.ndarray] = {}
    for site, mask in chosen:
        if not isinstance(site, SingleSite):
            found.append((site, mask))
            continue
        if site.path not in masks:
            masks[site.path] = np.zeros((len(mask), site.module.experts, len(site.experts.parts)), bool)
            found.append((site.experts, masks[site.path]))
        masks[site.path][:, site.expert, site.part] = mask
    return found


def by_name(site: Site, table: tuple[tuple[str, Any], ...], default: Any) -> np.ndarray:
    """Return for every layer of a site the value of the first entry of `table` that matches its name, else `default`."""
    with matching("method.rank_pattern and alpha_pattern", *(key for key, _ in table)):
        return np.array([first_match(name, table, default) for name in site.names])


def by_expert(option: str, table: tuple[tuple[str, Any], ...], site: Site, others: np.ndarray) -> np.ndarray:
    """Return the values of an option such as rank_pattern for every expert of every layer of a site, [layers, E].

    Args:
        option: The option's name.
        table: Its value. An entry for single experts contains the word "experts": "experts.3.down_proj".
        site: A site with experts.
        others: The values for experts that no entry matches, [layers].

    Raises:
        UserError: The layers of an expert that share A have different values.
    """
    table = tuple((key, value) for key, value in table if _may_name_experts(key))
    values = np.repeat(np.asarray(others)[:, None], site.module.experts, axis=1).tolist()
    if not table:
        return np.array(values)
    with matching(f"method.{option}", *(key for key, _ in table)):
        for layer, names in enumerate(site.single_experts):
            for expert, parts in enumerate(names):
                given = [first_match(name, table, values[layer][expert]) for name in parts]
                if len(set(given)) > 1:
                    every = " and ".join(f"{value} for {name}" for name, value in zip(parts, given, strict=True))
                    raise UserError(f"method.{option} has {every}, which share A; give them one value")
                values[layer][expert] = given[0]
    return np.array(values)


def _may_name_experts(key: str) -> bool:
    """Whether an entry may name single experts. Others, such as "gate_proj", are for dense layers."""
    return "experts" in key and not _OF_ALL_EXPERTS.fullmatch(key)


def check_table(option: str, table: tuple[tuple[str, Any], ...], chosen: Chosen) -> None:
    """Require that every entry of an option such as rank_pattern matches a selected layer; a `UserError` otherwise."""
    names = chosen_names(chosen)
    singles = _single_names(chosen) if any(_may_name_experts(key) for key, _ in table) else []
    for key, value in table:
        candidates = itertools.chain(names, singles if _may_name_experts(key) else ())
        with matching(f"method.{option}", key):
            matched = applies((key, value), candidates)
        if not matched:
            raise no_such_target(option, key, names)


def no_such_target(option: str, entry: str, names: Iterable[str]) -> UserError:
    """The error for an entry of an option that matches none of the targets, which have these names."""
    last = last_names(names)
    return UserError(f"method.{option}: {entry!r} matches no target.{suggest(entry, last)} Targets: {', '.join(last)}")


def _single_names(chosen: Chosen) -> list[str]:
    """The names of the layers of all single experts."""
    return [
        name
        for site, mask in chosen
        for experts in itertools.compress(site.single_experts, mask)
        for parts in experts
        for name in parts
    ]


def check_rank(rank: int, site: Site, option: str = "rank") -> None:
    """Require a rank of at most the smaller dimension of a layer's kernel; a `UserError` otherwise."""
    limit = min(site.module.in_features, site.module.out_features)
    if rank > limit:
        raise UserError(
            f"method.{option}={rank} exceeds the smaller dimension ({limit}) of {site.names[0]}; use at most {limit}"
        )


def chosen_names(chosen: Chosen) -> list[str]:
    """The full Hugging Face names of all chosen layers."""
    return [name for site, mask in chosen for name in itertools.compress(site.names, mask)]


def chosen_spellings(chosen: Chosen) -> list[str]:
    """All names by which options select the chosen layers."""
    return [name for site, mask in chosen for names in itertools.compress(site.spellings, mask) for name in names]


def last_names(names: Iterable[str]) -> list[str]:
    """The last parts of dotted names, sorted, each once."""
    return sorted({last_parts(name, 1) for name in names})


def target_entries(chosen: Chosen) -> list[str]:
    """Entries for target_modules: full names, and "experts.7.gate_proj" for a layer of an expert that is chosen everywhere."""
    found = []
    for site, mask in chosen:
        found += [ending_of(site)] if isinstance(site, SingleSite) and mask.all() else chosen_names([(site, mask)])
    return found


def ending_of(site: Site) -> str:
    """The last part of the name of a layer of a single expert, "experts.7.gate_proj"."""
    return last_parts(site.names[0], 3)
