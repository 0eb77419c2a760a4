"""Modules that are trained in full and saved in full: the option modules_to_save."""

from collections.abc import Iterable

from flax import nnx

from peftjax.adapters.adapter import HfLeaf, Override
from peftjax.adapters.joint import add_copies, parts
from peftjax.adapters.selection import Chosen
from peftjax.adapters.sites import Site, adapters_named, sites
from peftjax.core.errors import UserError
from peftjax.nn.layer import Layer


def nested_entries(layers: Iterable[Site], entries: Iterable[str]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The entries of modules_to_save that match a module inside another one that is trained in full.

    Returns:
        For each of them, the full names of its modules that are not inside another one, and the entry that matches an outer
        module.
    """
    modules = dict.fromkeys(module for site in layers for name in site.names for module in _and_containers(name))
    matched = {entry: [module for module in modules if module.endswith(entry)] for entry in entries}
    by_module = {module: entry for entry, own in matched.items() for module in own}
    found = {}
    for entry, own in matched.items():
        outer = {module: next(filter(by_module.__contains__, _and_containers(module))) for module in own}
        if inner := [module for module in own if outer[module] != module]:
            found[entry] = tuple(module for module in own if outer[module] == module), by_module[outer[inner[0]]]
    return found


def outermost(model: nnx.Module, entries: Iterable[str]) -> tuple[str, ...]:
    """The entries of modules_to_save, where each of `nested_entries` is replaced by its outermost modules."""
    found = nested_entries(sites(model), entries)
    return tuple(name for entry in entries for name in (found[entry][0] if entry in found else (entry,)))


def _and_containers(name: str) -> list[str]:
    """The names of a module and of the modules that contain it, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def is_saved(name: str, entry: str) -> bool:
    """Whether an entry of modules_to_save matches a layer: its name, or the name of a module around it, ends in the entry."""
    return any(module.endswith(entry) for module in _and_containers(name))


def train_whole(chosen: Chosen, name: str) -> None:
    """Put trained copies of all parameters of each site into its slot (modules_to_save)."""
    for site, mask in chosen:
        stored = site.module.hf_leaves if isinstance(site.module, Layer) else {}
        own = site.parameters
        if "kernel" not in own and "kernel" in stored:  # a head tied to the embedding
            own["kernel"] = nnx.Param(site.kernel, axes=site.module.axes)
        if not own:
            raise UserError(f"method.modules_to_save: {site.names[0]} has no parameters of its own; leave it out")
        hf = {suffix: HfLeaf(leaf, axes=order) for leaf, (suffix, order) in stored.items() if leaf in own}
        add_copies(site, name, Override(own, hf, mask))


def replaced(model: nnx.Module, name: str) -> set[str]:
    """The paths of the base's parameters that adapter `name` replaces with trained copies, except in stacked layers."""
    return {
        f"{site.path}.{leaf}"
        for site, adapter in adapters_named(model, name)
        for part in parts(adapter)
        if isinstance(part, Override) and not site.stack
        for leaf in part.leaves
    }
