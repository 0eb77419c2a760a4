"""A head that may borrow the embedding's table."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx


class TiedHead(nnx.Module):
    """A model with `embed` and `head`, a Linear that owns no kernel where it is tied; `config.tied` says so too."""

    config: Any
    embed: Any
    head: Any

    @property
    def tied(self) -> bool:
        """Whether the head borrows the embedding's table."""
        return self.head.kernel is None

    def untie(self) -> None:
        """Give the head a kernel of its own, a copy of the embedding's table."""
        self.head.kernel = nnx.data(nnx.Param(jnp.array(self.embed.embedding.get_value().T), axes=self.head.axes))
        self.config = dataclasses.replace(self.config, tied=False)

    def tie(self) -> None:
        """Let the head borrow the embedding's table again."""
        self.head.kernel = nnx.data(None)
        self.config = dataclasses.replace(self.config, tied=True)
