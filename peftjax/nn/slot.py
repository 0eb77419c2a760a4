"""The place in a layer where adapters sit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx


class Adapter(nnx.Module):
    """What a method puts into a slot: wraps the computation of the slot's owner.

    `adapter(owner, compute, *inputs, **parameters)` returns what the owner shall return. `compute` is what it wraps:
    the owner's own computation or the adapter attached before. Keyword arguments of `compute` replace the owner's own
    parameters (`kernel=`, `bias=`, ...), so an adapter that wraps must pass on those that it was given.

    virtual: how many positions it puts before the first token of every sequence, so that this one is at position
    `virtual`. In an embedding's slot it then says them by `prompt()`, [virtual, D]; in an attention core's slot they
    are keys and values of its own.
    """

    virtual: int = 0

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        raise NotImplementedError


class Slot(nnx.Module):
    """Named adapters of one layer, as attributes; the active ones wrap the layer's computation in their order."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        for name in self.active:
            compute = partial(self.adapter(name), owner, compute)
        return compute(*inputs, **parameters)

    @property
    def virtual(self) -> int:
        """How many positions the active adapters put before the first token."""
        return sum(self.adapter(name).virtual for name in self.active)

    def adapter(self, name: str) -> Any:
        """The adapter called `name`."""
        return getattr(self, name)

    def names(self) -> list[str]:
        """The names of all adapters here, active or not."""
        return [name for name, value in vars(self).items() if isinstance(value, Adapter)]

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter in, not yet active."""
        setattr(self, name, adapter)

    def remove(self, name: str) -> None:
        """Take an adapter out."""
        delattr(self, name)
        self.active = tuple(other for other in self.active if other != name)
