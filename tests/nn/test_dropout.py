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
