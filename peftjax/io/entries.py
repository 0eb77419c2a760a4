"""Which tensors of a checkpoint hold which parameters of a model."""

import dataclasses
import functools
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core import variables
from peftjax.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class Entry:
    """A base parameter and the checkpoint tensors that hold it: one, or one a layer if it is stacked.

    shape and axes are the parameter's, with a leading "layers" if stacked; stored_shape is that of each tensor, whose
    dimensions are the parameter's in `order` (torch keeps [out, in]: (1, 0)), or just those if it is None. hf_modules:
    what transformers calls the module that owns it, or its layers.
    """

    path: str
    hf_modules: tuple[str, ...]
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stacked: bool
    order: tuple[int, ...] | None

    @property
    def module(self) -> str:
        """The path of the module that owns it."""
        return self.path.rpartition(".")[0]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self._stored(self.shape)

    def stored_sharding(self, whole: NamedSharding) -> NamedSharding:
        """Where one stored tensor lies so that every device has just what goes into its part of the parameter."""
        return NamedSharding(whole.mesh, PartitionSpec(*self._stored(tuple(whole.spec))))

    def _stored(self, dimensions: tuple) -> tuple:
        layer = dimensions[1:] if self.stacked else dimensions
        return layer if self.order is None else tuple(layer[axis] for axis in self.order)


def entries(model: Any) -> list[Entry]:
    """Every base parameter of a model with its checkpoint tensors, from `hf_modules` and its modules' `hf_leaves`.

    `hf_renamed`, where a family has it: the modules that checkpoints call otherwise than transformers' class does.
    """
    in_class = model.hf_modules
    in_file = in_class | getattr(model, "hf_renamed", {})
    result = []
    for path, variable in variables.flat(model)[1].items():
        if type(variable) is not nnx.Param:
            continue
        module_path, _, leaf = path.rpartition(".")
        module = functools.reduce(getattr, module_path.split("."), model)
        suffix, order = type(module).hf_leaves[leaf]
        stacked = variable.axes[0] == "layers"
        layers = range(variable.shape[0] if stacked else 1)
        modules = tuple(in_class[module_path].format(layer) for layer in layers)
        keys = tuple(f"{in_file[module_path]}.{suffix}".format(layer) for layer in layers)
        result.append(Entry(path, modules, keys, tuple(variable.shape), tuple(variable.axes), stacked, order))
    return result


def is_linear(model: Any, entry: Entry) -> bool:
    """Whether the parameter is the kernel of a linear layer, which may be quantized."""
    module = functools.reduce(getattr, entry.module.split("."), model)
    return isinstance(module, Linear) and entry.path.endswith(".kernel")
