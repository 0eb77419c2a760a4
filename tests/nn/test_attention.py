"""Attention against plain NumPy; its masks, packed documents, windows and cache against what they stand for."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.models.kernels import use_kernel
from peftjax.nn.attention import Attention
from peftjax.nn.attention_kernels import attend, cudnn, splash
from peftjax.nn.attention_mask import AttentionMask, attention_mask, key_distances, within_window
from peftjax.nn.dropout import Dropout
from peftjax.nn.rope import Rope
from peftjax.sharding import make_mesh

B, T, D, N, K, H = 2, 6, 16, 4, 2, 8


def attention(kv_heads: int = K, **options: Any) -> Attention:
    fields = {"qkv_bias": False, "out_bias": False, "qk_norm_eps": None, "stddev": 0.3, "dtype": jnp.dtype("float32")}
    return Attention(D, N, kv_heads, H, **fields | options, rngs=nnx.Rngs(0))


def inputs() -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    return x, Rope(H).tables(jnp.broadcast_to(jnp.arange(T), (B, T)))


def reference(layer: Attention, x: np.ndarray, rope: Any, allowed: np.ndarray) -> np.ndarray:
    """Head by head and query by query; `allowed` is bool [B, T, T]."""
    kernels = {name: np.asarray(getattr(layer, name).kernel.get_value()) for name in ("query", "key", "value", "out")}
    biases = {name: getattr(layer, name).bias for name in kernels}
    turns = np.asarray(rope[0]) + 1j * np.asarray(rope[1])  # [B, T, H/2]

    def project(name: str, heads: int) -> np.ndarray:
        y = x @ kernels[name] + (0 if biases[name] is None else np.asarray(biases[name].get_value()))
        return y.reshape(B, T, heads, H)

    def normalized(y: np.ndarray, norm: str) -> np.ndarray:
        if not layer.qk_norm:
            return y
        scale = np.asarray(getattr(layer, norm).scale.get_value())
        return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * scale

    def turned(y: np.ndarray) -> np.ndarray:
        z = (y[..., : H // 2] + 1j * y[..., H // 2 :]) * turns[:, :, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    q, k = (
        turned(normalized(project(name, heads), f"{name}_norm"))
        for name, heads in (("query", N), ("key", layer.kv_heads))
    )
    v = project("value", layer.kv_heads)
    attended = np.zeros((B, T, N, H))
    for b in range(B):
        for n in range(N):
            shared = n // (N // layer.kv_heads)  # consecutive query heads share a key/value head
            for t in range(T):
                keys = np.flatnonzero(allowed[b, t])
                scores = k[b, keys, shared] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                attended[b, t, n] = weights / weights.sum() @ v[b, keys, shared]
    out = attended.reshape(B, T, -1) @ kernels["out"]
    return out + (0 if biases["out"] is None else np.asarray(biases["out"].get_value()))


CAUSAL = np.tril(np.ones((T, T), bool))[None].repeat(B, axis=0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_query_attention_equals_numpy(kv_heads: int, masked: bool) -> None:
    layer, (x, rope) = attention(kv_heads), inputs()
    allowed = CAUSAL & np.array([[True] * 6, [True] * 2 + [False] + [True] * 3])[:, None] if masked else CAUSAL
    out, cache = layer(x, rope, jnp.asarray(allowed)[:, None] if masked else None)
    assert cache is None
    np.testing.assert_allclose(out, reference(layer, np.asarray(x), rope, allowed), atol=1e-5)


def test_biases_and_norms_of_queries_and_keys_equal_numpy() -> None:
    layer, (x, rope) = attention(qkv_bias=True, out_bias=True, qk_norm_eps=1e-6), inputs()
    tiny.randomize(layer, nnx.Param, scale=0.5)
    out, _ = layer(x, rope, None)
    np.testing.assert_allclose(out, reference(layer, np.asarray(x), rope, CAUSAL), atol=1e-5)


# --- Masks ---


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("window", [0, 1, 2, 5])
def test_a_mask_allows_earlier_real_keys_within_the_window(offset: int, window: int) -> None:
    valid = np.array([[1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], bool)  # [B, S]
    mask = attention_mask(4, valid=jnp.asarray(valid), segments=None, offset=offset)
    distances = key_distances(offset + jnp.arange(mask.shape[2])[None], mask.shape[3], offset, shared=0)
    mask = within_window(mask, jnp.int32(window), distances)
    assert mask.shape == (2, 1, 4, 7)
    for (b, _, t, s), allowed in np.ndenumerate(np.asarray(mask)):
        query = offset + t
        assert allowed == (valid[b, s] and s <= query and (window == 0 or query - s < window)), (b, t, s)


def test_chunks_count_from_the_first_position_of_a_row() -> None:
    positions, chunk = (
        jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]]),
        3,
    )  # the second row is padded on the left
    valid = jnp.asarray([[1] * 7, [0, 0] + [1] * 5], bool)
    mask = AttentionMask(length=7, positions=positions, valid=valid, windows=(0, chunk), chunked=True).dense()
    seen = np.asarray(mask.of_layer(jnp.int32(chunk)))
    for (b, _, t, s), allowed in np.ndenumerate(seen[:, :, 2:]):
        query = t + 2
        same = positions[b, query] // chunk == positions[b, s] // chunk
        assert allowed == (valid[b, s] and s <= query and same), (b, t, s)
    assert np.asarray(mask.of_layer(jnp.int32(0)))[0, 0, 6].all()  # a layer without chunks


def test_a_mask_of_segments_allows_earlier_keys_of_the_same_document() -> None:
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
    mask = attention_mask(6, valid=None, segments=jnp.asarray(segments))
    for (b, _, t, s), allowed in np.ndenumerate(np.asarray(mask)):
        assert allowed == (s <= t and segments[b, s] == segments[b, t]), (b, t, s)


# --- In a model ---

WINDOWED = {"model_type": "mistral", "sliding_window": 3}


@pytest.fixture(params=[{}, WINDOWED], ids=["causal", "window"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.model(**request.param)


@pytest.mark.slow_cases
def test_packed_documents_equal_the_same_documents_alone(model: Any) -> None:
    lengths = (5, 1, 6)
    packed = tiny.tokens(shape=(1, 14))
    positions = jnp.concatenate([jnp.arange(length) for length in (*lengths, 2)])[None]
    segments = jnp.concatenate([jnp.full(length, i) for i, length in zip((1, 2, 3, 0), (*lengths, 2), strict=True)])[
        None
    ]
    together = np.asarray(model(packed, positions=positions, segments=segments))
    assert np.isfinite(together).all()
    start = 0
    for length in lengths:
        alone = model(packed[:, start : start + length])
        np.testing.assert_allclose(together[:, start : start + length], alone, atol=1e-5)
        start += length
    assert np.abs(together - model(packed)).max() > 0.1  # without segments they are one document


def test_padding_on_either_side_changes_no_real_token(model: Any) -> None:
    tokens = tiny.tokens(shape=(2, 7))
    expected = model(tokens)
    padded = jnp.pad(tokens, ((0, 0), (3, 2)), constant_values=9)
    mask = jnp.pad(jnp.ones((2, 7), bool), ((0, 0), (3, 2)))
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    logits = np.asarray(model(padded, mask=mask, positions=positions))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, 3:-2], expected, atol=1e-5)
    # rotary positions count by their distances alone, so they may also start at the padding
    np.testing.assert_allclose(model(padded, mask=mask)[:, 3:-2], expected, atol=1e-4)


def test_a_windowed_model_does_not_see_further_than_its_windows() -> None:
    model = tiny.model(**WINDOWED, num_hidden_layers=2)
    tokens = tiny.tokens(shape=(1, 10))
    changed = tokens.at[0, 0].set((tokens[0, 0] + 1) % 48)
    difference = np.abs(np.asarray(model(tokens) - model(changed))).max(axis=(0, 2))
    seen = difference > 1e-6
    assert seen.tolist() == [True] * 5 + [False] * 5  # two layers of a window of 3 reach 4 positions back


@pytest.mark.slow_cases
@pytest.mark.parametrize("chunks", [(6, 1, 1, 1), (2, 5, 2)])
def test_a_cache_filled_in_pieces_equals_the_whole_pass(model: Any, chunks: tuple[int, ...]) -> None:
    tokens = tiny.tokens(shape=(2, 9))
    cache, start, pieces = model.make_cache(2, 12), 0, []
    for length in chunks:
        logits, cache = model(tokens[:, start : start + length], cache=cache)
        pieces.append(logits)
        start += length
        assert int(cache.length) == start
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), model(tokens), atol=1e-5)


@pytest.mark.slow_cases
def test_a_cache_with_left_padded_prompts_equals_each_row_alone(model: Any) -> None:
    lengths, width, new = (7, 3), 7, 4
    rows = [tiny.tokens(seed, (1, length + new)) for seed, length in enumerate(lengths)]
    prompts = jnp.concatenate(
        [jnp.pad(row[:, :n], ((0, 0), (width - n, 0))) for row, n in zip(rows, lengths, strict=True)]
    )
    mask = jnp.arange(width)[None] >= width - jnp.array(lengths)[:, None]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    logits, cache = model(prompts, mask=mask, positions=positions, cache=model.make_cache(2, width + new))
    last = [logits[:, -1]]
    for step in range(new - 1):
        token = jnp.stack([row[0, n + step] for row, n in zip(rows, lengths, strict=True)])[:, None]
        logits, cache = model(token, positions=jnp.array(lengths)[:, None] + step, cache=cache)
        last.append(logits[:, -1])
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = np.asarray(model(row))[0, length - 1 : length + new - 1]
        np.testing.assert_allclose(np.stack([step[index] for step in last]), alone, atol=1e-5)


def test_a_cache_is_kept_in_the_computation_dtype() -> None:
    model = tiny.model(dtype="bfloat16")
    logits, cache = model(tiny.tokens(), cache=model.make_cache(4, 8))
    assert {cache.key.dtype, cache.value.dtype, logits.dtype} == {jnp.dtype("bfloat16")}


def test_attention_written_out_is_attention_and_a_cap_bends_its_scores() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, H)) for i, n in enumerate((N, K, K)))
    mask = attention_mask(T, valid=jnp.arange(T)[None] < jnp.array([[T], [T - 2]]), segments=None)
    for given in (None, mask):
        plain = jax.nn.dot_product_attention(q, k, v, mask=given, scale=0.7, is_causal=given is None)
        for cap in (None, 1e4):
            written = attend(q, k, v, given, scale=0.7, cap=cap, dropout=Dropout(0.0))
            np.testing.assert_allclose(written, plain, atol=1e-5)
    key = k[0, :2, 0]  # what the second query of the first head sees
    scores = 2 * np.tanh(np.asarray(key @ q[0, 1, 0]) * 0.7 / 2)
    weights = np.exp(scores) / np.exp(scores).sum()
    capped = attend(q, k, v, None, scale=0.7, cap=2.0, dropout=Dropout(0.0))
    np.testing.assert_allclose(capped[0, 1, 0], weights @ v[0, :2, 0], atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("sizes", [None, {"data": 2, "tensor": 2}, {"sequence": 2, "tensor": 2}])
def test_splash_attention_is_causal_attention_on_a_mesh_too(sizes: dict[str, int] | None) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 256, heads, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    loss = lambda attention: lambda *qkv: jnp.square(attention(*qkv)).sum()  # noqa: E731
    expected = jax.grad(loss(lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=True)), argnums=(0, 1, 2))(
        q, k, v
    )
    with contextlib.nullcontext() if sizes is None else jax.set_mesh(make_mesh(sizes)):
        fused = lambda *qkv: splash(*qkv, plain_mask(256), scale=None, interpret=True)  # noqa: E731
        found = jax.jit(jax.grad(loss(fused), argnums=(0, 1, 2)))(q, k, v)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


def plain_mask(length: int) -> AttentionMask:
    return AttentionMask(length=length, positions=jnp.arange(length)[None])


def test_fused_attention_is_refused_where_it_would_not_be_the_same() -> None:
    use_kernel(windowed := tiny.model(model_type="mistral", sliding_window=4), "splash")
    with pytest.raises(
        ValueError, match="attention='splash' does not support 4 positions, which are not a multiple of 128"
    ):
        windowed(tiny.tokens(shape=(1, 4)))
    q = jnp.zeros((1, 100, 2, 16))
    with pytest.raises(ValueError, match="multiple of 128, got 100"):
        splash(q, q, q, plain_mask(100), scale=None)
    q = jnp.zeros((1, 384, 2, 16))
    with (
        jax.set_mesh(make_mesh({"sequence": 2})),
        pytest.raises(ValueError, match="multiple of 128 on each of 2 devices, got 384"),
    ):
        splash(q, q, q, plain_mask(384), scale=None)
    with pytest.raises(ValueError, match="attention='cudnn' is not possible here: "):
        cudnn(q, q, q, plain_mask(384), scale=None)
    model = tiny.model()
    use_kernel(model, "cudnn")
    assert model.blocks.attention.implementation == "cudnn"
