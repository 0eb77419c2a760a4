"""Calls of a model outside of JAX transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax
from tests import tiny


def test_a_call_is_compiled_once_for_all_values_and_equals_one_inside_a_transformation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = peftjax.attach(tiny.model(), peftjax.Lora(rank=2), rngs=nnx.Rngs(0))
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    first = model(tokens)
    nnx.update(model, jax.tree.map(lambda value: value + 0.1, nnx.state(model, peftjax.PeftParam)))
    with jax.log_compiles():
        second = model(tokens)
    assert not caplog.records
    assert not np.allclose(second, first)
    inside = jax.jit(lambda tokens: model(tokens))(tokens)
    np.testing.assert_allclose(second, inside, rtol=1e-6, atol=1e-6)
