"""The options of LoHa and LoKr. What every method promises: test_contract.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.adapters import attach
from peftjax.adapters.lycoris import UpdateDropout
from peftjax.methods import LoHa, LoKr
from peftjax.methods.lokr import factors
from peftjax.nn.dropout import with_dropout_keys

pytestmark = pytest.mark.slow


def attached(method: Any) -> Any:
    return attach(tiny.model(), method, rngs=nnx.Rngs(1))


def dropped(seed: int, **options: Any) -> np.ndarray:
    """Ones [4, 1000] as an update in training."""
    dropout = UpdateDropout(**{"outputs": 0.0, "whole": 0.0, "rescale": False, "stack": ()} | options)
    dropout.train()
    for one in (dropout.outputs, dropout.whole):
        if one.key is not None:
            tree = with_dropout_keys({"key": one.key.get_value()}, ("key",), jax.random.key(seed))
            one.key.set_value(tree["key"])
    return np.asarray(dropout(jnp.ones((4, 1000), jnp.float32)))


def test_rank_dropout_drops_outputs_of_the_whole_batch() -> None:
    y = dropped(0, outputs=0.25)
    assert set(np.unique(y)) == {0.0, 1.0}
    assert y.mean() == pytest.approx(0.75, abs=0.05)
    assert np.all(y == y[:1])


def test_rank_dropout_may_be_made_up_for() -> None:
    y = dropped(0, outputs=0.25, rescale=True)
    assert y.mean() == pytest.approx(1, abs=1e-5)
    assert len(np.unique(y)) == 2


def test_module_dropout_drops_all_or_nothing() -> None:
    means = [dropped(seed, whole=0.5).mean() for seed in range(40)]
    assert set(means) == {0.0, 1.0}
    assert 10 <= sum(means) <= 30


def test_evaluation_drops_nothing() -> None:
    dropout = UpdateDropout(0.9, 0.9, rescale=True, stack=())
    np.testing.assert_array_equal(dropout(jnp.ones((2, 8))), np.ones((2, 8)))


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (12, -1, (3, 4)), (1, -1, (1, 1)),
        (128, 4, (4, 32)), (40, 8, (8, 5)), (40, 7, (5, 8)), (40, 3, (2, 20)), (12, 5, (3, 4)),
    ],
)  # fmt: skip
def test_sides_are_split_by_the_factor_or_the_divisor_nearest_the_root(
    size: int, factor: int, expected: tuple[int, int]
) -> None:
    assert factors(size, factor) == expected


def test_ranks_and_alphas_by_pattern_are_each_layers_own() -> None:
    options = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {r"layers\.[12]\..*": 6}}
    adapter = attached(LoHa(rank=4, alpha=8, targets=("q_proj",), **options)).blocks.attention.query.adapters.default
    assert adapter.ranks == (2, 4, 4)
    np.testing.assert_allclose(adapter.scale.get_value(), [8 / 2, 6 / 4, 6 / 4])
    assert np.abs(adapter.b1.get_value()[0, 2:]).max() == 0


@pytest.mark.parametrize("kind", [LoHa, LoKr])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank must be a positive integer, got 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "method.rank must be a positive integer, got 1.5"),
        ({"alpha": 0}, "method.alpha must be a number above 0, got 0"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "method.alpha must be a number above 0, got -1.0"),
        ({"rank_dropout": 1.0}, "method.rank_dropout must be at least 0 and below 1, got 1.0"),
        ({"module_dropout": -0.1}, "method.module_dropout must be at least 0 and below 1, got -0.1"),
        ({"rank_pattern": {"q_porj": 2}}, "method.rank_pattern: 'q_porj' matches no target. Did you mean 'q_proj'"),
        ({"alpha_pattern": {"q_porj": 2}}, "method.alpha_pattern: 'q_porj' matches no target. Did you mean 'q_proj'"),
    ],
)
def test_options_that_mean_nothing_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(kind(**options))


def test_a_rank_of_loha_larger_than_the_matrix_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"method.rank=17 exceeds the smaller dimension .16. of .*v_proj; use at most 16"
    ):
        attached(LoHa(targets=("v_proj",), rank_pattern={"v_proj": 17}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decompose_factor": 0}, "method.decompose_factor must be -1 or a positive integer, got 0"),
        (
            {"rank": 2, "targets": ("q_proj",), "rank_pattern": {"layers.1.self_attn.q_proj": 4}},
            r"method.rank_pattern: ranks \[2, 4\] for the layers of q_proj make .* choose ranks on one side of 4$",
        ),
    ],
)
def test_what_lokr_cannot_factor_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(LoKr(**options))
