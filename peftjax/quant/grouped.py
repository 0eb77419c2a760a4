"""Products of blocks of rows, each with one kernel of a stack: the matrix product of a mixture of experts.

On a TPU, kernels that are not quantized use `jax.lax.ragged_dot`. Elsewhere XLA may expand it to a product of all rows with
all kernels, so blocks are multiplied one after another instead. Blocks with quantized kernels are multiplied this way on every
platform, so that only one kernel is decoded at a time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero

from peftjax.quant.base import Quantized
from peftjax.quant.matmul import Kernel, needs_gradient, primal_values
from peftjax.quant.products import dot, dot_transposed, kernel_gradient

IN_USE = "block_in_use"  # the scope of the conditions that skip unused blocks, by which a plan finds them in a program


def grouped_matmul(x: jax.Array, kernel: Kernel, owner: jax.Array, used: jax.Array) -> jax.Array:
    """y[i] = x[i] @ kernel[owner[i]], in the dtype of x, accumulated in at least float32.

    A quantized kernel gets no gradient. The input is kept for the backward pass only if the kernel needs a gradient.

    Args:
        x: [n, rows, in]; zero in the blocks that are not used.
        kernel: [E, in, out].
        owner: int [n], not decreasing.
        used: int [], the number of blocks in use, which come first. The results of the others are zero.

    Returns:
        [n, rows, out].
    """
    return _product(False, x, kernel, owner, used)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(transposed: bool, x: jax.Array, kernel: Kernel, owner: jax.Array, used: jax.Array) -> jax.Array:
    """x[i] @ kernel[owner[i]], or with its transpose."""
    blocks = partial(_one_by_one, transposed=transposed)
    if isinstance(kernel, Quantized):
        return blocks(x, kernel, owner, used)
    ragged = _ragged_transposed if transposed else _ragged
    return jax.lax.platform_dependent(x, kernel, owner, used, tpu=ragged, default=blocks)


def _forward(transposed: bool, x: Any, kernel: Any, owner: Any, used: Any) -> tuple[jax.Array, tuple]:
    values = primal_values((x, kernel, owner, used))
    return _product(transposed, *values), (values[0] if needs_gradient(kernel) else None, *values[1:])


def _backward(transposed: bool, kept: tuple, gradient: jax.Array | SymbolicZero) -> tuple:
    x, kernel, owner, used = kept
    if isinstance(gradient, SymbolicZero):
        return None, None, None, None
    of_x = _product(not transposed, gradient, kernel, owner, used)
    if x is None:
        return of_x, None, None, None
    inputs, outputs = (gradient, x) if transposed else (x, gradient)
    return of_x, _kernel_gradient(outputs, inputs, kernel, owner, used), None, None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def _kernel_gradient(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, owner: jax.Array, used: jax.Array
) -> jax.Array:
    """The gradient of the kernels. It has its own gradient, for second derivatives."""
    return jax.lax.platform_dependent(gradient, x, kernel, owner, used, tpu=_ragged_of_kernel, default=_of_kernel)


def _kernel_gradient_backward(kept: tuple, change: jax.Array) -> tuple:
    gradient, x, _, owner, used = kept
    of_gradient, of_x = _product(False, x, change, owner, used), _product(True, gradient, change, owner, used)
    return of_gradient, of_x, None, None, None


_kernel_gradient.defvjp(lambda *arguments: (_kernel_gradient(*arguments), arguments), _kernel_gradient_backward)


# --- One block after another ---


def _one_by_one(
    x: jax.Array, kernel: Kernel, owner: jax.Array, used: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """x[i] @ kernel[owner[i]], or with its transpose."""
    width = kernel.shape[-2 if transposed else -1]

    def multiply(rows: jax.Array, one: Kernel) -> jax.Array:
        if isinstance(one, Quantized):
            return one.dot_transposed(rows) if transposed else one.dot(rows)
        return (dot_transposed if transposed else dot)(rows, one).astype(rows.dtype)

    def step(_: None, block: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        rows, expert, in_use = block
        empty = lambda rows: jnp.zeros((len(rows), width), rows.dtype)  # noqa: E731
        with jax.named_scope(IN_USE):
            return None, jax.lax.cond(in_use, lambda rows: multiply(rows, _at(kernel, expert)), empty, rows)

    return jax.lax.scan(step, None, (x, owner, jnp.arange(len(owner)) < used))[1]


def _at(kernel: Kernel, expert: jax.Array) -> Kernel:
    """One kernel of the stack."""
    one: Kernel = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), kernel)
    return one


def _of_kernel(gradient: jax.Array, x: jax.Array, kernel: jax.Array, owner: jax.Array, used: jax.Array) -> jax.Array:
    """The gradient of the kernels: the sum of x[i]^T gradient[i] over the blocks of each."""

    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def step(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows, change, expert, in_use = block
        of_block = lambda: kernel_gradient(rows, change)  # noqa: E731
        empty = lambda: jnp.zeros(total.shape[1:], dtype)  # noqa: E731
        with jax.named_scope(IN_USE):
            added = jax.lax.cond(in_use, of_block, empty)
        return total.at[expert].add(added), None  # in place; XLA would copy all of `total` if the condition returned it

    zeros = jnp.zeros(kernel.shape, dtype)
    blocks = (x, gradient, owner, jnp.arange(len(owner)) < used)
    return jax.lax.scan(step, zeros, blocks)[0].astype(kernel.dtype)


# --- jax.lax.ragged_dot, which supports vmap over some axes only ---


def _ragged_dot(x: jax.Array, kernel: jax.Array, owner: jax.Array, used: jax.Array) -> jax.Array:
    del used  # unused blocks are zero
    rows = x.shape[1]
    sizes = jnp.zeros(len(kernel), jnp.int32).at[owner].add(rows)
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.ragged_dot(
        x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), sizes, preferred_element_type=accumulator
    )
    return y.astype(x.dtype).reshape(*x.shape[:2], -1)


_ragged = sequential_vmap(_ragged_dot)


@sequential_vmap  # type: ignore[untyped-decorator]
def _ragged_transposed(gradient: jax.Array, kernel: jax.Array, owner: jax.Array, used: jax.Array) -> jax.Array:
    return _ragged_dot(gradient, kernel.swapaxes(1, 2), owner, used)


@sequential_vmap  # type: ignore[untyped-decorator]
def _ragged_of_kernel(
    gradient: jax.Array, x: jax.Array, kernel: jax.Array, owner: jax.Array, used: jax.Array
) -> jax.Array:
    _, pull = jax.vjp(lambda kernel: _ragged_dot(x, kernel, owner, used), kernel)
    of_kernel: jax.Array = pull(gradient)[0]
    return of_kernel
