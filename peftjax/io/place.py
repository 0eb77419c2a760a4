"""Read one parameter from its stored tensors onto its devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftjax import sharding
from peftjax.core.one_cpu import compiler_options
from peftjax.io import finite
from peftjax.io.bitsandbytes import Packed, Stored, Unpack
from peftjax.io.entries import Entry
from peftjax.io.formats import Encode
from peftjax.io.safetensors_files import FLOATS
from peftjax.quant.base import Quantized

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
T = TypeVar("T")
Order = tuple[int, ...] | None


def read_parameter(
    entry: Entry, tensors: Sequence[Stored], dtype: np.dtype, mesh: Mesh, encode: Encode | None
) -> jax.Array | Quantized:
    """Read a parameter from its tensors onto its devices, one layer at a time.

    `encode` quantizes each layer as soon as it is read, or unpacks one that is stored quantized.
    """
    order = None if isinstance(encode, Unpack) else entry.order
    one = _shapes(entry.stored_shape, order, dtype, encode)
    stack = entry.shape[: entry.stacked]
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*stack, *leaf.shape), leaf.dtype), one)
    placed = sharding.placement(whole, entry.axes, mesh)
    made = sharding.as_jit_returns(placed)
    spec = sharding.spec(entry.axes, entry.shape, mesh)
    # JAX transposes arrays from the host faster than XLA's CPU backend does; other devices are faster than the host.
    on_host = mesh.devices.flat[0].platform == "cpu"
    if on_host:
        part, first, order = NamedSharding(mesh, PartitionSpec(*spec.spec[entry.stacked :])), order, None
    else:
        part, first = entry.stored_sharding(spec), None
    checked = functools.partial(_checked, order=first, dtype=dtype, placed=part)

    def read(stored: _Host | Packed) -> Any:
        return stored.read(placed) if isinstance(stored, Packed) else _read(stored, part)

    if not entry.stacked:
        make_one = jax.jit(_made, static_argnums=(1, 2, 3), out_shardings=made)
        return make_one(read(checked(tensors[0])), order, dtype, encode)
    pack = on_host and mesh.size == 1
    stack = jax.tree.map(lambda leaf, where: _zeros(leaf.shape, _wide(leaf.dtype, pack), where)(), whole, made)
    options = compiler_options(mesh.devices.flat)
    put = jax.jit(_put, donate_argnums=0, static_argnums=(3, 4, 5), out_shardings=made, compiler_options=options)
    for layer, host in enumerate(_ahead(checked, tensors)):
        # Without waiting, all layers would be read before the first is written.
        stack = jax.block_until_ready(put(stack, read(host), layer, order, dtype, encode))
    return jax.tree.map(_packed, stack, whole, placed) if pack else stack


def _ahead(check: Callable[[Stored], T], tensors: Sequence[Stored]) -> Iterator[T]:
    """What `check` returns for each tensor. Another thread checks the next tensor while one is placed."""
    with ThreadPoolExecutor(1) as checker:
        coming = checker.submit(check, tensors[0])
        for tensor in tensors[1:]:
            ready, coming = coming.result(), checker.submit(check, tensor)
            yield ready
        yield coming.result()


def _wide(dtype: np.dtype, pack: bool) -> np.dtype:
    """The dtype of a stack while it is being read; int8 for int4 if it is to be packed afterwards."""
    return np.dtype(np.int8) if pack and dtype == jnp.int4 else dtype


def _packed(stack: jax.Array, whole: jax.ShapeDtypeStruct, placed: Any) -> jax.Array:
    """A stack with its final dtype. JAX packs an int4 array of the host about 25 times as fast as XLA's CPU backend does."""
    return stack if stack.dtype == whole.dtype else jax.device_put(np.asarray(stack).view(whole.dtype), placed)


@functools.lru_cache(maxsize=1024)
def _zeros(shape: tuple[int, ...], dtype: np.dtype, placed: Any) -> Callable[[], jax.Array]:
    """A compiled function that makes zeros on their devices, shared by all parameters of one shape."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=placed)


def _put(stack: Any, value: Any, layer: jax.Array, order: Order, dtype: np.dtype, encode: Encode | None) -> Any:
    return jax.tree.map(functools.partial(_put_layer, layer=layer), stack, _made(value, order, dtype, encode))


def _put_layer(stack: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
    """Write one layer into a stack, in place."""
    one = one.astype(stack.dtype)
    if stack.dtype == jnp.bfloat16:
        # XLA's CPU backend would convert the whole stack to float32 and back. It writes integers in place.
        bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
        return jax.lax.bitcast_convert_type(_put_layer(bits(stack), bits(one), layer), jnp.bfloat16)
    return jax.lax.dynamic_update_index_in_dim(stack, one, layer, axis=0)


def _made(value: Any, order: Order, dtype: np.dtype, encode: Encode | None) -> Any:
    """The parameter's layer from a stored tensor, or from the parts of a packed one."""
    if isinstance(encode, Unpack):
        return encode(value)
    value = ordered(value, order).astype(dtype)
    return jnp.copy(value) if encode is None else encode(value)  # what was read may alias the file's pages


@functools.lru_cache(maxsize=1024)
def _shapes(stored: tuple[int, ...], order: Order, dtype: np.dtype, encode: Encode | None) -> Any:
    """The shapes and dtypes of what `_made` returns for a tensor of the shape `stored`."""
    value = encode.inputs if isinstance(encode, Unpack) else jax.ShapeDtypeStruct(stored, dtype)
    return jax.eval_shape(functools.partial(_made, order=order, dtype=dtype, encode=encode), value)


def ordered(value: ArrayT, order: Order) -> ArrayT:
    """Transpose a stored array to the parameter's dimensions; `order` is as in `Entry`."""
    return value if order is None else value.transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class _Host:
    """A stored tensor on the host: the parts that this process's devices hold, transposed views by their index."""

    shape: tuple[int, ...]
    parts: Mapping[str, np.ndarray]


def _checked(tensor: Stored, order: Order, dtype: np.dtype, placed: NamedSharding) -> _Host | Packed:
    """Map a tensor into memory, convert it to `dtype` and check it, without transposing it.

    If `dtype` holds all values of the stored one, the device converts it, which is faster.
    """
    if isinstance(tensor, Packed):
        return tensor
    view = tensor.open()
    axes = tuple(range(len(tensor.shape))) if order is None else order  # of the parameter, in the order of the tensor
    shape = ordered(np.broadcast_to(np.empty((), bool), tensor.shape), order).shape
    if tensor.dtype in ("BF16", "F16") and dtype == np.float32:
        dtype = np.dtype(FLOATS[tensor.dtype])
    parts: dict[str, np.ndarray] = {}
    for index in placed.addressable_devices_indices_map(shape).values():
        if index is not None and str(index) not in parts:
            stored = view[tuple(index[axis] for axis in axes)]
            parts[str(index)] = ordered(finite.converted(stored, dtype, tensor.name, tensor.file), order)
    return _Host(shape, parts)


def _read(host: _Host, placed: NamedSharding) -> jax.Array:
    """Move a tensor to the devices."""
    read = jax.make_array_from_callback(host.shape, placed, lambda index: host.parts[str(index)])
    return jax.block_until_ready(read)  # so that the host's copy is freed first
