"""A head that shares the embedding table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny


@pytest.fixture(scope="module")
def tied() -> Any:
    return tiny.model(tie_word_embeddings=True, dtype="bfloat16")


def test_logits_are_products_with_the_rows_of_the_table() -> None:
    model = tiny.model(tie_word_embeddings=True)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, model.config.embed))
    table = model.embed.embedding.get_value()
    np.testing.assert_allclose(model.logits(hidden), jnp.einsum("btd,vd->btv", hidden, table), rtol=1e-5, atol=1e-6)


def test_the_table_gets_the_gradients_of_both_of_its_uses() -> None:
    model = tiny.model(tie_word_embeddings=True)
    graph, table, rest = nnx.split(model, lambda path, _: "embedding" in path, ...)

    def loss(table: nnx.State, by_hand: bool) -> jax.Array:
        merged = nnx.merge(graph, table, rest)
        hidden, _ = merged.hidden(tiny.tokens())
        own = merged.embed.embedding.get_value()
        return jnp.square(jnp.einsum("btd,vd->btv", hidden, own) if by_hand else merged.logits(hidden)).sum()

    ours, expected = (jax.tree.leaves(jax.grad(loss)(table, by_hand)) for by_hand in (False, True))
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-4, atol=1e-4)


def test_the_table_is_not_transposed_in_a_step(tied: Any) -> None:
    """For a transposed table, XLA's CPU backend computes bfloat16 products in float32, in twice the time."""
    hidden = jnp.ones((2, 3, tied.config.embed), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(lambda hidden: tied.logits(hidden).astype(jnp.float32).sum()))(hidden)
    assert "dot_general" in str(program)
    assert "transpose" not in str(program)
