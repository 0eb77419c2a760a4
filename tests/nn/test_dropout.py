"""Dropout whose random key is part of the state."""

import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.nn.dropout import Dropout


@pytest.mark.parametrize("rate", [1, 1.0])
def test_rate_one_drops_everything(rate: float) -> None:
    dropout = Dropout(rate)
    dropout.train()
    np.testing.assert_array_equal(dropout(jnp.ones((2, 3, 4))), jnp.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("short", "long"), [((2, 3, 4), (2, 5, 4)), ((2, 3, 4, 5), (2, 3, 7, 6)), ((2, 1, 3, 4, 5), (2, 1, 3, 5, 9))]
)
def test_padding_changes_no_mask(short: tuple[int, ...], long: tuple[int, ...]) -> None:
    dropout = Dropout(0.5)
    dropout.train()
    masks = [np.asarray(dropout(jnp.ones(shape))) for shape in (short, long)]
    np.testing.assert_array_equal(masks[0], masks[1][tuple(map(slice, short))])
    big = np.asarray(dropout(jnp.ones((20, 3, 40, 41)))) > 0
    for axis in range(4):  # all elements are drawn independently
        assert abs(big.mean() - 0.5) < 0.01
        assert abs((big == np.roll(big, 1, axis)).mean() - 0.5) < 0.01
