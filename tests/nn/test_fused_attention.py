"""Attention without an array of scores equals dense attention, gradients included; the choice of an implementation."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax
import tests.tiny as tiny
from peftjax import losses
from peftjax.core.errors import UserError
from peftjax.models import from_hf_config
from peftjax.models.kernels import kernel_of, use_kernel
from peftjax.nn.attention_kernels import attend, cudnn, splash, triton
from peftjax.nn.attention_mask import AttentionMask
from peftjax.nn.blockwise import blockwise
from peftjax.nn.dropout import Dropout
from peftjax.nn.fused import LONG, choose_implementation
from peftjax.sharding import make_mesh
from peftjax.training import jaxpr_cost

Compute = Callable[[jax.Array, jax.Array, jax.Array, AttentionMask], jax.Array]

B, N, K, H = 2, 4, 2, 16


def make_mask(length: int, window: int = 0, windows: tuple[int, ...] | None = None, **fields: Any) -> AttentionMask:
    """A mask of one layer. packed: documents of which one starts within a block; padded: keys at the end that are padding."""
    given: dict[str, Any] = {"positions": jnp.arange(length)[None]}
    shared = fields.get("shared", 0)
    if fields.pop("packed", False):
        starts = np.array([[shared, length // 2, length - 5], [shared, length // 3, length // 3 + 1]])
        index = np.arange(length)
        segments = (index >= starts[:, :, None]).sum(axis=1)
        first = np.take_along_axis(starts, np.maximum(segments - 1, 0), axis=1)
        positions = np.where(index < shared, index, shared + index - first)
        given = {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    if fields.pop("padded", False):
        given["valid"] = jnp.arange(length)[None] < jnp.array([[length], [length - 9]])
    mask = AttentionMask(length=length, windows=windows or ((window,) if window else ()), **given, **fields)
    return mask.of_layer(jnp.int32(window))


def dense(mask: AttentionMask) -> jax.Array:
    """bool [B or 1, 1, T, P + T], as `Attention` and `Prefix` make it from the description."""
    assert mask.windows == () or mask.window is not None
    found = mask.dense().of_layer(jnp.int32(0) if mask.window is None else mask.window)
    if found is None:
        found = jnp.tril(jnp.ones((1, 1, mask.length, mask.length), bool))
    return jnp.pad(found, ((0, 0),) * 3 + ((mask.prefix + mask.length - found.shape[3], 0),), constant_values=True)


def check_equal(
    compute: Compute, mask: AttentionMask, cap: float | None = None, mesh: dict[str, int] | None = None
) -> None:
    """Outputs and gradients equal those of dense attention, for queries that may attend to at least one key."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, (B, length, heads, H))
        for key, length, heads in zip(keys, (mask.length, *[mask.prefix + mask.length] * 2), (N, K, K), strict=False)
    )
    allowed = dense(mask)
    weights = jax.random.normal(keys[3], q.shape) * jnp.any(allowed, axis=(1, 3))[:, :, None, None]

    def loss(attention: Any) -> Any:
        return lambda *qkv: (jnp.sum((out := attention(*qkv)) * weights), out * (weights != 0))

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, allowed, scale=0.3, cap=cap, dropout=Dropout(0.0))

    expected = jax.jit(jax.value_and_grad(loss(plain), (0, 1, 2), has_aux=True))(q, k, v)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = jax.jit(jax.value_and_grad(loss(lambda *qkv: compute(*qkv, mask)), (0, 1, 2), has_aux=True))(q, k, v)
    (_, out), gradients = found
    (_, expected_out), expected_gradients = expected
    for one, other in zip((out, *gradients), (expected_out, *expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "packed": {"packed": True},
    "window": {"window": 7},
    "one of two windows": {"window": 7, "windows": (0, 7), "packed": True},
    "no window of two": {"windows": (0, 7), "padded": True},
    "prefix": {"prefix": 5, "packed": True, "padded": True},
    "windowed prefix": {"prefix": 5, "window": 9, "packed": True},
    "chunks": {"window": 7, "windows": (0, 7), "chunked": True, "packed": True, "padded": True},
    "prefix in chunks": {"prefix": 5, "shared": 3, "window": 9, "chunked": True},
    "soft prompt": {"shared": 3, "prefix": 2, "window": 9, "packed": True},
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", MASKS)
def test_blocks_equal_dense_attention(name: str) -> None:
    cap = 2.0 if name in ("packed", "soft prompt") else None
    check_equal(lambda *given: blockwise(*given, scale=0.3, cap=cap, block=16), make_mask(40, **MASKS[name]), cap)


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"sequence": 2, "tensor": 2}])
def test_blocks_on_a_mesh_equal_dense_attention(sizes: dict[str, int]) -> None:
    mask = make_mask(40, window=9, shared=3, prefix=2, packed=True, padded=True)
    check_equal(lambda *given: blockwise(*given, scale=0.3, cap=2.0, block=16), mask, 2.0, sizes)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "tensor": 2}])
