"""The matrix product of activations and a kernel, quantized or not."""

import jax

from peftjax.quant.base import Quantized, product


def matmul(x: jax.Array, kernel: jax.Array | Quantized) -> jax.Array:
    """x @ kernel: [..., in] x [in, out] -> [..., out] in the dtype of x, accumulated in at least float32.

    The kernel is cast to the dtype of x first: float32 parameters under bfloat16 computation are master weights. A
    quantized kernel gets no gradient; its codes are kept for the backward pass and decoded again.

    Leading axes are flattened, because XLA's CPU backend then computes the kernel's gradient, which contracts over all of
    them, in less than two thirds of the time (benchmarks/matmul.py). They are not if a mesh shards the length, since an axis
    that combines positions of several sequences cannot be sharded by it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = x if not mesh.empty and mesh.shape.get("sequence", 1) > 1 else x.reshape(-1, x.shape[-1])
    y = _frozen(rows, kernel) if isinstance(kernel, Quantized) else product("...i,io->...o", rows, kernel)
    return y.astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _frozen(x: jax.Array, kernel: Quantized) -> jax.Array:
    """[..., in] -> [..., out]. Automatic differentiation would keep the decoded kernel of every layer of a scan."""
    return kernel.dot(x)


def _forward(x: jax.Array, kernel: Quantized) -> tuple[jax.Array, Quantized]:
    return kernel.dot(x), kernel


def _backward(kernel: Quantized, gradient: jax.Array) -> tuple[jax.Array, None]:
    return kernel.dot_transposed(gradient), None


_frozen.defvjp(_forward, _backward)
