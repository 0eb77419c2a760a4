"""The older names of modules in adapter files, from transformers 4, which checkpoints keep."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from flax import nnx

from peftjax.adapters.sites import SingleSite, Site, single_sites, sites
from peftjax.core.paths import last_parts
from peftjax.io.multimodal import in_other_parts
from peftjax.models.base import Model

T = TypeVar("T")


def older_names(model: nnx.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return {older name: name} of the modules whose older names these keys of an adapter file use; empty if none does.

    The older names are from transformers 4; checkpoints keep them.
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
    """Return the older names of the modules that have one, including single experts, as in transformers 4."""
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


def with_older_names(tensors: Mapping[str, T], older: Mapping[str, str]) -> dict[str, T]:
    """Replace the older names of modules in keys, {older name: name}."""

    def renamed(key: str) -> str:
        parts = key.split(".")
        for start in range(len(parts)):
            for end in range(len(parts), start, -1):
                if (name := older.get(".".join(parts[start:end]))) is not None:
                    return ".".join([*parts[:start], name, *parts[end:]])
        return key

    return {renamed(key): value for key, value in tensors.items()}
