"""The layers of a model that have a slot, their Hugging Face names, and which of them a method's options select."""

import dataclasses
import itertools
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.core.paths import first_match, matches, matching, suggest, unmatched
from peftjax.models.base import LanguageModel, Model
from peftjax.nn.embedding import Embedding
from peftjax.nn.experts import ExpertLinear
from peftjax.nn.layer import SlottedLayer
from peftjax.nn.slot import Adapter


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer with a slot.

    Attributes:
        path: Its path in the model.
        module: The layer. Methods check its class before they read its attributes.
        names: Its names in Hugging Face, one for each layer of a stack.
        stack: (L,), or () if it is not stacked.
        model: The model it is part of.
    """

    path: str
    module: Any
    names: tuple[str, ...]
    stack: tuple[int, ...]
    model: nnx.Module = dataclasses.field(repr=False)

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layer arguments of `MethodAdapter.hf_leaves`, in the order of `names`."""
        return tuple(range(self.stack[0])) if self.stack else (None,)

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """The numbers of its layers in the model, in the order of `names`."""
        if not self.stack or not isinstance(self.model, Model):
            return self.layers
        return self.model.layer_numbers(self.path, self.stack[0])

    @property
    def spellings(self) -> list[tuple[str, ...]]:
        """For each layer, the names by which options select it."""
        return [(name,) for name in self.names]

    @property
    def parts(self) -> tuple[str, ...]:
        """The layers of a single expert that its kernel consists of, by name; () if it has no experts that files split."""
        if not isinstance(self.module, ExpertLinear) or not isinstance(self.model, Model):
            return ()
        return self.model.hf_experts.get(self.names[0].rpartition(".")[2], ())

    @property
    def single_experts(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The names of the layers of single experts, by layer and expert; () if it has no experts that adapter files split."""
        if not (parts := self.parts):
            return ()
        containers = (name.rpartition(".")[0] for name in self.names)
        return tuple(
            tuple(tuple(f"{container}.{expert}.{part}" for part in parts) for expert in range(self.module.experts))
            for container in containers
        )

    @property
    def parameters(self) -> dict[str, nnx.Variable]:
        """The layer's own parameters, by name."""
        return {key: value for key, value in vars(self.module).items() if isinstance(value, nnx.Param)}

    @property
    def kernel(self) -> jax.Array:
        """The kernel [*stack, in, out] of a Linear, also of a tied head, or the table [V, D] of an Embedding."""
        own = self.parameters.get("kernel", self.parameters.get("embedding"))
        return tied_kernel(self.model) if own is None else own.get_value()

    def lead(self, *axes: str | None) -> tuple[str | None, ...]:
        """Return the logical axes of an adapter parameter at this site: `axes` after the stack's."""
        return ("layers", *axes) if self.stack else axes


@dataclasses.dataclass(frozen=True)
class SingleSite(Site):
    """One layer of one expert, such as `experts.7.gate_proj`, in all layers of a stack.

    Its path and module are those of all experts, and the names of all experts select it, too.

    Attributes:
        experts: All experts.
        expert: The number of its expert.
        part: The position of the layer in the expert's kernel, as in `Site.parts`.
    """

    experts: Site
    expert: int
    part: int

    @property
    def spellings(self) -> list[tuple[str, ...]]:
        return list(zip(self.names, self.experts.names, strict=True))


_OF_ALL_EXPERTS = re.compile(r"[\w.\\]*experts\\?\.\w+")  # "experts.down_proj", which names no single one

Chosen = list[tuple[Site, np.ndarray]]  # sites, each with a bool per layer


def sites(model: nnx.Module) -> list[Site]:
    """Return all layers of a model that have a slot, in a fixed order."""
    names = model.hf_modules if isinstance(model, Model) else {}
    nodes = list(nnx.iter_graph(model))
    depth: dict[str, int] = {}  # top-level module -> its number of layers
    for key, variable in nodes:
        if isinstance(variable, nnx.Param) and (variable.get_metadata().get("axes") or (None,))[0] == "layers":
            depth[str(key[0])] = variable.shape[0]
    found = []
    for key, module in nodes:
        if isinstance(module, SlottedLayer):
            path = ".".join(map(str, key))
            stack = (depth[str(key[0])],) if str(key[0]) in depth else ()
            site = Site(path, module, (names.get(path, path),), stack, model)
            if stack:
                site = dataclasses.replace(site, names=tuple(site.names[0].format(number) for number in site.numbers))
            found.append(site)
    return sorted(found, key=lambda site: site.path)


def single_sites(site: Site) -> list[SingleSite]:
    """Return the layers of the single experts of a site; none if it has no experts that adapter files split."""
    by_layer = site.single_experts
    return [
        SingleSite(
            site.path, site.module, tuple(names[expert][part] for names in by_layer), site.stack, site.model, site, expert, part
        )
        for expert in range(len(by_layer[0]) if by_layer else 0)
        for part in range(len(site.parts))
    ]  # fmt: skip


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


def spelled(found: Iterable[Site]) -> list[str]:
    """Return all names by which options select the layers of some sites."""
    return list(dict.fromkeys(name for site in found for names in site.spellings for name in names))


def depth_of(found: Iterable[Site]) -> int:
    """Return the number of layers of the model that the sites are in; 0 if none is stacked."""
    return 1 + max((number for site in found for number in site.numbers if number is not None), default=-1)


def adapters_named(model: nnx.Module, name: str) -> list[tuple[Site, Any]]:
    """Return the layers of adapter `name`, each with its site."""
    return [(site, site.module.adapters.adapter(name)) for site in sites(model) if name in site.module.adapters.names()]


def token_tables(model: nnx.Module) -> list[Site]:
    """Return the token embedding of a model, `embed`; all embeddings if it has none of that name."""
    tables = [site for site in sites(model) if isinstance(site.module, Embedding) and not site.stack]
    return [site for site in tables if site.path == "embed"] or tables


def tied_pair(model: nnx.Module) -> tuple[Site, Site] | None:
    """Return the sites of the embedding and of the head that is tied to it; None if there is no tied head."""
    if not isinstance(model, LanguageModel) or not model.tied:
        return None
    found = sites(model)
    embed = next(site for site in found if site.module is model.embed)
    return embed, next(site for site in found if site.module is model.head)


def head_sites(model: nnx.Module) -> list[Site]:
    """Return the layers of the task head, which every method trains in full, as in Hugging Face PEFT."""
    head = model.task_head if isinstance(model, Model) else ()
    return [site for site in sites(model) if site.path in head] if head else []


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
        targets: Names, name endings, or a regular expression for whole names, as in `core.paths.matches`.
        every: Select all candidates. `targets` is then the word for them, for messages.
        exclude: Names to leave out, in the same format.
        layers: Only these layers; empty: all.
        what: The option that `targets` comes from, for messages.

    Returns:
        The selected sites, each with a bool for every layer of its stack.

    Raises:
        UserError: An entry matches nothing, a layer does not exist, or nothing is selected.
    """
    names = spelled(candidates)
    if not names:
        raise UserError(f"method.{what}={targets!r}: this model has no layer of a suitable kind with a slot")
    for option, pattern in ((what, () if every else targets), ("exclude", exclude)):
        with matching(f"method.{option}", pattern):
            missing = [entry for entry in unmatched(names, pattern) if entry]
        if missing:
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
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
                (every or any(matches(name, targets) for name in names))
                and not (exclude and any(matches(name, exclude) for name in names))
                and not (layers and number not in layers)
                for number, names in zip(site.numbers, site.spellings, strict=True)
            ])  # fmt: skip
            if mask.any():
                chosen.append((site, mask))
    if not chosen:
        raise UserError(f"method.{what}={targets!r} with exclude={exclude!r} and layers {list(layers)} selects nothing")
    return chosen


def by_name(site: Site, table: tuple[tuple[str, Any], ...], default: Any) -> np.ndarray:
    """Return for every layer of a site the value of the first entry of `table` that matches its name, else `default`."""
    with matching("method.rank_pattern and alpha_pattern", *(key for key, _ in table)):
        found = [first_match(name, table) for name in site.names]
    return np.array([default if value is None else value for value in found])


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
                found = [first_match(name, table) for name in parts]
                given = [values[layer][expert] if value is None else value for value in found]
                if len(set(given)) > 1:
                    every = " and ".join(f"{value} for {name}" for name, value in zip(parts, given, strict=True))
                    raise UserError(f"method.{option} has {every}, which share A; give them one value")
                values[layer][expert] = given[0]
    return np.array(values)


def _may_name_experts(key: str) -> bool:
    """Whether an entry may name single experts. Others, such as "gate_proj", are for dense layers."""
    return "experts" in key and not _OF_ALL_EXPERTS.fullmatch(key)


def check_table(option: str, table: tuple[tuple[str, Any], ...], chosen: Chosen) -> None:
    """Check that every entry of an option such as rank_pattern matches a selected layer.

    Raises:
        UserError: An entry matches none.
    """
    names = [name for site, mask in chosen for name, used in zip(site.names, mask, strict=True) if used]
    singles = _single_names(chosen) if any(_may_name_experts(key) for key, _ in table) else []
    for key, value in table:
        candidates = itertools.chain(names, singles if _may_name_experts(key) else ())
        with matching(f"method.{option}", key):
            matched = any(first_match(name, ((key, value),)) is not None for name in candidates)
        if not matched:
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise UserError(
                f"method.{option}: {key!r} matches no target.{suggest(key, last)} Targets: {', '.join(last)}"
            )


def _single_names(chosen: Chosen) -> list[str]:
    """The names of the layers of all single experts."""
    by_layer = (
        (experts, used) for site, mask in chosen for experts, used in zip(site.single_experts, mask, strict=False)
    )
    return [name for experts, used in by_layer if used for parts in experts for name in parts]


def check_rank(rank: int, site: Site, option: str = "rank") -> None:
    """Check that a rank does not exceed the smaller dimension of a layer's kernel.

    Raises:
        UserError: It does.
    """
    limit = min(site.module.in_features, site.module.out_features)
    if rank > limit:
        raise UserError(
            f"method.{option}={rank} exceeds the smaller dimension ({limit}) of {site.names[0]}; use at most {limit}"
        )


def insert(site: Site, name: str, adapter: Adapter) -> None:
    """Add an adapter to a site's slot.

    Raises:
        UserError: The slot already has one of that name.
    """
    if name in site.module.adapters.names():
        raise UserError(f"method: {site.names[0]} is selected twice (as a target and in modules_to_save?)")
    site.module.adapters.add(name, adapter)


def tied_kernel(model: nnx.Module) -> jax.Array:
    """Return the kernel [D, V] of a tied head."""
    assert isinstance(model, LanguageModel)
    return model.tied_kernel()
