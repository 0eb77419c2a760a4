"""int8 with one scale for each output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import quant as formats
from peftjax import sharding
from peftjax.quant import int8
from peftjax.quant.matmul import matmul

quantize = jax.jit(int8.quantize)
decode = jax.jit(lambda kernel: kernel.astype(jnp.float32))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_every_weight_is_rounded_to_the_nearest_of_255_parts_of_its_columns_largest() -> None:
    weights = random(37, 24)
    weights[:, 3], weights[5, 7] = 0, 1e4
    kernel = quantize(weights)
    assert (kernel.shape, kernel.ndim, kernel.dtype) == ((37, 24), 2, np.float32)
    assert kernel.codes.dtype == jnp.int8
    scale = np.abs(weights).max(0) / np.float32(127)
    np.testing.assert_allclose(kernel.scale, scale, rtol=1e-6)
    decoded = np.asarray(decode(kernel))
    assert (np.abs(decoded - weights) <= 0.501 * scale[None]).all()
    assert not decoded[:, 3].any()
    np.testing.assert_allclose(decoded[5, 7], 1e4)
    assert np.abs(np.asarray(kernel.codes)).max(0).tolist() == [0 if column == 3 else 127 for column in range(24)]


def test_what_was_decoded_is_encoded_to_the_same_codes_and_a_stack_is_its_layers_one_by_one() -> None:
    weights = jnp.asarray(random(3, 40, 24), jnp.bfloat16)
    kernel = jax.jit(jax.vmap(int8.quantize))(weights)
    assert kernel.shape == (3, 40, 24)
    for layer in range(3):
        np.testing.assert_array_equal(kernel.codes[layer], quantize(weights[layer]).codes)
        np.testing.assert_array_equal(decode(kernel)[layer], decode(quantize(weights[layer])))
    again = jax.jit(lambda kernel: formats.quantize(kernel.codes * kernel.scale[:, None, :], kernel.format))(kernel)
    np.testing.assert_array_equal(again.codes, kernel.codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_and_its_gradient_are_those_of_the_decoded_kernel_which_gets_none(dtype: str) -> None:
    kernel = quantize(random(72, 48))
    x, cotangent = jnp.asarray(random(2, 3, 72), dtype), jnp.asarray(random(2, 3, 48, seed=1), dtype)
    y, back = jax.vjp(matmul, x, kernel)
    to_x, to_kernel = back(cotangent)
    assert y.dtype == to_x.dtype == dtype
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    as_float32 = lambda array: np.asarray(array, np.float32)  # noqa: E731
    for one, other in (
        (y, as_float32(x) @ np.asarray(decode(kernel))),
        (to_x, as_float32(cotangent) @ np.asarray(decode(kernel)).T),
    ):
        np.testing.assert_allclose(as_float32(one), other, atol=2 * tolerance * np.abs(other).max(), rtol=0)
    for leaf in jax.tree.leaves(to_kernel):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


def test_on_four_devices_codes_and_scales_are_split_and_products_are_those_of_one() -> None:
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    kernel, x = quantize(random(72, 48)), jnp.asarray(random(6, 72))
    placed = jax.device_put(kernel, sharding.placement(kernel, ("embed", "mlp"), mesh))
    assert placed.codes.addressable_shards[0].data.shape == (36, 24)
    assert placed.scale.addressable_shards[0].data.shape == (24,)
    gradient = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.square(matmul(x, kernel)).mean()))
    spread = jax.device_put(x, sharding.spec(("batch", None), x.shape, mesh))
    for one, other in zip(gradient(x, kernel), gradient(spread, placed), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
