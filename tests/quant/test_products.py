"""The products of a linear layer: every form that a CPU uses, against NumPy, and the programs of other platforms."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import sharding
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


def operations(name: str, sizes: tuple[int, int, int], dtype: str, platform: str) -> list[str]:
    """The operations of a product's program before it is compiled, without the choice of the platform."""
    x, y = (jax.ShapeDtypeStruct(value.shape, dtype) for value in operands(name, *sizes))
    program = jax.jit(PRODUCTS[name][0]).trace(x, y).lower(lowering_platforms=(platform,)).as_text()
    return [name for name in re.findall(r"stablehlo\.(\w+)", program) if name not in ("case", "constant", "return")]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_accelerators_compute_the_plain_product(name: str, platform: str) -> None:
    for sizes in SIZES:
        for dtype in ("float32", "bfloat16"):
            assert operations(name, sizes, dtype, platform) == ["dot_general"]


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "special"),
    [
        ("dot", (1, 4100, 1030), "bfloat16", "pad"),
        ("dot", (64, 1280, 8), "bfloat16", "pad"),
        ("dot_transposed", (1, 4100, 1030), "bfloat16", "pad"),
        ("dot_transposed", (64, 1280, 1100), "bfloat16", "optimization_barrier"),
        ("kernel_gradient", (65, 8, 1280), "bfloat16", "optimization_barrier"),
        ("kernel_gradient", (48, 1280, 16), "bfloat16", "optimization_barrier"),
        ("kernel_gradient", (48, 1280, 16), "float32", "optimization_barrier"),
    ],
)
def test_one_cpu_computes_another_form_and_several_the_plain_product(
    name: str, sizes: tuple[int, int, int], dtype: str, special: str
) -> None:
    assert special in operations(name, sizes, dtype, "cpu")
    with jax.set_mesh(sharding.make_mesh({}, devices=jax.devices()[:1])):
        assert special in operations(name, sizes, dtype, "cpu")
    with jax.set_mesh(sharding.make_mesh({"fsdp": 2})):
        assert operations(name, sizes, dtype, "cpu") == ["dot_general"]
