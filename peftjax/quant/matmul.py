"""The one place that looks at what a kernel is made of."""

import jax

from peftjax.quant.base import Quantized, product


def matmul(x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
    """x @ kernel: [..., in] x [in, out] -> [..., out] in the dtype of x, accumulated in at least float32.

    The kernel is cast to the dtype of x first: float32 parameters under bfloat16 computation are master weights.
    A quantized kernel gets no gradient, and the backward pass keeps its codes and decodes them again.
    Leading axes are flattened: XLA's CPU backend takes the kernel's gradient, a product that contracts over all of
    them, at less than two thirds of the time that way (benchmarks/matmul.py). Not where a mesh splits the length: positions
    of several sequences in one axis have no place on it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = x if not mesh.empty and mesh.shape.get("sequence", 1) > 1 else x.reshape(-1, x.shape[-1])
    y = _frozen(rows, kernel) if isinstance(kernel, Quantized) else product("...i,io->...o", rows, kernel)
    return y.astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _frozen(x: jax.Array, kernel: Quantized) -> jax.Array:
    """[..., in] -> [..., out]. Left to itself, differentiation would keep the decoded kernel of every layer of a scan."""
    return kernel.dot(x)


def _forward(x: jax.Array, kernel: Quantized) -> tuple[jax.Array, Quantized]:
    return kernel.dot(x), kernel


def _backward(kernel: Quantized, gradient: jax.Array) -> tuple[jax.Array, None]:
    return kernel.dot_transposed(gradient), None


_frozen.defvjp(_forward, _backward)