def test_blockwise_sinks_equal_those_of_dense_attention(sizes: dict[str, int] | None) -> None:
    """Both equal attention with an additional key, whose value is zero."""
    mask = make_mask(40, window=9, prefix=2, packed=True, padded=True)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (B, 40 + 2 * (i > 0), heads, H)) for i, heads in enumerate((N, K, K))
    )
    sinks = jnp.array([2.0, -1.0, 0.0, 5.0])

    def gradients(attention: Any) -> Any:
        loss = lambda *given: (jnp.sum(jnp.sin(out := attention(*given))), out)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        return attend(q, k, v, dense(mask), scale=0.3, cap=None, dropout=Dropout(0.0), sinks=sinks)

    def with_a_key(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(array, N // K, axis=2) for array in (k, v))
        scores = jnp.where(dense(mask), 0.3 * jnp.einsum("btnh,bsnh->bnts", q, k), -jnp.inf)
        last = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, last], axis=-1), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights[..., :-1], v)

    expected = gradients(with_a_key)
    with contextlib.nullcontext() if sizes is None else jax.set_mesh(make_mesh(sizes)):
        blocks = gradients(lambda q, k, v, s: blockwise(q, k, v, mask, scale=0.3, cap=None, sinks=s, block=16))
    for found in (gradients(plain), blocks):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[0][1], expected[0][1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[1], expected[1])


def test_queries_without_any_key_get_zeros_and_finite_gradients() -> None:
    mask = AttentionMask(
        length=8, positions=jnp.arange(8)[None], valid=(jnp.arange(8) >= 3)[None]
    )  # padding on the left
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 8, 2, 4)) for i in range(3))
    out, back = jax.vjp(lambda *qkv: blockwise(*qkv, mask, scale=None, cap=None, block=4), q, k, v)
    assert not np.asarray(out[:, :3]).any()
    assert np.asarray(out[:, 3:]).all()
    assert all(np.isfinite(gradient).all() for gradient in back(jnp.ones_like(out)))


@pytest.mark.slow
def test_second_derivatives_of_blocks_are_those_of_dense_attention() -> None:
    """The reverse-mode derivative of a gradient, where for some queries no key of a block counts."""
    mask = make_mask(24, window=5, packed=True)
    q, k, v = (jax.random.normal(jax.random.key(i), (B, 24, heads, H)) for i, heads in enumerate((N, K, K)))

    def curvature(attention: Any) -> Any:
        gradient = jax.grad(lambda *qkv: jnp.sum(jnp.sin(attention(*qkv))), (0, 1, 2))
        return jax.jit(jax.grad(lambda *qkv: sum(jnp.sum(jnp.cos(part)) for part in gradient(*qkv)), (0, 1, 2)))

    found = curvature(lambda *qkv: blockwise(*qkv, mask, scale=0.3, cap=2.0, block=8))(q, k, v)
    plain = curvature(lambda *qkv: attend(*qkv, dense(mask), scale=0.3, cap=2.0, dropout=Dropout(0.0)))(q, k, v)
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_memory_of_blocks_grows_linearly_and_no_block_after_the_diagonal_is_computed() -> None:
    def of(length: int) -> tuple[int, int]:
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        mask = AttentionMask(length=length, positions=jnp.arange(length)[None])
        step = jax.grad(lambda q, k, v: blockwise(q, k, v, mask, scale=None, cap=None, block=64).sum(), (0, 1, 2))
        memory = jax.jit(step).lower(shape, shape, shape).compile().memory_analysis()
        assert memory is not None
        text = str(jax.make_jaxpr(step)(shape, shape, shape))
        return memory.temp_size_in_bytes, text.count(f"length={length // 64 * (length // 64 + 1) // 2}")

    (short, loops), (long, _) = of(512), of(2048)
    assert long < 4.2 * short
    assert loops == 2  # forward and backward


def test_memory_of_a_model_with_blocks_grows_linearly() -> None:
    """A scan over layers keeps no masks, which are the same for all layers, of all pairs of blocks."""
    model = peftjax.attach(tiny.model(max_position_embeddings=4096), peftjax.Lora(rank=1), rngs=nnx.Rngs(0))
    use_kernel(model, "blockwise")
    graph, adapter, base = nnx.split(model, peftjax.PeftParam, ...)

    def of(length: int) -> int:
        batch = {name: jnp.ones((1, length), int) for name in ("tokens", "targets", "loss_weights")}
        step = jax.grad(lambda adapter: losses.next_token(nnx.merge(graph, adapter, base), batch))
        return jaxpr_cost.live_bytes(jax.make_jaxpr(step)(adapter).jaxpr)

    assert of(4096) < 2.2 * of(2048)


