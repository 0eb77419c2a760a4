"""The chunked cross entropy against a plain one, and what it may hold."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from peftjax.totals import Totals, chunked_cross_entropy

B, T, D, V = 2, 12, 8, 40


def make_inputs(length: int = T, vocab: int = V) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Head [D, V], hidden [B, T, D], targets [B, T] and weights [B, T] with zeros among them."""
    keys = jax.random.split(jax.random.key(0), 4)
    head = jax.random.normal(keys[0], (D, vocab))
    hidden = jax.random.normal(keys[1], (B, length, D))
    targets = jax.random.randint(keys[2], (B, length), 0, vocab)
    weights = jax.random.choice(keys[3], jnp.asarray([0.0, 0.5, 1.0]), (B, length))
    return head, hidden, targets, weights


def plain(logits_fn: Callable, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Totals:
    """The same sums, from all logits at once."""
    logits = logits_fn(hidden).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
    hits = jnp.argmax(logits, axis=-1) == targets
    return Totals(jnp.sum(weights * losses), jnp.sum(weights), jnp.sum(weights * hits))


@pytest.mark.slow_cases
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 7, 11, 12, 13, 100])
def test_every_chunking_equals_the_plain_sums_and_their_gradients(chunk: int) -> None:
    head, hidden, targets, weights = make_inputs()
    targets = targets.at[:, ::2].set(jnp.argmax(hidden @ head, axis=-1)[:, ::2])  # so that some are hit

    def loss(head: jax.Array, hidden: jax.Array, *how: Any) -> tuple[jax.Array, Totals]:
        function, *rest = how
        totals = function(lambda h: h @ head, hidden, targets, weights, *rest)
        return totals.loss / totals.tokens, totals

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=(2, 3))
    expected_gradients, expected = gradient(head, hidden, plain)
    gradients, totals = gradient(head, hidden, chunked_cross_entropy, chunk)
    assert 0 < expected.correct < expected.tokens
    np.testing.assert_allclose(totals[:3], expected[:3], rtol=1e-6)
    assert totals.balance is None
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint16])
def test_targets_of_a_type_that_holds_fewer_numbers_than_the_vocabulary_give_the_same(dtype: Any) -> None:
    head, hidden, targets, weights = make_inputs(vocab=300)
    targets = targets % 100
    for chunk in (5, T):
        expected = chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, chunk)
        totals = chunked_cross_entropy(lambda h: h @ head, hidden, targets.astype(dtype), weights, chunk)
        assert totals[:3] == expected[:3]


@pytest.mark.slow_cases
@pytest.mark.parametrize("chunk", [3, 5, T])
def test_a_sharded_batch_under_a_sharded_vocabulary_gives_the_same_and_stays_sharded(chunk: int) -> None:
    head, hidden, targets, weights = make_inputs()
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def loss(head: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, chunk).loss

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected_loss, expected_gradients = step(head, hidden, targets, weights)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded_head = jax.device_put(head, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    sharded = step(sharded_head, *jax.device_put((hidden, targets, weights), rows))
    np.testing.assert_allclose(sharded[0], expected_loss, rtol=1e-6)
    for ours, reference in zip(sharded[1], expected_gradients, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    assert sharded[1][1].sharding.is_equivalent_to(rows, 3)


@pytest.mark.parametrize("chunk", [5, T])
def test_parameters_that_the_head_closes_over_get_their_gradients(chunk: int) -> None:
    head, hidden, targets, weights = make_inputs()
    lora = {"a": 0.1 * jnp.ones((D, 2)), "b": 0.1 * jax.random.normal(jax.random.key(1), (2, V))}

    def loss(lora: dict[str, jax.Array], function: Callable, *rest: int) -> jax.Array:
        return function(lambda h: h @ head + h @ lora["a"] @ lora["b"], hidden, targets, weights, *rest).loss

    expected = jax.grad(loss)(lora, plain)
    gradients = jax.jit(lambda lora: jax.grad(loss)(lora, chunked_cross_entropy, chunk))(lora)
    for name in lora:
        assert jnp.abs(expected[name]).max() > 0.1
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("chunk", [5, T])
@pytest.mark.parametrize("ignored", [-100, V, 2**31 - 1, -(2**31)])
def test_a_target_of_weight_zero_may_be_any_number(chunk: int, ignored: int) -> None:
    head, hidden, targets, weights = make_inputs()

    def value_and_gradient(targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(
            lambda hidden: chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, chunk).loss
        )(hidden)

    loss, gradient = value_and_gradient(targets)
    loss_ignored, gradient_ignored = value_and_gradient(jnp.where(weights == 0, ignored, targets))
    assert np.isfinite(loss)
    np.testing.assert_array_equal(loss_ignored, loss)
    np.testing.assert_array_equal(gradient_ignored, gradient)


@pytest.mark.parametrize("wrong", [-1, -100, V])
def test_a_target_that_counts_and_is_no_token_makes_the_loss_nan(wrong: int) -> None:
    head, hidden, targets, weights = make_inputs()
    targets, weights = targets.at[1, 3].set(wrong), weights.at[1, 3].set(1.0)
    assert np.isnan(chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, 5).loss)


def test_the_softmax_of_bfloat16_logits_is_float32() -> None:
    head, hidden, targets, weights = make_inputs(vocab=3000)
    head, hidden = head.astype(jnp.bfloat16), hidden.astype(jnp.bfloat16)
    totals = chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, 5)
    assert [x.dtype for x in totals[:3]] == [jnp.float32] * 3
    expected = plain(lambda h: h @ head, hidden, targets, weights)
    np.testing.assert_allclose(totals[:3], expected[:3], rtol=1e-6)
    gradient = jax.grad(lambda h: chunked_cross_entropy(lambda h: h @ head, h, targets, weights, 5).loss)(hidden)
    assert gradient.dtype == jnp.bfloat16


