"""Calls of a model outside of JAX transformations."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax
from peftjax.core.errors import UserError
from peftjax.models import from_hf_config
from tests import tiny
from tests.models import test_bert, test_t5


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


def test_adapters_of_other_bases_and_names_and_merges_share_their_programs(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    trained = tiny.randomize(peftjax.attach(tiny.model(), peftjax.Lora(rank=2), rngs=nnx.Rngs(0)))
    paths = [peftjax.save_adapter(trained, tmp_path / base, base=base) for base in ("one", "other")]
    one, other = (peftjax.load_adapter(tiny.model(), path) for path in paths)
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    base = tiny.model()(tokens)
    expected = one(tokens), peftjax.merge(one)(tokens)
    merged = peftjax.merge(peftjax.load_adapter(tiny.model(), paths[1]))
    second = peftjax.load_adapter(other, paths[0], name="second")
    with jax.log_compiles():
        found = peftjax.use(other, "default")(tokens), merged(tokens)
        renamed, idle = peftjax.use(second, "second")(tokens), peftjax.use(second, None)(tokens)
    assert not caplog.records
    np.testing.assert_array_equal((*found, renamed, idle), (*expected, expected[0], base))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "tokens in a list: a model needs an integer array"),
        (jnp.array([1, 2]), r"tokens of shape \[2\] and dtype int32: a model needs an integer array \[B, T\], such as"),
        (np.ones((1, 2, 1), int), r"tokens of shape \[1, 2, 1\]"),
        (jnp.ones((1, 2)), r"tokens of shape \[1, 2\] and dtype float32"),
    ],
)
def test_tokens_that_are_no_rows_of_integers_are_refused_by_every_family(tokens: Any, message: str) -> None:
    decoder, encoder, both = tiny.model(), tiny.make(from_hf_config(test_bert.CONFIG)), test_t5.model()
    right = jnp.ones((1, 2), int)
    for call in (
        decoder,
        encoder,
        partial(both, decoder_tokens=right),
        lambda wrong: both(right, decoder_tokens=wrong),
    ):
        with pytest.raises(UserError, match=message):
            call(tokens)
    with pytest.raises(UserError, match="a model needs"):
        jax.jit(decoder.hidden)(tokens)