def test_products_in_blocks_are_counted_on_all_devices_and_in_kernels() -> None:
    q, k, v = (jax.ShapeDtypeStruct((B, 256, heads, H), jnp.float32) for heads in (N, K, K))
    mask, dense_products = make_mask(256), 4 * B * N * 256 * 256 * H

    def products(attention: Any) -> int:
        return jaxpr_cost.matmul_flops(jax.make_jaxpr(attention)(q, k, v).jaxpr)

    def in_blocks(*qkv: jax.Array) -> jax.Array:
        return blockwise(*qkv, mask, scale=None, cap=None, block=128)

    assert products(in_blocks) == dense_products * 3 // 4  # one of four blocks is after the diagonal
    assert products(lambda *qkv: splash(*qkv, mask, scale=None)) == dense_products
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 2})):
        assert products(in_blocks) == dense_products * 3 // 4


SPLASH: dict[str, dict[str, Any]] = {
    "packed": {"packed": True},
    "one of two windows": {"window": 100, "windows": (0, 100), "packed": True, "padded": True},
    "prefix": {"prefix": 5, "padded": True},
}


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("packed", {"data": 2, "tensor": 2}),
        ("packed", {"sequence": 2, "tensor": 2}),
        ("one of two windows", None),
        pytest.param("one of two windows", {"sequence": 2}, marks=pytest.mark.slow),
        ("prefix", None),
        pytest.param("prefix", {"sequence": 2}, marks=pytest.mark.slow),
    ],
)
def test_splash_attention_equals_dense_attention(name: str, sizes: dict[str, int] | None) -> None:
    cap = 2.0 if name == "packed" else None
    check_equal(
        lambda *given: splash(*given, scale=0.3, cap=cap, interpret=True), make_mask(256, **SPLASH[name]), cap, sizes
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize(("packed", "sizes"), [(False, None), (True, {"data": 2, "tensor": 2})])
def test_triton_attention_equals_dense_attention(packed: bool, sizes: dict[str, int] | None) -> None:
    check_equal(lambda *given: triton(*given, scale=0.3, interpret=True), make_mask(256, packed=packed), None, sizes)


# --- In a model ---

GEMMA2 = {"model_type": "gemma2", "sliding_window": 3, "num_hidden_layers": 2, "attn_logit_softcapping": 2.0}


@pytest.mark.parametrize(
    ("config", "method", "remat"),
    [
        pytest.param(GEMMA2, peftjax.Lora(rank=4), "block", marks=pytest.mark.slow, id="gemma2"),
        pytest.param(
            {"model_type": "mistral", "sliding_window": 3}, peftjax.PrefixTuning(tokens=2), "none", id="prefix"
        ),
        pytest.param(
            {"model_type": "mistral", "sliding_window": 3},
            peftjax.PromptTuning(tokens=2),
            "dots",
            marks=pytest.mark.slow,
            id="prompt",
        ),
    ],
)
def test_a_model_with_blocks_has_the_same_gradients_and_decodes_as_before(
    config: dict[str, Any], method: Any, remat: str
) -> None:
    model = peftjax.attach(tiny.model(**config, remat=remat), method, rngs=nnx.Rngs(0))
    tokens = tiny.tokens(shape=(2, 9))
    segments = jnp.array([[1] * 4 + [2] * 5, [1] * 6 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    batch = {"tokens": tokens, "targets": tokens, "loss_weights": jnp.ones(tokens.shape)}
    batch |= {"segments": segments, "positions": positions}
    graph, adapter, base = nnx.split(model, peftjax.PeftParam, ...)
    other = nnx.clone(model)
    use_kernel(other, "blockwise")
    fused_graph = nnx.split(other, peftjax.PeftParam, ...)[0]

    def gradients(graph: Any) -> Any:
        return jax.jit(jax.grad(lambda adapter: losses.next_token(nnx.merge(graph, adapter, base), batch)))(adapter)

    for one, expected in zip(jax.tree.leaves(gradients(fused_graph)), jax.tree.leaves(gradients(graph)), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-5)
    _, cache = model(tokens, cache=model.make_cache(2, 10))
    _, same = other(tokens, cache=other.make_cache(2, 10))
    np.testing.assert_array_equal(cache.key, same.key)


@pytest.mark.slow
def test_a_population_under_vmap_attends_in_blocks_on_a_mesh() -> None:
    mask = make_mask(32, packed=True)
    q, k, v = (jax.random.normal(jax.random.key(i), (3, B, 32, heads, H)) for i, heads in enumerate((N, K, K)))
    compute = jax.vmap(lambda *qkv: blockwise(*qkv, mask, scale=None, cap=None, block=16))
    with jax.set_mesh(make_mesh({"data": 2})):
        found = jax.jit(jax.grad(lambda *qkv: jnp.square(compute(*qkv)).sum(), (0, 1, 2)))(q, k, v)
    for member in range(3):
        one = [array[member] for array in (q, k, v)]
        expected = jax.grad(
            lambda *qkv: jnp.square(attend(*qkv, dense(mask), scale=None, cap=None, dropout=Dropout(0.0))).sum(),
            (0, 1, 2),
        )(*one)
        for gradient, each in zip(found, expected, strict=True):
            np.testing.assert_allclose(gradient[member], each, atol=1e-5)


# --- The choice ---

BERT = {"model_type": "bert", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 2, "max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("platform", "fields", "chosen"),
    [
        ("cpu", {}, "xla"),
        ("cpu", {"length": LONG}, "blockwise"),
        ("tpu", {"segments": jnp.zeros((1, 1))}, "splash"),
        ("tpu", {"length": LONG + 1}, "blockwise"),
        ("tpu", {"segments": jnp.zeros((1, 1)), "prefix": 2}, "xla"),
        ("gpu", {"segments": jnp.zeros((1, 1))}, "triton"),
        ("gpu", {"length": LONG, "windows": (0, 3)}, "blockwise"),
    ],
)
def test_auto_takes_the_platforms_kernel_where_it_can(platform: str, fields: dict[str, Any], chosen: str) -> None:
    mask = dataclasses.replace(AttentionMask(length=256, positions=jnp.zeros((1, 1))), **fields)
    assert choose_implementation("auto", platform, mask, jnp.dtype("bfloat16"), cap=None, head_dim=128) == chosen
    wide = choose_implementation("auto", platform, mask, jnp.dtype("bfloat16"), cap=None, head_dim=256)
    assert wide == {"triton": "xla"}.get(chosen, chosen)
    sinks = choose_implementation("auto", platform, mask, jnp.dtype("bfloat16"), cap=None, head_dim=128, sinks=True)
    assert sinks == ("blockwise" if mask.length >= LONG else "xla")


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        (
            "splash",
            {"length": 100},
            "100 positions, which are not a multiple of 128; choose 'xla', 'blockwise' or 'auto'",
        ),
        ("splash", {"segments": jnp.zeros((1, 1)), "shared": 2}, "packed sequences with virtual tokens"),
        ("splash", {"windows": (4,), "prefix": 2}, "sliding windows with virtual tokens"),
        ("splash", {"windows": (4,), "chunked": True}, "chunked attention"),
        ("cudnn", {"segments": jnp.zeros((1, 1))}, "packed sequences and a machine without cuDNN"),
        (
            "triton",
            {"windows": (4,), "valid": jnp.zeros((1, 1))},
            "a soft cap and padding masks and sliding windows and attention sinks",
        ),
    ],
)
def test_an_implementation_that_does_not_support_a_batch_is_refused_by_name(
    name: str, fields: dict[str, Any], reason: str
) -> None:
    mask = dataclasses.replace(AttentionMask(length=256, positions=jnp.zeros((1, 1))), **fields)
    options: dict[str, Any] = {"cap": 3.0, "sinks": True} if name == "triton" else {"cap": None}
    with pytest.raises(UserError, match=f"attention='{name}' does not support {reason}"):
        choose_implementation(name, "tpu", mask, jnp.dtype("bfloat16"), head_dim=64, **options)


def test_the_choice_of_a_model_is_that_of_its_longest_batch() -> None:
    model = tiny.model(**GEMMA2)
    use_kernel(model, "auto", "tpu")
    assert kernel_of(model, 256, packed=True, padded=False) == "splash"
    assert kernel_of(model, 100, packed=True, padded=False) == "xla"
    llama = tiny.model(dtype="bfloat16")
    use_kernel(llama, "auto", "gpu")
    assert kernel_of(llama, 256, packed=True, padded=False) == "triton"
    assert kernel_of(llama, 256, packed=True, padded=True) == "xla"  # of a classifier
    bert = tiny.make(from_hf_config(BERT))
    use_kernel(bert, "auto", "tpu")
    assert kernel_of(bert, 256, packed=False, padded=True) == "xla"
    with pytest.raises(UserError, match="this Bert has no causal attention; choose 'auto' or 'xla'"):
        use_kernel(bert, "splash")
    with pytest.raises(UserError, match="attention='cudnn' is not possible here: "):
        cudnn(*[jnp.zeros((1, 128, 2, 16))] * 3, make_mask(128, window=5), scale=None)
