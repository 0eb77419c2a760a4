"""What sits in a layer's slot: adapters that are counted, written to files and merged, and the parts they are made of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.core import variables
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.nn.slot import Adapter
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True)
class HfLeaf:
    """Where one tensor of an adapter file lives: `leaf[layer][window]` of an adapter, then transposed by `axes` and
    reshaped to `shape`."""

    leaf: str
    window: tuple[slice, ...] = ()
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def write(self, array: Any) -> Any:
        """What the file holds, from the leaf's array of one layer."""
        part = array[self.window]
        part = part if self.axes is None else part.transpose(self.axes)
        return part if self.shape is None else part.reshape(self.shape)

    def read(self, tensor: Any, into: Any) -> None:
        """Write a tensor of the file into a layer's array; a ValueError where it has another shape."""
        window = into[self.window]
        expected = self.write(into).shape
        if tensor.shape != expected:
            raise ValueError(f"has shape {tensor.shape}, this model needs {expected}")
        axes = tuple(range(window.ndim)) if self.axes is None else self.axes
        turned = tensor.reshape([window.shape[axis] for axis in axes])
        window[...] = turned.transpose([axes.index(axis) for axis in range(window.ndim)]).astype(window.dtype)


def transposed(leaf: str) -> HfLeaf:
    """A matrix that the file holds the other way round."""
    return HfLeaf(leaf, axes=(1, 0))


class MethodAdapter(Adapter):
    """An adapter that can be counted, written to a Hugging Face file and, for weight methods, merged."""

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        """The tensors that an adapter file holds for one layer (None: the module is not stacked), by their suffix;
        empty for a layer that the method leaves alone."""
        raise NotImplementedError

    def hf_shared(self) -> dict[str, HfLeaf]:
        """The tensors that an adapter file holds once for all layers, by their whole key, of whole leaves."""
        return {}

    def exported(self) -> "MethodAdapter":
        """The adapter whose leaves the file holds: itself, or the result of what only training needs."""
        return self

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        """The owner's parameters that give, without the adapter, what they give with it.

        Raises:
            ValueError: the method changes more than weights.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged: it does more than change weights")


class LayerMask(nnx.Module):
    """Puts trained values in the place of a base's own, in the layers of a stack that are `chosen`."""

    def __init__(self, chosen: tuple[bool, ...]) -> None:
        self.chosen = chosen  # one for each layer; one where there is no stack
        self.mask = nnx.data(None if all(chosen) else PeftConstant(jnp.array(chosen), axes=("layers",)))

    def __call__(self, trained: jax.Array, own: jax.Array) -> jax.Array:
        """`trained` in the chosen layers, `own` in the others: of one layer within the scan, or [L, ...] outside."""
        if self.mask is None:
            return trained
        mask = self.mask.get_value()
        return jnp.where(mask.reshape(mask.shape + (1,) * (own.ndim - mask.ndim)), trained, own)


class Override(MethodAdapter):
    """A trained copy of its owner's parameters, in their place: modules_to_save, and biases or norms that are trained.

    hf: {suffix in the adapter file: leaf}.
    """

    def __init__(
        self,
        values: Mapping[str, jax.Array],
        axes: Mapping[str, tuple],
        hf: Mapping[str, HfLeaf],
        chosen: tuple[bool, ...],
    ) -> None:
        self.leaves = tuple(values)
        self.hf = tuple(hf.items())
        self.layers = LayerMask(chosen)
        for leaf, value in values.items():
            setattr(self, leaf, PeftParam(value, axes=axes[leaf]))

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        own = {leaf: parameter(owner, leaf, parameters) for leaf in self.leaves}
        return compute(*inputs, **(parameters | self._replaced(own)))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return dict(self.hf) if self.layers.chosen[layer or 0] else {}

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        own = {leaf: parameters[leaf] for leaf in self.leaves}
        return {leaf: value.astype(own[leaf].dtype) for leaf, value in self._replaced(own).items()}

    def _replaced(self, own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {leaf: self.layers(getattr(self, leaf).get_value(), value) for leaf, value in own.items()}


class WeightAdapter(MethodAdapter):
    """An adapter defined by what it makes of its owner's kernel: y = x changed(W) + b.

    A subclass says `changed`, and computes in a cheaper way where there is one. `layers` are those it is in; in the
    others of the stack `changed` must give back W itself. names: the tensors of its file for one layer.
    """

    names: ClassVar[Mapping[str, HfLeaf]]
    kernel: ClassVar[str] = "kernel"  # the owner's parameter that it changes
    layers: LayerMask

    def changed(self, kernel: jax.Array) -> jax.Array:
        """The kernel of one layer, float32 [in, out], as the adapter changes it."""
        raise NotImplementedError

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        kernel = parameter(owner, self.kernel, parameters)
        return compute(*inputs, **(parameters | {self.kernel: self._rounded(kernel)}))

    def _rounded(self, kernel: jax.Array) -> jax.Array:
        return self.changed(kernel.astype(jnp.float32)).astype(kernel.dtype)

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        return {self.kernel: over_layers(self, lambda one, kernel: one._rounded(kernel), parameters[self.kernel])}

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return dict(self.names) if self.layers.chosen[layer or 0] else {}


class DeltaAdapter(WeightAdapter):
    """A weight adapter that adds: y = x W + dropout(x) delta + b."""

    dropout: Dropout

    def delta(self) -> jax.Array:
        """What is added to the kernel of one layer, float32 [in, out]; zero in a layer that it is not in."""
        raise NotImplementedError

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel + self.delta()

    def __call__(
        self, owner: nnx.Module, compute: Callable[..., jax.Array], *inputs: Any, **parameters: Any
    ) -> jax.Array:
        (x,) = inputs
        return compute(x, **parameters) + matmul(self.dropout(x), self.delta().astype(x.dtype))


def parameter(owner: Any, leaf: str, given: Mapping[str, jax.Array]) -> jax.Array:
    """The parameter that `owner` computes with: the one it is given for this call, else its own."""
    return given[leaf] if leaf in given else getattr(owner, leaf).get_value()


def over_layers(adapter: nnx.Module, compute: Callable[..., Any], *arrays: Any) -> Any:
    """`compute(adapter, *arrays)`, for a stacked adapter of each layer of it and of the arrays, [L, ...], in turn: so that
    what it needs in between is there for one layer only."""
    graph, leaves = variables.flat(adapter)
    values = {path: leaf.get_value() for path, leaf in leaves.items()}
    stacked = {path: value for path, value in values.items() if variables.is_stacked(leaves[path])}
    shared = {path: value for path, value in values.items() if path not in stacked}
    if not stacked:
        return compute(adapter, *arrays)
    return jax.lax.map(lambda one: compute(variables.join(graph, shared, one[0]), *one[1]), (stacked, arrays))
