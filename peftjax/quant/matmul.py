"""The matrix product of activations and a kernel, quantized or not, and its gradients.

Automatic differentiation of a product that accumulates in float32 would multiply a float32 gradient by the kernel. For a
bfloat16 kernel, this requires a float32 copy, and XLA copies the kernels of all layers before the loop over layers begins.
A quantized kernel would be decoded in the forward pass and kept. The backward pass is therefore written out here: it
multiplies in the dtype of the activations, and its residuals are the arguments themselves, which a scan over layers does
not copy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from peftjax.quant.base import Quantized
from peftjax.quant.products import dot, dot_transposed, kernel_gradient

Kernel = jax.Array | Quantized
Gather = Callable[[Any], Any]  # brings a kernel to the devices that use it, as `sharding.gathered` does


def matmul(
    x: jax.Array, kernel: Kernel, gather: Gather = lambda kernel: kernel, *, transposed: bool = False
) -> jax.Array:
    """x @ kernel: [..., in] x [in, out] -> [..., out] in the dtype of x, accumulated in at least float32.

    The kernel is cast to the dtype of x first: float32 parameters under bfloat16 computation are master weights. A
    quantized kernel gets no gradient. It is decoded in both passes.

    Args:
        x: Activations.
        kernel: An array or a quantized kernel.
        gather: Applied to the kernel in both passes, so that its result is not kept in between.
        transposed: Whether the kernel, which is then not quantized, is [out, in].
    """
    return _matmul(gather, transposed, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(gather: Gather, transposed: bool, x: jax.Array, kernel: Kernel) -> jax.Array:
    kernel, rows = gather(kernel), _rows(x)
    times = dot_transposed if transposed else dot
    y = kernel.dot(rows) if isinstance(kernel, Quantized) else times(rows, kernel)
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _forward(
    gather: Gather, transposed: bool, x: CustomVJPPrimal, kernel: Any
) -> tuple[jax.Array, tuple[jax.Array | None, Kernel]]:
    values = primal_values(kernel)
    return _matmul(gather, transposed, x.value, values), (x.value if needs_gradient(kernel) else None, values)


def primal_values(arguments: Any) -> Any:
    """The values of what a forward pass gets from `custom_vjp` with symbolic zeros."""
    return jax.tree.map(lambda leaf: leaf.value, arguments, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))


def needs_gradient(kernel: Any) -> bool:
    """Whether a kernel that a forward pass gets from `custom_vjp` with symbolic zeros is differentiated.

    A quantized kernel, which has several arrays, never is.
    """
    return isinstance(kernel, CustomVJPPrimal) and bool(kernel.perturbed)


def _backward(
    gather: Gather, transposed: bool, residuals: tuple[jax.Array | None, Kernel], gradient: jax.Array | SymbolicZero
) -> tuple[jax.Array | None, Kernel | None]:
    x, kernel = residuals
    if isinstance(gradient, SymbolicZero):
        return None, None
    gathered, rows = gather(kernel), _rows(gradient)
    times = dot if transposed else dot_transposed
    of_x = gathered.dot_transposed(rows) if isinstance(gathered, Quantized) else times(rows, gathered)
    of_x = of_x.astype(gradient.dtype).reshape(*gradient.shape[:-1], of_x.shape[-1])
    if x is None:
        return of_x, None
    inputs, outputs = (rows, _rows(x)) if transposed else (_rows(x), rows)
    return of_x, kernel_gradient(inputs, outputs).astype(kernel.dtype)


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _rows(x: jax.Array) -> jax.Array:
    """x with its leading axes flattened, [rows, features].

    XLA's CPU backend then computes the kernel's gradient, which contracts over all of them, in less than two thirds of the
    time (benchmarks/matmul.py). They are not flattened if a mesh shards the length, since an axis that combines positions of
    several sequences cannot be sharded by it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if not mesh.empty and mesh.shape.get("sequence", 1) > 1 else x.reshape(-1, x.shape[-1])
