"""The record that a model keeps of its adapters: which are attached, active and merged, and what they were trained on."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.sites import sites
from peftjax.core.errors import UserError, shown
from peftjax.core.paths import suggest
from peftjax.nn.slot import RECORD

ModelT = TypeVar("ModelT", bound=nnx.Module)
T = TypeVar("T")

Before = dict[str, dict[str, Any]]  # {path: {leaf: a parameter, as a pytree of `OnHost`}}


@dataclasses.dataclass(frozen=True, eq=False)
class Merge:
    """One merge of an adapter into the base.

    Attributes:
        name: The adapter.
        before: The parameters before the merge.
        untied: Whether the merge untied the head.
    """

    name: str
    before: Before
    untied: bool


@dataclasses.dataclass(frozen=True)
class BaseName:
    """The base model that an adapter file names.

    Attributes:
        name: The hub id or directory.
        revision: Branch, tag or commit of a hub id.
    """

    name: str
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class Registry:
    """The adapters of a model.

    To NNX this is static: it is part of the model's graph definition, and the arrays of `merges` are not in its state.

    Attributes:
        methods: (name, method) of each attached adapter.
        active: Names of the active adapters, innermost first.
        merges: Merges, newest first.
        trained_on: (name, ((path, format), ...)): the quantized kernels that an adapter was trained on, and their formats.
        bases: (name, base) of each adapter that was loaded from a file that names its base.
    """

    methods: tuple[tuple[str, Method], ...] = ()
    active: tuple[str, ...] = ()
    merges: tuple[Merge, ...] = ()
    trained_on: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    bases: tuple[tuple[str, BaseName], ...] = ()

    def with_method(self, name: str, method: Method) -> "Registry":
        """Add an attached adapter."""
        return dataclasses.replace(self, methods=(*self.methods, (name, method)))

    def with_formats(self, name: str, formats: Mapping[str, str]) -> "Registry":
        """Record the formats, by path, of the kernels that an adapter was trained on."""
        recorded = (name, tuple(sorted(formats.items())))
        return dataclasses.replace(self, trained_on=(*_without(self.trained_on, name), recorded))

    def with_base(self, name: str, base: BaseName) -> "Registry":
        """Record what the file of an adapter calls its base."""
        return dataclasses.replace(self, bases=(*_without(self.bases, name), (name, base)))

    def without(self, name: str) -> "Registry":
        """Remove an adapter that is not merged."""
        assert name not in [merge.name for merge in self.merges]
        return dataclasses.replace(
            self,
            methods=_without(self.methods, name),
            active=tuple(other for other in self.active if other != name),
            trained_on=_without(self.trained_on, name),
            bases=_without(self.bases, name),
        )


def _without(pairs: tuple[tuple[str, T], ...], name: str) -> tuple[tuple[str, T], ...]:
    return tuple(pair for pair in pairs if pair[0] != name)


def registry_of(model: nnx.Module) -> Registry:
    """Return the registry of a model; empty if no adapter was ever attached.

    Raises:
        UserError: `model` is no model.
    """
    if not isinstance(model, nnx.Module):
        raise UserError(f"the model must be an nnx.Module, not {shown(model)}")
    registry: Registry = vars(model).get(RECORD, Registry())
    return registry


def set_registry(model: nnx.Module, registry: Registry) -> None:
    """Replace the registry of a model. A model without adapters has no registry."""
    if registry != Registry():
        setattr(model, RECORD, registry)
    elif RECORD in vars(model):
        delattr(model, RECORD)


def attached(model: nnx.Module) -> dict[str, Method]:
    """Return the methods attached to a model, by adapter name."""
    return dict(registry_of(model).methods)


def active(model: nnx.Module) -> tuple[str, ...]:
    """Return the names of the active adapters, innermost first."""
    return registry_of(model).active


def merged(model: nnx.Module) -> list[str]:
    """Return the names of the merged adapters, newest first."""
    return [merge.name for merge in registry_of(model).merges]


def parameters_before(model: nnx.Module, name: str) -> dict[str, Any]:
    """Return the base parameters that differed before adapter `name` was merged, by path, as pytrees of `OnHost`."""
    newest = merged(model)
    undone = registry_of(model).merges[: newest.index(name) + 1] if name in newest else ()
    return {
        f"{path}.{leaf}": value
        for merge in undone
        for path, leaves in merge.before.items()
        for leaf, value in leaves.items()
    }


def require(model: nnx.Module, name: str) -> None:
    """Require that an adapter is attached; a `UserError` otherwise."""
    if not isinstance(name, str) or name not in attached(model):  # a list has no hash
        raise UserError(
            f"no adapter {name!r} is attached.{suggest(str(name), attached(model))} Attached: {list(attached(model))}"
        )


def use(model: ModelT, names: str | Sequence[str] | None) -> ModelT:
    """Activate some adapters and deactivate all others.

    The model changes for all threads that use it. A program that answers with different adapters in several threads calls
    `nnx.split` once after each `use` and gives each thread its own `nnx.merge(graph, state)`; the parts share their arrays.

    Args:
        model: The model; it is changed in place.
        names: One adapter, or several; where several share a slot, a later one wraps the earlier ones. None: the base
            alone.

    Returns:
        The model.

    Raises:
        UserError: An adapter is not attached, is merged, or is named twice.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.load_model("embedded")
        >>> model = peftjax.attach(model, peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> model = peftjax.use(model, None)  # the base model alone
        >>> model = peftjax.use(model, "default")
    """
    if not isinstance(names, str | Iterable | None):
        raise UserError(f"use: names must be the name of an adapter, a list of names or None, not {shown(names)}")
    names = (names,) if isinstance(names, str) else tuple(names or ())
    for name in names:
        require(model, name)
        if name in merged(model):
            raise UserError(
                f"use: adapter {name!r} is merged into the base, and would be applied twice; undo that first with "
                f"unmerge(model, {name!r})"
            )
    if len(set(names)) < len(names):
        raise UserError(f"use: {names} names an adapter twice")
    for site in sites(model):
        slot = site.module.adapters
        slot.active = tuple(name for name in names if name in slot.names())
    set_registry(model, dataclasses.replace(registry_of(model), active=names))
    return model
