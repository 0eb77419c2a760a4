"""MiSS's options. What every method promises is in test_contract.py, its files beside peft's in tests/interop."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.adapters import attach
from peftjax.methods import Miss


@pytest.mark.parametrize(("rank", "variant", "mini_rank"), [(6, "balance", 1), (6, "mini", 4), (8, "bat", 1)])
def test_the_kernel_is_changed_shard_by_shard_as_defined(rank: int, variant: str, mini_rank: int) -> None:
    method = Miss(rank=rank, variant=variant, mini_rank=mini_rank, targets=("up_proj",))
    model = tiny.randomize(attach(tiny.model(), method, rngs=nnx.Rngs(0)))
    block = np.asarray(model.blocks.feedforward.up.adapters.default.block.get_value())
    expected = tiny.model()
    kernel = expected.blocks.feedforward.up.kernel
    changed = np.array(kernel.get_value())
    base, (layers, inputs, outputs) = changed.copy(), changed.shape
    for layer in range(layers):
        for i in range(inputs):
            for o in range(outputs):
                if variant == "bat":
                    d, start = block[layer, o // rank], i // rank * rank
                    shard = base[layer, start : start + rank, o]
                    changed[layer, i, o] += shard @ d[:, i % rank] + d[o % rank, i % rank]
                else:
                    changed[layer, i, o] += block[layer, i % rank, o % block.shape[2]]
    kernel.set_value(jnp.array(changed))
    np.testing.assert_allclose(model(tiny.tokens()), expected(tiny.tokens()), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank must be a positive integer, got 0"),
        ({"variant": "bone"}, "method.variant must be one of balance, mini, bat, got 'bone'"),
        ({"rank": 33, "targets": ("q_proj",)}, "method.rank=33 is more than the 32 input features"),
        ({"rank": 6, "variant": "bat", "targets": ("q_proj",)}, "method.rank=6 must divide both sides"),
        (
            {"rank": 8, "variant": "mini", "mini_rank": 3},
            "method.mini_rank=3 must divide the 16 output features of .*k_proj",
        ),
        ({"rank": 8, "dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny.model(), Miss(**options), rngs=nnx.Rngs(0))
