"""The layers of a model that have a slot, their Hugging Face names, and which of them a method's options mean."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from peftjax.core.paths import first_match, matches, suggest, unmatched
from peftjax.nn.embedding import Embedding
from peftjax.nn.slot import Adapter, Slot


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer with a slot.

    path: ours; names: what Hugging Face calls it, one for each layer of a stack; stack: (L,), or () when not stacked;
    model: what it is part of.
    """

    path: str
    module: Any
    names: tuple[str, ...]
    stack: tuple[int, ...]
    model: Any = dataclasses.field(repr=False)

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The indices to give to `MethodAdapter.hf_leaves`, in the order of `names`."""
        return tuple(range(self.stack[0])) if self.stack else (None,)

    @property
    def parameters(self) -> dict[str, nnx.Variable]:
        """The layer's own parameters by name."""
        return {key: value for key, value in vars(self.module).items() if isinstance(value, nnx.Param)}

    @property
    def kernel(self) -> jax.Array:
        """The kernel [*stack, in, out] of a Linear, a tied head's too, or the table [V, D] of an Embedding."""
        own = self.parameters.get("kernel", self.parameters.get("embedding"))
        return tied_kernel(self.model) if own is None else own.get_value()

    def lead(self, *axes: str | None) -> tuple[str | None, ...]:
        """Logical axes of a parameter that sits here, with the stack's before them."""
        return ("layers", *axes) if self.stack else axes


Chosen = list[tuple[Site, np.ndarray]]  # sites, each with a bool for every layer


def sites(model: nnx.Module) -> list[Site]:
    """All layers of a model that have a slot, in a fixed order."""
    names = getattr(model, "hf_modules", {})
    depth: dict[str, int] = {}  # top-level part -> its number of layers
    for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if (getattr(variable, "axes", None) or (None,))[0] == "layers":
            depth[str(key[0])] = variable.shape[0]
    found = []
    for key, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "adapters", None), Slot):
            path = ".".join(map(str, key))
            stack = (depth[str(key[0])],) if str(key[0]) in depth else ()
            name = names.get(path, path)
            expanded = tuple(name.format(layer) for layer in range(stack[0])) if stack else (name,)
            found.append(Site(path, module, expanded, stack, model))
    return sorted(found, key=lambda site: site.path)


def adapters_named(model: nnx.Module, name: str) -> list[tuple[Site, Any]]:
    """The adapters called `name`, each with its site."""
    return [(site, site.module.adapters.adapter(name)) for site in sites(model) if name in site.module.adapters.names()]


def token_tables(model: Any) -> list[Site]:
    """The embedding of a model's tokens; where the model does not say which it is, all that it has."""
    tables = [site for site in sites(model) if isinstance(site.module, Embedding) and not site.stack]
    return [site for site in tables if site.module is getattr(model, "embed", None)] or tables


def head_sites(model: nnx.Module) -> list[Site]:
    """The layers of a classification head, which every method trains whole, as peft does."""
    return [site for site in sites(model) if site.path in getattr(type(model), "task_head", ())]


def choose(
    candidates: Iterable[Site],
    targets: str | tuple[str, ...],
    *,
    exclude: str | tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    what: str = "targets",
) -> Chosen:
    """The sites that `targets` means, each with a bool for every name of it (every layer of the stack).

    Raises:
        ValueError: an entry that matches nothing, a layer that is not there, or a choice that is empty.
    """
    candidates = list(candidates)
    names = [name for site in candidates for name in site.names]
    if not names:
        raise ValueError(f"method.{what}={targets!r}: this model has no layer with a slot of the kind that it needs")
    for option, pattern in ((what, targets), ("exclude", exclude)):
        if missing := [entry for entry in unmatched(names, pattern) if entry]:
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"method.{option}: {', '.join(map(repr, missing))} matches no layer of this model."
                f"{suggest(missing[0], last)} Its layers: {', '.join(last)}"
            )
    depth = max((site.stack[0] for site in candidates if site.stack), default=0)
    if beyond := [layer for layer in layers if not 0 <= layer < depth]:
        raise ValueError(
            f"method.layers_to_transform: layer {beyond[0]} is not there; the model has layers 0 to {depth - 1}"
        )
    chosen = []
    for site in candidates:
        mask = np.array([
            matches(name, targets)
            and not (exclude and matches(name, exclude))
            and not (layers and index not in layers)
            for index, name in zip(site.layers, site.names, strict=True)
        ])  # fmt: skip
        if mask.any():
            chosen.append((site, mask))
    if not chosen:
        raise ValueError(
            f"method.{what}={targets!r} with exclude={exclude!r} and layers {list(layers)} chooses nothing"
        )
    return chosen


def by_name(site: Site, table: tuple[tuple[str, Any], ...], default: Any) -> np.ndarray:
    """For every name of a site, the value of the first entry of `table` that means it, else `default`."""
    found = [first_match(name, table) for name in site.names]
    return np.array([default if value is None else value for value in found])


def check_table(option: str, table: tuple[tuple[str, Any], ...], chosen: Chosen) -> None:
    """A ValueError for an entry of rank_pattern or alpha_pattern that means no chosen layer."""
    names = [name for site, mask in chosen for name, used in zip(site.names, mask, strict=True) if used]
    for key, value in table:
        if not any(first_match(name, ((key, value),)) is not None for name in names):
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ValueError(
                f"method.{option}: {key!r} matches no target.{suggest(key, last)} Targets: {', '.join(last)}"
            )


def check_rank(rank: int, site: Site, option: str = "rank") -> None:
    """A ValueError for a rank that a layer's kernel cannot have."""
    limit = min(site.module.in_features, site.module.out_features)
    if rank > limit:
        raise ValueError(f"method.{option}={rank} is larger than {site.names[0]} allows: its smaller side is {limit}")


def place(site: Site, name: str, adapter: Adapter) -> None:
    """Put an adapter into a site's slot, once."""
    if name in site.module.adapters.names():
        raise ValueError(f"method: {site.names[0]} is asked for twice (as a target and in modules_to_save?)")
    site.module.adapters.add(name, adapter)


def tied_kernel(model: Any) -> jax.Array:
    """The kernel [D, V] that a tied head borrows."""
    return model.embed.embedding.get_value().T
