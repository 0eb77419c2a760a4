"""What sits in a layer's slot: adapters that can be counted, written to a file and merged."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.nn.dropout import Dropout
from peftjax.nn.slot import Adapter, Base
from peftjax.quant.matmul import matmul


@dataclasses.dataclass(frozen=True)
class HfLeaf:
    """How one tensor of an adapter file is stored: `leaf[layer][window]`, transposed by `axes`, reshaped to `shape`."""

    leaf: str
    window: tuple[slice, ...] = ()
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def part(self, shape: tuple[int, ...]) -> tuple[range, ...]:
        """The indices of the window along each axis. `shape` is the shape of one layer's array of the leaf."""
        windows = itertools.chain(self.window, itertools.repeat(slice(None)))
        return tuple(range(size)[window] for window, size in zip(windows, shape, strict=False))

    def write(self, array: Any) -> Any:
        """The file's tensor, from one layer's array of the leaf."""
        part = array[*self.window, ...]
        part = part if self.axes is None else part.transpose(self.axes)
        return part if self.shape is None else part.reshape(self.shape)

    def read(self, tensor: np.ndarray, into: Any) -> None:
        """Copy the file's tensor into one layer's array of the leaf.

        Raises:
            UserError: The tensor has another shape.
        """
        window = into[*self.window, ...]  # a view, also of a single number
        expected = self.write(into).shape
        if tensor.shape != expected:
            raise UserError(f"has shape {tensor.shape}, but this model needs {expected}")
        axes = tuple(range(window.ndim)) if self.axes is None else self.axes
        turned = tensor.reshape([window.shape[axis] for axis in axes])
        window[...] = turned.transpose([axes.index(axis) for axis in range(window.ndim)]).astype(window.dtype)


def transposed(leaf: str) -> HfLeaf:
    """A matrix that the file stores transposed, as torch does."""
    return HfLeaf(leaf, axes=(1, 0))


class MethodAdapter(Adapter):
    """An adapter that can be counted, written to a Hugging Face file and, for weight methods, merged.

    Attributes:
        zero_is_identity: Whether the adapter has no effect when all of its arrays are zero, including its `LayerMask`.
            The members of a population may then have it in different layers.
        wraps_experts: Whether peft holds it in a wrapper around the module of all experts, one for each parameter.
    """

    zero_is_identity: ClassVar[bool] = False
    wraps_experts: ClassVar[bool] = False

    def forget_layers(self) -> None:
        """Forget which layers have the adapter, and its ranks. Only the adapter file and the initial values depend on them."""
        for _, module in nnx.iter_modules(self):
            if isinstance(module, LayerMask):
                module.forget()

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        """The tensors that an adapter file holds for one layer (None: the module is not stacked), by key suffix; empty
        for a layer without the adapter."""
        del layer
        return {}

    def hf_shared(self) -> dict[str, HfLeaf]:
        """The tensors that an adapter file holds once for all layers, by full key; each is a whole leaf."""
        return {}

    def hold_bias(self, bias: PeftParam, layers: "LayerMask") -> bool:
        """Use a trained bias [*stack, out] in place of the layer's own, if the adapter can; returns whether it does."""
        del bias, layers
        return False

    def taken_from_kernel(self) -> jax.Array | None:
        """What the adapter subtracts from the kernel of its layer, float32 [*stack, in, out]; None: nothing."""
        return None

    def exported(self) -> "MethodAdapter":
        """The adapter that the file describes: this one, or a simpler one that computes the same."""
        return self

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        """The parameters with which the layer alone computes what it computes with `parameters` and the adapter.

        Raises:
            UserError: The method changes more than weights.
        """
        raise UserError(f"{type(self).__name__} cannot be merged: it does more than change weights")


class LayerMask(nnx.Module):
    """The layers of a stack that an adapter is in: one bool per layer, or a single one for an unstacked module.

    Attributes:
        mask: The same in a variable; None if all layers have the adapter and `vary` was not called.
    """

    axes: ClassVar[tuple[str, ...]] = ("layers",)

    def __init__(self, chosen: Iterable[bool]) -> None:
        self.chosen = tuple(bool(layer) for layer in chosen)
        masked = not all(self.chosen)
        self.mask = nnx.data(PeftConstant(jnp.array(self.chosen), axes=self.axes) if masked else None)

    @property
    def array(self) -> np.ndarray:
        """The layers as an array."""
        return np.array(self.chosen)

    @property
    def count(self) -> int | jax.Array:
        """The number of layers with the adapter."""
        return len(self.chosen) if self.mask is None else self.mask.get_value().sum()

    def vary(self) -> None:
        """Hold the layers in a variable, so that one program can run adapters in different layers."""
        array, axes = self.array, self.axes
        if len(array) == 1:  # a stack of one layer or an unstacked module, which then have the same structure
            array, axes = array[0], axes[1:]
        self.mask = nnx.data(PeftConstant(jnp.array(array), axes=axes))

    def forget(self) -> None:
        """Forget the layers, except in the variable."""
        self.chosen = (True,) * len(self.chosen)

    def __contains__(self, layer: int | None) -> bool:
        return self.chosen[layer or 0]

    def __call__(self, inside: jax.Array, outside: jax.Array) -> jax.Array:
        """`inside` in the layers with the adapter, `outside` in the others: of one layer under scan, or [L, ...]."""
        if self.mask is None:
            return inside
        mask = self.mask.get_value()
        return jnp.where(mask.reshape(mask.shape + (1,) * (outside.ndim - mask.ndim)), inside, outside)

    def or_zero(self, value: jax.Array) -> jax.Array:
        """`value`, or zeros in a layer without the adapter."""
        return self(value, jnp.zeros_like(value))

    def or_one(self, value: jax.Array) -> jax.Array:
        """`value`, or ones in a layer without the adapter."""
        return self(value, jnp.ones_like(value))


