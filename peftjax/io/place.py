"""Read one parameter from its stored tensors onto its devices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from peftjax import sharding
from peftjax.io import finite
from peftjax.io.bitsandbytes import Packed, Unpack
from peftjax.io.entries import Entry
from peftjax.io.formats import Encode
from peftjax.io.hf_files import StoredTensor
from peftjax.io.match import Stored
from peftjax.quant.base import Quantized

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)


def read_parameter(
    entry: Entry, tensors: Sequence[Stored], dtype: np.dtype, mesh: Mesh, encode: Encode | None
) -> jax.Array | Quantized:
    """Read a parameter onto its devices, one layer at a time.

    Args:
        entry: The parameter.
        tensors: Its stored tensors, one per layer.
        dtype: Dtype of the parameter.
        mesh: Devices.
        encode: Quantizes each layer as soon as it is read, or unpacks one that is stored quantized.
    """
    stored: Any = jax.ShapeDtypeStruct(entry.stored_shape, dtype)
    order = entry.order
    if isinstance(encode, Unpack):
        stored, order = encode.inputs, None
    one = jax.eval_shape(functools.partial(_made, order=order, encode=encode), stored)
    if turned := encode is not None and order == (1, 0):
        order = None  # already transposed when read
    stack = entry.shape[: entry.stacked]
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*stack, *leaf.shape), leaf.dtype), one)
    placed = sharding.placement(whole, entry.axes, mesh)
    made = sharding.as_jit_returns(placed)
    part = entry.stored_sharding(sharding.spec(entry.axes, entry.shape, mesh))

    def read(tensor: Stored) -> Any:
        if isinstance(tensor, Packed):
            return tensor.read(placed)
        value = _read(tensor, dtype, part)
        # In a separate program: within the encoder's, XLA:CPU reads across rows, which takes three times as long.
        return _turned(value) if turned else value

    if not entry.stacked:
        return jax.jit(_made, static_argnums=(1, 2), out_shardings=made)(read(tensors[0]), order, encode)
    stack = jax.tree.map(lambda leaf, where: _zeros(leaf.shape, leaf.dtype, where)(), whole, made)
    options = sharding.compiler_options(mesh)
    put = jax.jit(_put, donate_argnums=0, static_argnums=(3, 4), out_shardings=made, compiler_options=options)
    for layer, tensor in enumerate(tensors):
        # Without waiting, all layers would be read before the first is written.
        stack = jax.block_until_ready(put(stack, read(tensor), layer, order, encode))
    return stack


@functools.lru_cache(maxsize=1024)
def _zeros(shape: tuple[int, ...], dtype: np.dtype, placed: Any) -> Callable[[], jax.Array]:
    """A compiled function that makes zeros on their devices, shared by all parameters of one shape."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=placed)


def _put(stack: Any, value: Any, layer: jax.Array, order: tuple[int, ...] | None, encode: Encode | None) -> Any:
    one = _made(value, order, encode)
    return jax.tree.map(lambda all_, own: jax.lax.dynamic_update_index_in_dim(all_, own, layer, axis=0), stack, one)


_turned = jax.jit(jnp.transpose)


def _made(value: Any, order: tuple[int, ...] | None, encode: Encode | None) -> Any:
    """The parameter's layer from a stored tensor, or from the parts of a packed one."""
    value = ordered(value, order)
    return jnp.copy(value) if encode is None else encode(value)  # what was read may alias the file's pages


def ordered(value: ArrayT, order: tuple[int, ...] | None) -> ArrayT:
    """Transpose a stored array to the parameter's dimensions; `order` is that of `Entry`."""
    return value if order is None else value.transpose(np.argsort(order))


def _read(tensor: StoredTensor, dtype: np.dtype, placed: NamedSharding) -> jax.Array:
    """Read a tensor onto the devices; each device's slice is read, converted and checked separately."""
    view = tensor.open()
    read = jax.make_array_from_callback(
        tensor.shape, placed, lambda index: finite.converted(view[index], dtype, tensor.name, tensor.file)
    )
    return jax.block_until_ready(read)  # so that the host's copy is freed first
