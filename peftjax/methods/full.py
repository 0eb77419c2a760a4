"""Full fine-tuning: y = x W + b, where W and b themselves are trained."""

import dataclasses
from typing import ClassVar

from flax import nnx

from peftjax.adapters.method import Method
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.quant.base import Quantized


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Train every parameter of the base. There are no options and no adapter file: the result is the model."""

    method: ClassVar[str] = "full"
    trains: ClassVar[type[nnx.Variable]] = nnx.Param

    def check(self, model: nnx.Module) -> None:
        if any(isinstance(leaf.get_value(), Quantized) for leaf in variables.flat(model)[1].values()):
            raise UserError(
                "method.name='full' trains the base itself, which cannot be quantized: set model.quantize=''"
            )

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        del model, name, rngs