class Override(MethodAdapter):
    """Trained copies of a layer's parameters, used in their place: modules_to_save, and trained biases and norms.

    Attributes:
        hf: Pairs of a suffix in the adapter file and the leaf it holds.
    """

    zero_is_identity: ClassVar = True

    def __init__(
        self, parameters: Mapping[str, nnx.Variable], hf: Mapping[str, HfLeaf], chosen: Iterable[bool]
    ) -> None:
        self.leaves = tuple(parameters)
        self.hf = tuple(hf.items())
        self.layers = LayerMask(chosen)
        for leaf, own in parameters.items():
            copy = jnp.array(own.get_value().astype(jnp.float32))
            setattr(self, leaf, PeftParam(copy, axes=own.axes))

    def apply(self, base: Base, *inputs: Any) -> jax.Array:
        return base(*inputs, **self._replaced({leaf: base.parameter(leaf) for leaf in self.leaves}))

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return dict(self.hf) if layer in self.layers else {}

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        own = {leaf: parameters[leaf] for leaf in self.leaves}
        return {leaf: value.astype(own[leaf].dtype) for leaf, value in self._replaced(own).items()}

    def _replaced(self, own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {leaf: self.layers(getattr(self, leaf).get_value(), value) for leaf, value in own.items()}


class WeightAdapter(MethodAdapter):
    """An adapter that maps the layer's kernel to another one: y = x changed(W) + b.

    A subclass implements `changed`, and overrides `apply` where there is a cheaper way to compute the same.

    Attributes:
        names: The tensors of the adapter file for one layer, by key suffix.
        kernel: The layer's parameter that is changed.
        layers: The layers with the adapter. In the others `changed` must return W itself.
    """

    names: ClassVar[Mapping[str, HfLeaf]]
    kernel: ClassVar[str] = "kernel"
    layers: LayerMask

    def changed(self, kernel: jax.Array) -> jax.Array:
        """The changed kernel of one layer, from its kernel; both float32 [in, out]."""
        raise NotImplementedError

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return base(x, **{self.kernel: self._rounded(base.parameter(self.kernel))})

    def merged(self, **parameters: jax.Array) -> dict[str, jax.Array]:
        return {self.kernel: over_layers(self, lambda one, kernel: one._rounded(kernel), parameters[self.kernel])}

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return dict(self.names) if layer in self.layers else {}

    def _rounded(self, kernel: jax.Array) -> jax.Array:
        return self.changed(kernel.astype(jnp.float32)).astype(kernel.dtype)


class DeltaAdapter(WeightAdapter):
    """A weight adapter that adds to the kernel: y = x W + dropout(x) delta + b.

    A subclass implements `delta`, and `update` where there is a cheaper way to compute x delta.
    """

    dropout: Dropout

    def delta(self) -> jax.Array:
        """The update of one layer's kernel, float32 [in, out]; zero in a layer without the adapter."""
        raise NotImplementedError

    def update(self, x: jax.Array) -> jax.Array:
        """dropout(x) delta: [..., in] -> [..., out]."""
        return matmul(self.dropout(x), self.delta().astype(x.dtype))

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        update = self.update(x)  # the order of the two products is that in which the gradients of x are summed
        return base(x) + update

    def changed(self, kernel: jax.Array) -> jax.Array:
        return kernel + self.delta()


class FactoredAdapter(DeltaAdapter):
    """A delta adapter that adds a product of two matrices: y = x W + (dropout(x) U) V + b. A subclass has `factors`."""

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """U [in, R] and V [R, out] of one layer, float32; their product is zero in a layer without the adapter."""
        raise NotImplementedError

    def delta(self) -> jax.Array:
        first, second = self.factors()
        return first @ second

    def update(self, x: jax.Array) -> jax.Array:
        first, second = self.factors()
        return matmul(matmul(self.dropout(x), first), second)

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return base(x) + self.update(x)


def over_layers(adapter: nnx.Module, compute: Callable[..., Any], *arrays: Any) -> Any:
    """`compute(adapter, *arrays)`; for a stacked adapter, one layer of it and of `arrays` [L, ...] at a time.

    The intermediate results of only one layer are in memory at once.
    """
    graph, leaves = variables.flat(adapter)
    values = {path: leaf.get_value() for path, leaf in leaves.items()}
    stacked = {path: value for path, value in values.items() if variables.is_stacked(leaves[path])}
    shared = {path: value for path, value in values.items() if path not in stacked}
    if not stacked:
        return compute(adapter, *arrays)
    return jax.lax.map(lambda one: compute(variables.join(graph, shared, one[0]), *one[1]), (stacked, arrays))
