"""FourierFT's options. What every method promises: test_contract.py."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.adapters import attach
from peftjax.adapters.adapter import over_layers
from peftjax.adapters.sites import Site
from peftjax.methods import FourierFT
from peftjax.methods.fourierft import LARGEST, places

pytestmark = pytest.mark.slow


def attached(**options: Any) -> Any:
    return attach(tiny.model(), FourierFT(**options), rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("size", "seed", "expected"),
    [
        (512, 777, [103, 385, 303, 39, 411, 421]),
        (16777216, 777, [1374311, 8240085, 6766295, 6474818]),
        (1000, 1099511627779, [986, 114, 871, 894, 140]),
        (3, 0, [2, 0, 1]),
    ],
)
def test_places_are_those_of_torchs_randperm(size: int, seed: int, expected: list[int]) -> None:
    assert places(size, len(expected), seed).tolist() == expected


def test_places_are_a_permutation() -> None:
    assert sorted(places(96, 96, 3).tolist()) == list(range(96))


def test_the_update_is_the_inverse_transform_of_the_spectrum() -> None:
    adapter = attached(n_frequency=4, scaling=20.0, targets=("v_proj",)).blocks.attention.value.adapters.default
    spectrum, found = np.asarray(adapter.spectrum.get_value()), places(32 * 16, 4, 777)
    dense = np.zeros((16, 32))  # [out, in]
    dense[found // 32, found % 32] = spectrum[1]
    deltas = over_layers(adapter, lambda one: one.delta())
    np.testing.assert_allclose(deltas[1], np.fft.ifft2(dense).real.T * 20, atol=1e-6)


def test_zero_coefficients_change_nothing_at_the_start() -> None:
    model = attached(n_frequency=4, init_weights=True)
    np.testing.assert_array_equal(model(tiny.tokens()), tiny.model()(tiny.tokens()))


def test_of_two_patterns_an_ending_goes_before_the_exact_name() -> None:
    name = "model.layers.1.self_attn.v_proj"
    pattern = ((name, 3), ("v_proj", 2), ("layers.2.self_attn.v_proj", 5))
    model = attached(n_frequency=4, targets=("v_proj",), n_frequency_pattern=pattern)
    assert model.blocks.attention.value.adapters.default.counts == (2, 2, 2)
    model = attached(n_frequency=4, targets=("v_proj",), n_frequency_pattern=pattern[::2])
    assert model.blocks.attention.value.adapters.default.counts == (4, 3, 5)


def test_a_layer_whose_places_torch_draws_in_another_way_is_refused() -> None:
    layer = type("Layer", (), {"in_features": LARGEST, "out_features": 1, "axes": (None, None)})
    site = Site("wide", layer, ("wide",), (), None)
    with pytest.raises(ValueError, match=f"method.targets: wide has {LARGEST} weights"):
        FourierFT().adapter(site, np.array([True]), nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frequency": 0}, "method.n_frequency must be a positive integer, got 0"),
        ({"n_frequency_pattern": {"q_proj": 2.5}}, "method.n_frequency must be a positive integer, got 2.5"),
        ({"scaling": 0.0}, "method.scaling must be a number above 0, got 0.0"),
        ({"random_loc_seed": -1}, r"method.random_loc_seed must be an integer from 0 to 2\*\*64 - 1, got -1"),
        ({"n_frequency": 1000}, "method.n_frequency=1000 is more than the 512 weights of model.layers.0.self_attn.k_proj"),
        ({"n_frequency": 9, "n_frequency_pattern": {"q_porj": 2}}, "method.n_frequency_pattern: 'q_porj' matches no target"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(**options)
