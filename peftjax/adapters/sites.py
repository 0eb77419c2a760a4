"""The layers of a model that have a slot, and their Hugging Face names."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from peftjax.core.errors import UserError
from peftjax.core.variables import dotted
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

    It shares its path and module with all experts, and their names select it, too.

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


def sites(model: nnx.Module) -> list[Site]:
    """Return all layers of a model that have a slot, in a fixed order."""
    names = model.hf_modules if isinstance(model, Model) else {}
    # `iter_graph` also enters containers that our models do not have, and takes four times as long
    nodes = list(_nodes(model, (), set()) if isinstance(model, Model) else nnx.iter_graph(model))
    depth: dict[str, int] = {}  # top-level module -> its number of layers
    for key, variable in nodes:
        if isinstance(variable, nnx.Param) and (variable.get_metadata().get("axes") or (None,))[0] == "layers":
            depth[str(key[0])] = variable.shape[0]
    found = []
    for key, module in nodes:
        if isinstance(module, SlottedLayer):
            path = dotted(key)
            stack = (depth[str(key[0])],) if str(key[0]) in depth else ()
            site = Site(path, module, (names.get(path, path),), stack, model)
            if stack:
                site = dataclasses.replace(site, names=tuple(site.names[0].format(number) for number in site.numbers))
            found.append(site)
    return sorted(found, key=lambda site: site.path)


def _nodes(node: nnx.Pytree, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A module and all modules and variables in it, each once, with their paths."""
    seen.add(id(node))
    yield path, node
    for name, value in sorted(vars(node).items()):
        if isinstance(value, nnx.Pytree) and id(value) not in seen:
            yield from _nodes(value, (*path, name), seen)
        elif isinstance(value, nnx.Variable):
            yield (*path, name), value


def inner_model(model: nnx.Module) -> str | None:
    """Return the path of a peftjax model inside a user's module; None if there is none."""
    if isinstance(model, Model):
        return None
    return next((dotted(path) for path, module in nnx.iter_modules(model) if isinstance(module, Model)), None)


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


def insert(site: Site, name: str, adapter: Adapter) -> None:
    """Add an adapter to a site's slot; a `UserError` if it already has one of that name."""
    if name in site.module.adapters.names():
        raise UserError(f"method: {site.names[0]} is selected twice (as a target and in modules_to_save?)")
    site.module.adapters.add(name, adapter)


def tied_kernel(model: nnx.Module) -> jax.Array:
    """Return the kernel [D, V] of a tied head."""
    assert isinstance(model, LanguageModel)
    return model.tied_kernel()
