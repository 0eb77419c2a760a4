"""The products of a linear layer, in every form that a CPU uses, against NumPy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.quant.products import dot, dot_transposed, kernel_gradient

PRODUCTS: dict[str, tuple[Callable, str]] = {
    "dot": (dot, "ri,io->ro"),
    "dot_transposed": (dot_transposed, "ro,io->ri"),
    "kernel_gradient": (kernel_gradient, "ri,ro->io"),
}
SIZES = [
    (1, 1280, 8),
    (1, 4100, 1030),
    (64, 1280, 8),
    (61, 8, 1280),
    (64, 1280, 1100),
    (65, 8, 1280),
    (48, 1280, 16),
    (130, 40, 24),
]


def operands(name: str, rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Small integers, whose products are exact in every dtype."""
    rng = np.random.default_rng(0)
    sizes = {"r": rows, "i": inputs, "o": outputs}
    first, second = PRODUCTS[name][1].split("->")[0].split(",")
    x, y = (rng.integers(-2, 3, [sizes[axis] for axis in axes]).astype(np.float32) for axes in (first, second))
    return x, y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_equal_to_numpy(name: str, sizes: tuple[int, int, int], dtype: str) -> None:
    function, subscripts = PRODUCTS[name]
    x, y = operands(name, *sizes)
    result = jax.jit(function)(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, np.einsum(subscripts, x, y))


@pytest.mark.parametrize("name", ["dot_transposed", "kernel_gradient"])
def test_transposed_result(name: str) -> None:
    """XLA's CPU backend fails if it merges a transposition with a product in bfloat16."""
    function, subscripts = PRODUCTS[name]
    x, y = operands(name, 64, 1280, 1100)
    result = jax.jit(lambda x, y: function(x, y).T)(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16))
    np.testing.assert_array_equal(result, np.einsum(subscripts, x, y).T)


@pytest.mark.parametrize("name", PRODUCTS)
def test_batched_rows(name: str) -> None:
    """Under vmap, as in a sweep: rows of several runs, and one frozen kernel."""
    function, subscripts = PRODUCTS[name]
    x, y = operands(name, 64, 1280, 24)
    many = jnp.stack([jnp.asarray(x, jnp.bfloat16), jnp.asarray(-x, jnp.bfloat16)])
    expected = np.einsum(subscripts, x, y)
    results = jax.jit(jax.vmap(function, in_axes=(0, None)))(many, jnp.asarray(y, jnp.bfloat16))
    np.testing.assert_array_equal(results, np.stack([expected, -expected]))


def test_leading_axes() -> None:
    """Activations whose length a mesh shards keep their axes."""
    x, kernel = operands("dot", 6, 16, 8)
    np.testing.assert_array_equal(dot(x.reshape(2, 3, 16), kernel), (x @ kernel).reshape(2, 3, 8))
    np.testing.assert_array_equal(kernel_gradient(x.reshape(2, 3, 16), x.reshape(2, 3, 16)), x.T @ x)
