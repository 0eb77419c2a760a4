"""Which tensors of a checkpoint hold which parameters of a model."""

import dataclasses
import functools

from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.nn.experts import ExpertLinear
from peftjax.nn.layer import Layer
from peftjax.nn.linear import Linear
from peftjax.nn.routing import Router


@dataclasses.dataclass(frozen=True)
class Entry:
    """A base parameter and the checkpoint tensors that hold it: one, or one per layer if it is stacked.

    Attributes:
        path: Path of the parameter in the model.
        hf_modules: Names in transformers of the module that owns it, one per layer if it is stacked.
        keys: Names of the tensors.
        shape: Shape of the parameter.
        axes: Logical axes of the parameter, the first "layers" if it is stacked.
        stacked: Whether it has a leading layer axis.
        order: The tensors are transposed by this permutation (torch stores [out, in]: (1, 0)); None: they are not.
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
        """The shape of each tensor."""
        return self._stored(self.shape)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """The shape of each kernel in NF4: [out, in], also where a dense tensor is [in, out], as in a GPT-2."""
        *lead, inputs, outputs = self.shape[1:] if self.stacked else self.shape
        return (*lead, outputs, inputs)

    def stored_sharding(self, whole: NamedSharding) -> NamedSharding:
        """The sharding of one tensor with which every device reads only what its shard of the parameter needs."""
        return NamedSharding(whole.mesh, PartitionSpec(*self._stored(tuple(whole.spec))))

    def _stored(self, dimensions: tuple) -> tuple:
        layer = dimensions[1:] if self.stacked else dimensions
        return layer if self.order is None else tuple(layer[axis] for axis in self.order)


def entries(model: Model) -> list[Entry]:
    """Return every base parameter of a model with its checkpoint tensors."""
    in_class = model.hf_modules
    in_file = {**in_class, **model.hf_renamed}
    result = []
    for path, variable in variables.flat(model)[1].items():
        if type(variable) is not nnx.Param:
            continue
        module_path, _, leaf = path.rpartition(".")
        module = module_at(model, module_path)
        assert isinstance(module, Layer), path
        suffix, order = module.hf_leaves[leaf]
        stacked = variable.axes[0] == "layers"
        layers = model.layer_numbers(path, variable.shape[0]) if stacked else (0,)
        modules = tuple(in_class[module_path].format(layer) for layer in layers)
        name = in_file[module_path] + (suffix if suffix[:1] in ("", "_") else f".{suffix}")
        keys = tuple(name.format(layer) for layer in layers)
        result.append(Entry(path, modules, keys, tuple(variable.shape), tuple(variable.axes), stacked, order))
    return result


def is_linear(model: Model, entry: Entry) -> bool:
    """Whether the parameter is the kernel of a linear layer, or of experts, which may be quantized."""
    return isinstance(module_at(model, entry.module), Linear | ExpertLinear) and entry.path.endswith(".kernel")


def is_router(model: Model, entry: Entry) -> bool:
    """Whether the parameter is a router's, which is never quantized."""
    return isinstance(module_at(model, entry.module), Router)


def module_at(model: Model, path: str) -> nnx.Module:
    """Return the module at a path."""
    module: nnx.Module = functools.reduce(getattr, path.split("."), model)
    return module
