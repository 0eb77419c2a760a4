"""Slots: where adapters attach to a layer, and how they wrap its computation."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx

ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Base:
    """The computation that an adapter wraps: the layer's own, or the next inner adapter's.

    Attributes:
        layer: The module that owns the slot.
        compute: The wrapped computation. Keyword arguments replace parameters of the layer.
        replaced: The parameters that an outer adapter has replaced for this call.
    """

    layer: Any
    compute: Callable[..., jax.Array]
    replaced: Mapping[str, jax.Array]

    def __call__(self, *inputs: Any, **parameters: jax.Array) -> jax.Array:
        """Run the computation, with some of the layer's parameters replaced: `base(x, kernel=...)`."""
        return self.compute(*inputs, **{**self.replaced, **parameters})

    def has(self, leaf: str) -> bool:
        """Whether the layer computes with a parameter of this name, such as `"bias"`."""
        return leaf in self.replaced or vars(self.layer).get(leaf) is not None

    def parameter(self, leaf: str) -> jax.Array:
        """The parameter in effect: its replacement for this call, or else the layer's own."""
        return self.replaced[leaf] if leaf in self.replaced else getattr(self.layer, leaf).get_value()


class Adapter(nnx.Module):
    """What a method puts into a slot. A subclass implements `apply`.

    Attributes:
        virtual: How many virtual positions the adapter puts before the first token of every sequence, which is then at
            position `virtual`. In the slot of an embedding, `prompt()` returns their vectors, [virtual, D]; in the
            slot of an attention core they are additional keys and values.
    """

    virtual: int = 0

    def apply(self, base: Base, *inputs: Any, **options: Any) -> jax.Array:
        """The layer's output with this adapter; `base(*inputs)` is its output without the adapter."""
        raise NotImplementedError

    def __call__(
        self, layer: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: jax.Array
    ) -> jax.Array:
        return self.apply(Base(layer, compute, parameters), *inputs)


DOT = "%2E"  # in the name of an attribute, for a dot in an adapter's name: dots separate the parts of a variable's path

RECORD = "peft_registry"  # the attribute in which a model keeps the record of its adapters (adapters/registry.py)


class Slot(nnx.Module):
    """The adapters of one layer, by name. The active ones wrap its computation, the first innermost."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()

    def __call__(
        self, layer: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: jax.Array
    ) -> jax.Array:
        for name in self.active:
            compute = partial(self.adapter(name), layer, compute)
        return compute(*inputs, **parameters)

    @property
    def virtual(self) -> int:
        """The number of virtual positions that the active adapters put before the first token."""
        return sum(adapter.virtual for adapter in self.active_adapters())

    def active_adapters(self) -> list[Any]:
        """The active adapters, innermost first."""
        return [self.adapter(name) for name in self.active]

    def adapter(self, name: str) -> Any:
        """The adapter called `name`."""
        return getattr(self, name.replace(".", DOT))

    def names(self) -> list[str]:
        """The names of all adapters in this slot, active or not."""
        return [name.replace(DOT, ".") for name, value in vars(self).items() if isinstance(value, Adapter)]

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, inactive at first."""
        setattr(self, name.replace(".", DOT), adapter)

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        delattr(self, name.replace(".", DOT))
        self.active = tuple(other for other in self.active if other != name)


def active_view(model: ModelT) -> ModelT:
    """Return the model without inactive adapters, its active ones renamed `a0`, `a1`, ... in their order.

    The view has the same structure for all adapters of the same shapes, so one compiled function runs them all. It shares
    the variables of the model and has no record of adapters.
    """
    view: ModelT = nnx.merge(*nnx.split(model))
    for slot in [module for _, module in nnx.iter_modules(view) if isinstance(module, Slot)]:
        active = slot.active_adapters()
        for name in slot.names():
            slot.remove(name)
        for index, adapter in enumerate(active):
            slot.add(f"a{index}", adapter)
        slot.active = tuple(f"a{index}" for index in range(len(active)))
    if RECORD in vars(view):
        delattr(view, RECORD)
    return view
