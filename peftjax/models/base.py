"""STUB, replaced by the typed Model."""

from typing import Any

from flax import nnx


class Model(nnx.Module):
    config: Any
    virtual: Any
    hidden: Any
    logits: Any
    __call__: Any
