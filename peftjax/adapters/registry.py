"""Which adapters a model has, and which of them are active or merged."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.sites import sites
from peftjax.core.paths import suggest


def attached(model: nnx.Module) -> dict[str, Method]:
    """The methods attached to a model, by adapter name."""
    return dict(getattr(model, "methods", ()))


def active(model: Any) -> tuple[str, ...]:
    """The names of the adapters that take part in the computation, the innermost first."""
    return getattr(model, "used", ())


def merged(model: Any) -> list[str]:
    """The names of merged adapters, the newest first."""
    return [merge.name for merge in merges(model)]


def parameters_before(model: Any, name: str) -> dict[str, Any]:
    """By path, those parameters of the base that were others before the adapters called `name` were merged: trees of
    `OnHost`."""
    newest = merged(model)
    undone = merges(model)[: newest.index(name) + 1] if name in newest else []
    return {
        f"{path}.{leaf}": value
        for merge in undone
        for path, leaves in merge.before.items()
        for leaf, value in leaves.items()
    }


@dataclasses.dataclass(frozen=True)
class Merge:
    """One merge: {path: {leaf: the parameter before, a tree of `OnHost`}}, and whether it untied the head."""

    name: str
    before: dict[str, dict[str, Any]]
    untied: bool


class Merges:
    """The merges of a model, newest first. Not a list, so that NNX takes it for structure and keeps its arrays out of
    the state."""

    def __init__(self, items: list[Merge]) -> None:
        self.items = items


def merges(model: Any) -> list[Merge]:
    merges = getattr(model, "merges", None)
    return merges.items if merges else []


def require(model: Any, name: str) -> None:
    if name not in attached(model):
        raise ValueError(
            f"no adapter {name!r} is attached.{suggest(name, attached(model))} Attached: {list(attached(model))}"
        )


def use(model: Any, names: str | Sequence[str] | None) -> Any:
    """Let the adapters called so, and no others, take part in the computation; None: the base alone.

    Where several sit in one slot, a later one wraps those before it.
    """
    names = (names,) if isinstance(names, str) else tuple(names or ())
    for name in names:
        require(model, name)
    if len(set(names)) < len(names):
        raise ValueError(f"use: {names} names an adapter twice")
    for site in sites(model):
        slot = site.module.adapters
        slot.active = tuple(name for name in names if name in slot.names())
    model.used = names
    return model