def test_a_head_that_accumulates_in_float32_is_not_rounded() -> None:
    head, hidden, targets, weights = make_inputs()
    head, hidden = head.astype(jnp.bfloat16), hidden.astype(jnp.bfloat16)
    exact = plain(lambda h: h @ head.astype(jnp.float32), hidden.astype(jnp.float32), targets, weights)

    def accumulating(h: jax.Array) -> jax.Array:
        return jnp.matmul(h, head, preferred_element_type=jnp.float32)

    ours = chunked_cross_entropy(accumulating, hidden, targets, weights, 5)
    np.testing.assert_allclose(ours.loss, exact.loss, rtol=1e-6)


def test_huge_logits_stay_finite() -> None:
    head, hidden, targets, weights = make_inputs()
    totals = chunked_cross_entropy(lambda h: 1e4 * (h @ head), hidden, targets, weights, 5)
    assert np.isfinite(totals.loss)


def test_no_weight_at_all_sums_to_zero() -> None:
    head, hidden, targets, weights = make_inputs()
    totals = chunked_cross_entropy(lambda h: h @ head, hidden, targets, 0 * weights, 5)
    assert totals == Totals(0.0, 0.0, 0.0)


def test_a_chunk_below_one_is_refused() -> None:
    head, hidden, targets, weights = make_inputs()
    with pytest.raises(ValueError, match="chunk=0: the loss cannot be computed over 0 positions"):
        chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, 0)


# What it holds. Long enough that nothing else has as many elements as all the logits.
LENGTH, CHUNK = 64, 8


def sizes(jaxpr: Any) -> Iterator[int]:
    """The number of elements of every array in a jaxpr and in the jaxprs within."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "size"))
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


def gradient_of(function: Callable, *rest: int) -> Callable:
    _, _, targets, weights = make_inputs(LENGTH)

    def loss(head: jax.Array, hidden: jax.Array) -> jax.Array:
        return function(lambda h: h @ head, hidden, targets, weights, *rest).loss

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 3])
def test_the_gradient_never_holds_more_logits_than_one_chunk(length: int) -> None:
    head, hidden, targets, weights = make_inputs(length)

    def loss(head: jax.Array, hidden: jax.Array) -> jax.Array:
        return chunked_cross_entropy(lambda h: h @ head, hidden, targets, weights, CHUNK).loss

    largest = max(sizes(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(head, hidden).jaxpr))
    assert largest == max(B * LENGTH * D, B * CHUNK * V) < B * length * V


@pytest.mark.parametrize(("function", "rest"), [(plain, ()), (chunked_cross_entropy, (LENGTH,))])
def test_the_same_check_finds_the_logits_of_a_loss_in_one_piece(function: Callable, rest: tuple[int, ...]) -> None:
    head, hidden, _, _ = make_inputs(LENGTH)
    assert max(sizes(jax.make_jaxpr(gradient_of(function, *rest))(head, hidden).jaxpr)) >= B * LENGTH * V


def test_the_same_check_finds_residuals_that_a_scan_would_stack() -> None:
    head, hidden, targets, weights = make_inputs(LENGTH)

    def loss(hidden: jax.Array) -> jax.Array:  # the chunked loss without jax.checkpoint
        parts = [jnp.stack(jnp.split(x, LENGTH // CHUNK, axis=1)) for x in (hidden, targets, weights)]
        return jax.lax.scan(lambda s, x: (s + plain(lambda h: h @ head, *x).loss, None), 0.0, tuple(parts))[0]

    assert max(sizes(jax.make_jaxpr(jax.grad(loss))(hidden).jaxpr)) >= B * LENGTH * V


def test_the_compiled_gradient_has_no_room_for_all_logits() -> None:
    head, hidden, _, _ = make_inputs(LENGTH)

    def temporary_bytes(function: Callable, *rest: int) -> int:
        compiled = jax.jit(gradient_of(function, *rest)).lower(head, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 4 * B * LENGTH * V
    assert temporary_bytes(chunked_cross_entropy, CHUNK) < all_logits <= temporary_bytes(plain)


def test_the_loop_is_traced_once_however_long_the_sequence() -> None:
    head, hidden, targets, weights = make_inputs(LENGTH)
    calls = []

    def logits_fn(h: jax.Array) -> jax.Array:
        calls.append(h.shape)
        return h @ head

    chunked_cross_entropy(logits_fn, hidden, targets, weights, 4)
    assert set(calls) == {(B, 4, D)}
    assert len(calls) < LENGTH // 4
