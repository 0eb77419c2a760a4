"""Full fine-tuning: nothing is added, and the base itself is what the mask says yes to."""

import dataclasses
from typing import ClassVar

from flax import nnx

from peftjax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains every parameter of the base. It has no options and no adapter file: the result is the model."""

    method: ClassVar[str] = "full"
    trains: ClassVar[type[nnx.Variable]] = nnx.Param

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        del model, name, rngs
