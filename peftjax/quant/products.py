"""The three matrix products of a linear layer: x W, y W^T, and x^T y, the gradient of W.

XLA's CPU backend takes up to twice as long for some products as for others that give the same result (benchmarks/matmul.py),
most of them in bfloat16. On one CPU, these products are computed in the faster form. Other platforms, and meshes of several
devices, get all products as they are written here.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Product = Callable[[jax.Array, jax.Array], jax.Array]


def product(subscripts: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """An einsum in the dtype of x, accumulated and returned in at least float32."""
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, kernel.astype(x.dtype), preferred_element_type=accumulator)


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x W: [..., in] x [in, out] -> [..., out], accumulated and returned in at least float32."""
    plain = partial(product, "...i,io->...o")
    if _single_row(x, kernel):
        return _on_one_cpu(_padded(plain, 2), plain, x, kernel)
    if _bfloat16_rows(x) and 61 <= len(x) <= 64 and x.shape[-1] > 1024:  # 65 rows take 0.6 of the time of 64
        return _on_one_cpu(_padded(plain, 65), plain, x, kernel)
    return plain(x, kernel)


def dot_transposed(y: jax.Array, kernel: jax.Array) -> jax.Array:
    """y W^T: [..., out] x [in, out] -> [..., in], accumulated and returned in at least float32."""
    plain = partial(product, "...o,io->...i")
    if _single_row(y, kernel):
        return _on_one_cpu(_padded(plain, 2), plain, y, kernel)
    if not (_bfloat16_rows(y) and len(y) <= 64 and y.shape[-1] > 1024):
        return plain(y, kernel)
    # As the first operand, the kernel is not rearranged, which takes longer than the product with a few rows.
    kernel_first = lambda y, kernel: _kept(product("io,ro->ir", kernel.astype(y.dtype), y)).T  # noqa: E731
    return _on_one_cpu(kernel_first, plain, y, kernel)


def kernel_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x^T y: [..., in] x [..., out] -> [in, out], accumulated and returned in at least float32."""
    plain = partial(product, "...i,...o->io")
    over_rows = _of_copy if _bfloat16_rows(x) else plain
    if y.shape[-1] <= min(x.shape[-1] // 8, 512):  # for LoRA's rank, y^T x takes less than half of the time
        return _on_one_cpu(lambda x, y: _kept(over_rows(y, x)).T, plain, x, y)
    return plain(x, y) if over_rows is plain else _on_one_cpu(over_rows, plain, x, y)


def _of_copy(x: jax.Array, y: jax.Array) -> jax.Array:
    """x^T y. With a transposed view, XLA multiplies in float32. The axis that is added and removed makes it a copy."""
    return _kept(product("ir,ro->io", _kept(x.T[None])[0], y))


def _single_row(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether a large kernel is multiplied by a single row, for which XLA's CPU backend converts it to float32."""
    return _bfloat16_rows(x) and len(x) == 1 and kernel.size > 2**22


def _padded(times: Product, rows: int) -> Product:
    """The product, computed with zeros as additional rows of x."""
    return lambda x, kernel: times(jnp.pad(x, ((0, rows - len(x)), (0, 0))), kernel)[: len(x)]


def _bfloat16_rows(x: jax.Array) -> bool:
    return x.ndim == 2 and x.dtype == jnp.bfloat16


def _kept(x: jax.Array) -> jax.Array:
    """x as it is: the compiler may not merge a transposition before it with operations after it, or the reverse."""
    return jax.lax.optimization_barrier(x)


def _on_one_cpu(form: Product, plain: Product, x: jax.Array, y: jax.Array) -> jax.Array:
    """form(x, y) on one CPU, otherwise plain(x, y)."""
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        return plain(x, y)
    result: jax.Array = jax.lax.platform_dependent(x, y, cpu=form, default=plain)
    return result
