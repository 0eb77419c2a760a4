"""NF4 by its own definition. That it is bitsandbytes' is shown in tests/interop/test_bitsandbytes.py."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import quant as formats
from peftjax import sharding
from peftjax.quant import nf4
from peftjax.quant.matmul import matmul
from peftjax.quant.nf4 import BLOCK, CODEBOOK, DYNAMIC_MAP, Nf4

quantize = jax.jit(nf4.quantize, static_argnames="nested")
decode = jax.jit(lambda kernel: kernel.astype(jnp.float32))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stacked(layers: int, inputs: int, outputs: int, dtype: Any = np.float32) -> tuple[jax.Array, Nf4]:
    kernels = jnp.asarray(random(layers, inputs, outputs), dtype)
    return kernels, jax.jit(jax.vmap(nf4.quantize))(kernels)


# --- The tables ---


def test_the_codebook_is_the_quantiles_of_a_normal_distribution_of_the_paper() -> None:
    from statistics import NormalDist

    # QLoRA, section 3: 8 steps down from and 7 up to the outermost probability, 0 in both, scaled to [-1, 1].
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(outermost, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(outermost, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]])) / positive.max()
    np.testing.assert_allclose(CODEBOOK, values, atol=1e-6)


def test_the_dynamic_map_is_256_numbers_in_order_from_almost_minus_1_to_1() -> None:
    assert DYNAMIC_MAP.dtype == np.float32
    assert len(DYNAMIC_MAP) == 256
    assert (np.diff(DYNAMIC_MAP) > 0).all()
    assert DYNAMIC_MAP[-1] == 1
    assert 0 in DYNAMIC_MAP
    np.testing.assert_array_equal(-DYNAMIC_MAP[:127][::-1], DYNAMIC_MAP[128:-1])


# --- Encoding and decoding ---


@pytest.mark.parametrize("shape", [(192, 96), (64, 40), (37, 33), (40, 64)])
def test_every_weight_becomes_the_entry_of_the_codebook_nearest_to_its_share_of_the_blocks_absmax(shape: Any) -> None:
    weights = random(*shape)
    kernel = quantize(weights, nested=False)
    assert kernel.shape == shape
    assert (kernel.ndim, kernel.size, kernel.dtype) == (2, weights.size, np.float32)
    flat = np.pad(weights.T.reshape(-1), (0, -weights.size % BLOCK)).reshape(-1, BLOCK)  # by rows of torch's [out, in]
    absmax = np.abs(flat).max(1, keepdims=True)
    nearest = CODEBOOK[np.abs(flat[:, :, None] / absmax[:, :, None] - CODEBOOK[None, None]).argmin(-1)] * absmax
    expected = nearest.reshape(-1)[: weights.size].reshape(shape[::-1]).T
    np.testing.assert_array_equal(decode(kernel), expected)
    if shape[0] % BLOCK == 0:
        assert kernel.codes.shape == (shape[0] // BLOCK, BLOCK, shape[1])
        assert kernel.absmax.shape == (shape[0] // BLOCK, shape[1])
    assert kernel.codes.dtype == jnp.int4


def test_double_quantization_moves_an_absmax_by_less_than_a_hundredth_of_its_groups_scale() -> None:
    weights = random(512, 96)
    plain, nested = quantize(weights, nested=False), quantize(weights)
    np.testing.assert_array_equal(nested.codes, plain.codes)
    assert nested.absmax.dtype == jnp.uint8
    assert nested.scales.shape == (3,)  # 8 * 96 / 256
    np.testing.assert_allclose(nested.offset, np.asarray(plain.absmax, np.float64).mean(), rtol=1e-7)
    error = np.abs(nested.block_absmax() - plain.absmax)
    assert error.max() <= 0.01 * np.asarray(nested.scales).max()


def test_zeros_stay_zeros_and_an_outlier_spoils_its_own_block_alone() -> None:
    weights = random(192, 96)
    weights[:64, 0], weights[:, 3] = 0, 0
    clean = np.array(decode(quantize(weights, nested=False)))
    weights[7, 5] = 1e4
    kernel = quantize(weights, nested=False)
    decoded = np.asarray(decode(kernel))
    assert not decoded[:64, 0].any()
    assert not decoded[:, 3].any()
    assert decoded[7, 5] == 1e4
    assert np.count_nonzero(decoded[:64, 5]) == 1
    clean[:64, 5] = decoded[:64, 5]
    np.testing.assert_array_equal(decoded, clean)
    assert not np.asarray(decode(quantize(np.zeros((64, 4), np.float32)))).any()


def test_of_two_codes_equally_near_the_lower_one_is_taken() -> None:
    middle = (CODEBOOK[1:] + CODEBOOK[:-1]) / np.float32(2)
    weights = np.resize(np.concatenate([[np.float32(1)], middle]), 64)[:, None]
    codes = np.asarray(quantize(weights, nested=False).codes)[0, :, 0].astype(int) + 8
    np.testing.assert_array_equal(codes, np.resize([15, *range(15)], 64))


@pytest.mark.parametrize("shape", [(192, 96), (37, 33)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_decoded_is_encoded_to_the_same_codes(shape: Any, dtype: str) -> None:
    kernel = quantize(jnp.asarray(random(*shape), dtype), nested=False)
    again = jax.jit(lambda kernel: formats.quantize(kernel.astype(kernel.dtype), kernel.format))(kernel)
    for one, other in zip(jax.tree.leaves(kernel), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(kernel) == jax.tree.structure(again)


@pytest.mark.slow_cases
@pytest.mark.parametrize("shape", [(128, 40), (37, 33)])
def test_a_stack_is_its_layers_one_by_one_and_encodes_others_as_it_was(shape: Any) -> None:
    kernels, kernel = stacked(3, *shape, dtype=jnp.bfloat16)
    assert kernel.shape == (3, *shape)
    whole = decode(kernel)
    for layer in range(3):
        one = quantize(kernels[layer])
        for part, of_stack in zip(jax.tree.leaves(one), jax.tree.leaves(kernel), strict=True):
            np.testing.assert_array_equal(of_stack[layer], part)
        np.testing.assert_array_equal(decode(one), whole[layer])
    np.testing.assert_array_equal(whole, whole.astype(jnp.bfloat16).astype(np.float32))  # rounded to its own dtype
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda kernel: kernel.astype(jnp.float32)))(kernel), whole)
    again = jax.jit(lambda old, new: formats.quantize(new, old.format))(kernel, kernels)
    for one, other in zip(jax.tree.leaves(kernel), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_mean_is_exact_to_a_unit_in_the_last_place_and_has_the_same_bits_in_any_order() -> None:
    mean, rng = jax.jit(nf4.mean), np.random.default_rng(0)
    for values in (rng.uniform(0, 3, 5001), np.exp(8 * rng.normal(size=5001)), np.full(5001, 1e-30)):
        values = values.astype(np.float32)
        exact = np.float32(values.astype(np.float64).mean())
        found = [np.float32(mean(rng.permutation(values))) for _ in range(3)]
        assert len(set(found)) == 1
        assert abs(found[0] - exact) <= np.spacing(exact)
    assert mean(np.zeros(5001, np.float32)) == 0


# --- The product ---


@pytest.mark.slow_cases
@pytest.mark.parametrize("inputs", [128, 72])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_and_its_gradient_are_those_of_the_decoded_kernel_which_gets_none(inputs: int, dtype: str) -> None:
    kernel = jax.tree.map(lambda leaf: leaf[0], stacked(1, inputs, 48, dtype)[1])
    x, cotangent = jnp.asarray(random(2, 3, inputs), dtype), jnp.asarray(random(2, 3, 48, seed=1), dtype)
    dense = decode(kernel).astype(dtype)

    @jax.jit
    def both(x: jax.Array, kernel: Any) -> Any:
        y, back = jax.vjp(matmul, x, kernel)
        return y, back(cotangent)

    (y, (to_x, to_kernel)), (expected, (expected_to_x, _)) = both(x, kernel), both(x, dense)
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]  # of bfloat16 one unit: the order of the sums
    assert y.dtype == to_x.dtype == dtype
    for one, other in ((y, expected), (to_x, expected_to_x)):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)
    for leaf in jax.tree.leaves(to_kernel):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


@pytest.mark.slow_cases
@pytest.mark.parametrize("outputs", [48, 33])
@pytest.mark.parametrize("nested", [False, True])
def test_decoding_in_parts_on_a_cpu_is_bit_identical(outputs: int, nested: bool) -> None:
    for stored in (jnp.float32, jnp.bfloat16):
        kernel = quantize(jnp.asarray(random(192, outputs), stored), nested=nested)
        parts = nf4._columns(kernel, 2)
        assert len(parts) == (2 if outputs == 48 else 1)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            whole = jax.jit(lambda kernel, dtype=dtype: kernel.astype(dtype))(kernel)
            for i, part in enumerate(parts):
                found = jax.jit(lambda kernel, dtype=dtype: kernel.astype(dtype))(part)
                np.testing.assert_array_equal(found, whole[:, i :: len(parts)])


def scanned(layers: int, remat: bool) -> Any:
    """What the compiler says of the gradient through a scan over layers [512, 512], with a trained vector in each."""
    abstract = jax.eval_shape(jax.vmap(nf4.quantize), jax.ShapeDtypeStruct((layers, 512, 512), jnp.bfloat16))
    scales = jax.ShapeDtypeStruct((layers, 512), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)

    def loss(scales: jax.Array, kernels: Nf4, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(matmul(x, layer[1]) * layer[0][None]), None

        x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, (scales, kernels))
        return jnp.square(x.astype(jnp.float32)).mean()

    # XLA's CPU backend, and no other, would make int8 arrays of int4 ones that a loop reads.
    options = {"xla_disable_hlo_passes": "float-normalization-s4"}
    return jax.jit(jax.grad(loss)).lower(scales, abstract, x).compile(options).memory_analysis()


@pytest.mark.slow_cases
@pytest.mark.parametrize("remat", [False, True])
def test_twice_the_layers_of_a_scan_take_no_more_than_one_decoded_kernel(remat: bool) -> None:
    more = scanned(16, remat).temp_size_in_bytes - scanned(8, remat).temp_size_in_bytes
    assert more < 512 * 512 * 2  # bfloat16; the activations of 8 layers are in it


def test_the_arguments_of_a_compiled_product_are_four_bits_and_an_eighth_for_each_weight() -> None:
    abstract = jax.eval_shape(nf4.quantize, jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16))
    compiled = jax.jit(lambda kernel: matmul(jnp.ones((1, 1024), jnp.bfloat16), kernel)).lower(abstract).compile()
    assert compiled.memory_analysis().argument_size_in_bytes * 8 <= 4.13 * 1024 * 1024


def equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_of_a_population_the_kernel_is_decoded_once() -> None:
    kernel = quantize(random(128, 48))
    members = jnp.asarray(random(5, 3, 128))
    gradient = jax.jit(jax.grad(lambda x, kernel: jnp.square(matmul(x, kernel)).sum()))
    together = jax.jit(jax.vmap(gradient, in_axes=(0, None)))
    alone = [gradient(x, kernel) for x in members]
    np.testing.assert_allclose(together(members, kernel), jnp.stack(alone), rtol=1e-5, atol=1e-5)
    read = [
        equation.outvars[0].aval.size
        for equation in equations(jax.make_jaxpr(together)(members, kernel).jaxpr)
        if equation.primitive.name == "convert_element_type" and equation.invars[0].aval.dtype == jnp.int4
    ]
    assert set(read) == {128 * 48, 128 * 24}  # a CPU decodes half of the columns at a time


@pytest.mark.parametrize("inputs", [256, 72])
def test_on_four_devices_the_codes_are_split_and_products_are_those_of_one(inputs: int) -> None:
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    kernel = quantize(random(inputs, 48))
    x = jnp.asarray(random(6, inputs))
    gradient = jax.jit(jax.value_and_grad(lambda x, kernel: jnp.square(matmul(x, kernel)).mean()))
    placed = jax.device_put(kernel, sharding.placement(kernel, ("embed", "mlp"), mesh))
    if inputs % BLOCK == 0:
        assert placed.codes.addressable_shards[0].data.shape == (inputs // BLOCK // 2, BLOCK, 24)
        assert placed.absmax.addressable_shards[0].data.shape == (inputs // BLOCK // 2, 24)
    else:  # blocks run on from one output to the next
        assert placed.codes.sharding.is_fully_replicated
    spread = jax.device_put(x, sharding.spec(("batch", None), x.shape, mesh))
    for one, other in zip(gradient(x, kernel), gradient(spread, placed), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_every_leaf_of_a_sharded_kernel_encoded_there_has_the_bits_of_one_device() -> None:
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    weights = random(256, 48)
    abstract = jax.eval_shape(nf4.quantize, weights)
    encode: Callable = jax.jit(nf4.quantize, out_shardings=sharding.placement(abstract, ("embed", "mlp"), mesh))
    split = encode(jax.device_put(weights, sharding.spec(("embed", "mlp"), weights.shape, mesh)))
    for field in dataclasses.fields(Nf4)[:4]:
        np.testing.assert_array_equal(getattr(split, field.name), getattr(quantize(weights), field.name))


def test_the_product_of_a_tpu_is_the_product() -> None:
    kernel = quantize(jax.random.normal(jax.random.key(0), (192, 24)))
    for transposed, width in ((False, 192), (True, 24)):
        forms = (partial(nf4._fused, transposed), partial(nf4._unfused, 1, transposed))
        x = jax.random.normal(jax.random.key(1), (5, width))
        found, expected = (jax.jit(form)(x, kernel) for form in forms)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
