"""A head that shares the embedding table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_products_with_the_rows_of_the_table(dtype: str) -> None:
    model = tiny.model(tie_word_embeddings=True, dtype=dtype)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, model.config.embed), dtype)
    table = model.embed.embedding.get_value().astype(dtype)
    expected = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    logits = model.logits(hidden)
    assert logits.dtype == dtype
    np.testing.assert_allclose(
        logits.astype(jnp.float32), expected, rtol=2**-8 if dtype == "bfloat16" else 1e-5, atol=1e-5
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_gets_the_gradients_of_both_of_its_uses(dtype: str) -> None:
    model = tiny.model(tie_word_embeddings=True, dtype=dtype)
    graph, table, rest = nnx.split(model, lambda path, _: "embedding" in path, ...)

    def loss(table: nnx.State, by_hand: bool) -> jax.Array:
        merged = nnx.merge(graph, table, rest)
        hidden, _ = merged.hidden(tiny.tokens())
        own = merged.embed.embedding.get_value().astype(dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, own) if by_hand else merged.logits(hidden)
        return jnp.square(logits.astype(jnp.float32)).sum()

    ours, expected = (jax.tree.leaves(jax.grad(loss)(table, by_hand))[0] for by_hand in (False, True))
    assert ours.dtype == jax.tree.leaves(table)[0].dtype
    np.testing.assert_allclose(
        ours, expected, rtol=0, atol=(0.02 if dtype == "bfloat16" else 1e-5) * np.abs(expected).max()
    )


def test_a_bfloat16_table_is_not_transposed_in_a_step() -> None:
    """XLA's CPU backend would compute both products in float32, in twice the time."""
    tied = tiny.model(tie_word_embeddings=True, dtype="bfloat16")
    hidden = jnp.ones((2, 3, tied.config.embed), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(lambda hidden: tied.logits(hidden).astype(jnp.float32).sum()))(hidden)
    assert "dot_general" in str(program)
    assert "transpose" not in str(program)
