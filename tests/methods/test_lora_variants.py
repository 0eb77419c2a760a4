"""DoRA, LoRA+, LoRA-FA, lora_bias and the initialisations: what each does, and what each refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.adapters import attach, detach, merge, use
from peftjax.adapters.adapter import over_layers
from peftjax.core import variables
from peftjax.core.variables import PeftConstant
from peftjax.methods import Lora

E, V, KV, L = 32, 48, 16, 3  # embed, vocab, kv heads * head dim, layers


def attached(name: str = "default", model: Any = None, seed: int = 1, **options: Any) -> Any:
    options = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")} | options
    return attach(tiny.model() if model is None else model, Lora(**options), name, rngs=nnx.Rngs(seed))


def logits(model: Any) -> np.ndarray:
    return np.asarray(model(tiny.tokens()))


def query(model: Any, name: str = "default") -> Any:
    return model.blocks.attention.query.adapters.adapter(name)


def kernels(model: Any) -> np.ndarray:
    return np.asarray(model.blocks.attention.query.kernel.get_value())


def layer(adapter: Any, index: int) -> Any:
    """One layer of a stacked adapter, as the scan gives it."""
    graph, state = nnx.split(adapter)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


# --- DoRA ---


def test_dora_starts_at_the_base_up_to_the_rounding_of_a_norm() -> None:
    model = attached(dora=True, targets=("q_proj", "down_proj", "embed_tokens", "lm_head"))
    np.testing.assert_allclose(logits(model), logits(tiny.model()), atol=1e-5)
    norms = np.linalg.norm(kernels(model), axis=1)
    np.testing.assert_allclose(query(model).magnitude.get_value(), norms, rtol=1e-6)


def test_dora_gives_each_column_of_the_kernel_its_magnitude() -> None:
    model = tiny.randomize(attached(dora=True), scale=0.5)
    changed = over_layers(query(model), lambda one, kernel: one.changed(kernel), jnp.asarray(kernels(model)))
    np.testing.assert_allclose(np.linalg.norm(changed, axis=1), np.abs(query(model).magnitude.get_value()), rtol=1e-5)
    direction = kernels(model) + np.asarray(over_layers(query(model), lambda one: one.delta()))
    direction *= np.asarray(query(model).magnitude.get_value() / np.linalg.norm(direction, axis=1))[:, None]
    np.testing.assert_allclose(changed, direction, atol=1e-5)


def test_no_gradient_flows_through_doras_norm() -> None:
    model = tiny.randomize(attached(dora=True), scale=0.5)
    one, kernel = layer(query(model), 0), jnp.asarray(kernels(model)[0])
    x = jax.random.normal(jax.random.key(0), (5, E))
    norm = one.norm(kernel)

    graph, leaves = variables.flat(one)
    values = {path: leaf.get_value() for path, leaf in leaves.items()}

    def ours(b: jax.Array) -> jax.Array:
        one = variables.join(graph, values | {"b": b})
        return jnp.square(one(model.blocks.attention.query, lambda x, kernel: x @ kernel, x, kernel=kernel)).sum()

    def constant(b: jax.Array) -> jax.Array:
        changed = (kernel + one.scale.get_value()[0] * one.a.get_value() @ b) * (one.magnitude.get_value() / norm)[None]
        return jnp.square(x @ changed).sum()

    b = one.b.get_value()
    expected = jax.grad(constant)(b)
    np.testing.assert_allclose(jax.grad(ours)(b), expected, rtol=1e-3, atol=1e-3 * float(jnp.abs(expected).max()))


def test_dora_drops_the_same_inputs_of_the_kernel_and_of_the_update() -> None:
    model = tiny.randomize(attached(dora=True, dropout=0.5), scale=0.5)
    one, kernel = layer(query(model), 0), jnp.asarray(kernels(model)[0])
    x, bias = jax.random.normal(jax.random.key(0), (5, E)), jnp.arange(E, dtype=jnp.float32)
    owner = tiny.model(attention_bias=True).blocks.attention.query
    compute = lambda x, kernel, bias: x @ kernel + jnp.broadcast_to(bias, (5, E))  # noqa: E731
    one.dropout.deterministic = False
    one.dropout.key.set_value(jnp.array([1, 2], jnp.uint32))
    dropped = one.dropout(x)
    assert np.any(dropped != x)
    update = one.delta()
    factor = one.magnitude.get_value() / one.norm(kernel)
    expected = x @ kernel + bias[None] + (factor - 1)[None] * (dropped @ kernel) + factor[None] * (dropped @ update)
    np.testing.assert_allclose(one(owner, compute, x, kernel=kernel, bias=bias), expected, atol=1e-4)


def test_dora_of_a_tied_head_measures_the_table() -> None:
    model = attached(dora=True, targets=("lm_head",), model=tiny.model(tie_word_embeddings=True))
    table = np.asarray(model.embed.embedding.get_value())
    np.testing.assert_allclose(
        model.head.adapters.default.magnitude.get_value(), np.linalg.norm(table, axis=1), rtol=1e-6
    )
    expected = logits(tiny.randomize(model))
    np.testing.assert_allclose(logits(merge(model)), expected, atol=1e-4)


# --- The optimizer, and A ---


def test_lora_plus_multiplies_the_rate_of_b_and_of_vectors_alone() -> None:
    options = {"dora": True, "bias": "lora_only", "targets": ("q_proj", "embed_tokens", "lm_head")}
    model = attached(model=tiny.model(attention_bias=True), lr_ratio=16.0, modules_to_save=("norm",), **options)
    leaves = variables.flat(model)[1]
    _, trainable, _ = variables.split_by_kind(model)
    optimizer = Lora(lr_ratio=16.0).optimizer(optax.sgd(1.0), leaves)
    ones = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = optimizer.update(ones, optimizer.init(trainable), trainable)
    rates = {path: -float(leaf.ravel()[0]) for path, leaf in updates.items() if isinstance(leaf, jax.Array)}
    assert rates == {
        path: 1.0 if path.endswith(".a") or path == "embed.adapters.default.b" else 16.0
        for path in trainable
        if isinstance(trainable[path], jax.Array)
    }
    assert sorted(set(rates.values())) == [1.0, 16.0]
    assert Lora().optimizer(optimizer, leaves) is optimizer


def test_lora_fa_holds_a_as_a_constant_that_stays() -> None:
    model = attached(freeze_a=True)
    assert type(query(model).a) is PeftConstant
    np.testing.assert_array_equal(query(model).a.get_value(), query(attached()).a.get_value())


# --- A bias of B's own ---


def test_a_bias_of_b_is_scaled_and_merged_into_the_layers_own() -> None:
    model = tiny.randomize(attached(model=tiny.model(attention_bias=True), lora_bias=True, bias="lora_only"))
    expected, own = logits(model), np.asarray(query(model).bias.get_value())
    shift = np.asarray(query(model).shift.get_value())
    merge(model)
    np.testing.assert_allclose(logits(model), expected, atol=2e-5)
    np.testing.assert_allclose(model.blocks.attention.query.bias.get_value(), own + 2 * shift, rtol=1e-5)


def test_a_bias_of_b_is_not_merged_into_a_layer_without_one() -> None:
    model = tiny.randomize(attached(lora_bias=True))
    before, expected = tiny.bits(model), logits(model)
    with pytest.raises(ValueError, match=r"method.lora_bias=True cannot be merged into a layer without a bias"):
        merge(model)
    assert tiny.bits(model) == before
    np.testing.assert_array_equal(logits(model), expected)


# --- Initialisations ---


def test_gaussian_has_a_deviation_of_one_over_the_rank() -> None:
    lora = query(attached(init="gaussian", rank=8, rank_pattern={"layers.1.self_attn.q_proj": 2}))
    np.testing.assert_allclose(np.std(lora.a.get_value()[0]), 1 / 8, rtol=0.15)
    np.testing.assert_allclose(np.std(lora.a.get_value()[1, :, :2]), 1 / 2, rtol=0.25)
    assert not np.any(lora.a.get_value()[1, :, 2:])
    assert not np.any(lora.b.get_value())


def test_orthogonal_has_no_zero_factor_and_a_product_of_zero() -> None:
    lora = query(attached(init="orthogonal"))
    a, b = np.asarray(lora.a.get_value()), np.asarray(lora.b.get_value())
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)
    assert np.std(a) == pytest.approx(0.1 / np.sqrt(2), rel=0.2)
    assert np.std(b) == pytest.approx(0.1 / np.sqrt(2), rel=0.2)
    assert np.linalg.matrix_rank(a[0]) == np.linalg.matrix_rank(b[0]) == 2


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_with_the_best_approximation_of_the_kernel(rslora: bool) -> None:
    model = attached(init="pissa", rslora=rslora, rank_pattern={"layers.1.self_attn.q_proj": 2})
    lora = query(model)
    u, s, vt = np.linalg.svd(kernels(model))
    for index, rank in enumerate((4, 2, 4)):
        best = (u[index, :, :rank] * s[index, :rank]) @ vt[index, :rank]
        a, b, scale = (np.asarray(leaf.get_value()[index]) for leaf in (lora.a, lora.b, lora.scale))
        np.testing.assert_allclose((a * scale) @ b, best, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(a[:, :rank], axis=0), np.linalg.norm(b[:rank], axis=1), rtol=1e-4)


def test_a_randomised_svd_comes_near_the_svd() -> None:
    rest = []
    for init in ("pissa", "pissa_niter_20", "pissa_niter_0"):
        lora = query(model := attached(init=init))
        update = 2 * np.asarray(jnp.matmul(lora.a.get_value(), lora.b.get_value()))
        rest.append(np.linalg.norm(kernels(model) - update, axis=(1, 2)))
    assert np.all(rest[0] <= rest[1])
    np.testing.assert_allclose(rest[1], rest[0], rtol=0.02)
    assert np.all(rest[2] > 1.02 * rest[0])


def test_olora_starts_with_the_first_columns_of_a_qr_decomposition() -> None:
    model = attached(init="olora")
    lora = query(model)
    b, a = np.asarray(lora.b.get_value()), np.asarray(lora.a.get_value())
    np.testing.assert_allclose(b @ b.transpose(0, 2, 1), np.broadcast_to(np.eye(4), (L, 4, 4)), atol=1e-5)
    np.testing.assert_allclose(a @ b, kernels(model) @ b.transpose(0, 2, 1) @ b, atol=1e-5)
    np.testing.assert_allclose((a @ b)[:, :4], kernels(model)[:, :4], atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_starts_as_a_part_of_the_kernel_changes_no_bit_at_first(init: str, dtype: str) -> None:
    base = tiny.model(dtype=dtype)
    model = attached(init=init, model=tiny.model(dtype=dtype), dtype=dtype)
    np.testing.assert_array_equal(logits(model), logits(base))
    assert tiny.bits(model) == tiny.bits(base)


def test_pissa_drops_inputs_of_what_is_trained_alone() -> None:
    model = attached(init="pissa", dropout=0.5)
    one, x = layer(query(model), 0), jax.random.normal(jax.random.key(0), (5, E))
    one.dropout.deterministic = False
    one.dropout.key.set_value(jnp.array([1, 2], jnp.uint32))
    start = np.asarray(one.a.get_value() @ one.b.get_value()) * 2
    np.testing.assert_allclose(one.update(x), (one.dropout(x) - x) @ start, atol=1e-5)


def test_adapters_that_start_as_the_same_part_of_the_kernel_leave_each_other_alone() -> None:
    model = attached("second", tiny.randomize(attached("first", init="pissa")), init="pissa")
    np.testing.assert_array_equal(logits(model), logits(tiny.model()))
    both = logits(use(model, ("first", "second")))
    np.testing.assert_allclose(both, logits(use(model, "first")), atol=1e-5)
    np.testing.assert_array_equal(logits(detach(detach(model, "first"), "second")), logits(tiny.model()))


# --- Mistakes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "corda"}, "method.init='corda' is not one of kaiming, gaussian, orthogonal, eva, olora, pissa, loftq"),
        ({"init": "pissa_niter_"}, "method.init='pissa_niter_' is not one of kaiming"),
        ({"init": "orthogonal", "rank": 3}, "method.rank must be even with init='orthogonal', got 3"),
        ({"init": "orthogonal", "rank_pattern": {"q_proj": 5}}, "method.rank must be even with .*, got 5"),
        ({"dora": True, "lora_bias": True}, "method.lora_bias=True cannot be combined with dora=True, as in peft"),
        ({"lr_ratio": 0.0}, "method.lr_ratio must be a number above 0, got 0.0"),
        ({"init": "pissa", "targets": ("embed_tokens",)}, "method.init='pissa' starts from a Linear's kernel; leave"),
        (
            {"freeze_a": True, "targets": ("embed_tokens",)},
            "method.freeze_a=True would train nothing in an embedding, whose A starts at zero; leave",
        ),
        ({"lora_bias": True, "targets": ("embed_tokens",)}, "method.lora_bias=True adds its bias to a Linear's output; leave"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        attached(model=model, **options)
    assert not [path for path in variables.flat(model)[1] if "adapters" in path]
