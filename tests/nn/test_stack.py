"""What the backward pass keeps is a matter of memory alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peftjax import adapters, methods
from peftjax.core import variables
from tests import tiny

TOKENS = jnp.arange(48).reshape(2, 24)


@functools.cache
def gradients(remat: str) -> tuple[dict[str, np.ndarray], Any]:
    """Of a LoRA, and what the compiled program needs."""
    model = adapters.attach(tiny.model(remat=remat), methods.Lora(rank=2), name="default", rngs=nnx.Rngs(0))
    model = tiny.randomize(model)
    graph, trainable, frozen = variables.split_by_kind(model)

    def loss(trainable: Any, frozen: Any) -> jax.Array:
        return jnp.mean(jnp.square(variables.join(graph, trainable, frozen)(TOKENS)))

    program = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
    return jax.tree.map(np.asarray, program(trainable, frozen)), program.memory_analysis()


@pytest.mark.slow_cases
@pytest.mark.parametrize("remat", ["dots", "block", "offload"])
def test_gradients_are_the_same_whatever_is_kept_for_the_backward_pass(remat: str) -> None:
    for path, expected in gradients("none")[0].items():
        np.testing.assert_allclose(gradients(remat)[0][path], expected, atol=1e-6, rtol=1e-4, err_msg=path)


def test_each_kind_of_remat_keeps_less_than_the_one_before() -> None:
    none, dots, block = (gradients(remat)[1].temp_size_in_bytes for remat in ("none", "dots", "block"))
    assert none > dots > block
