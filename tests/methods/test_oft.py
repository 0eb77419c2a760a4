"""OFT, BOFT and HRA: that they rotate, by the matrices that define them; and what their options refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.adapters import attach, merge
from peftjax.core import variables
from peftjax.methods import Boft, Hra, Oft
from peftjax.methods.boft import butterfly
from peftjax.methods.oft import cayley_less_one, near_divisor, neumann_less_one, projected, skew
from tests.methods.test_contract import run, trainer

pytestmark = pytest.mark.slow


def attached(method: Any) -> Any:
    return attach(tiny.model(), method, rngs=nnx.Rngs(0))


def turned(method: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel of the first query layer before and after a merge of an adapter that has moved."""
    model = tiny.randomize(attached(method), scale=0.3)
    kernel = model.blocks.attention.query.kernel
    before = np.asarray(kernel.get_value()[0])
    merge(model)
    return before, np.asarray(kernel.get_value()[0])


@pytest.mark.parametrize(
    "method",
    [
        Oft(block_size=8, neumann=False, targets=("q_proj",)),
        Oft(block_size=8, share=True, neumann=False, targets=("q_proj",)),
        Hra(rank=4, targets=("q_proj",)),
        Hra(rank=3, gram_schmidt=True, targets=("q_proj",)),
    ],
)
def test_columns_of_the_kernel_keep_their_lengths_and_angles(method: Any) -> None:
    before, after = turned(method)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after.T @ after, before.T @ before, atol=1e-5)


def test_boft_keeps_angles_and_scales_lengths() -> None:
    model = tiny.randomize(attached(Boft(block_size=4, factors=3, targets=("q_proj",))), scale=0.5)
    query = model.blocks.attention.query
    scale = np.asarray(query.adapters.default.scale.get_value()[0])
    before = np.asarray(query.kernel.get_value()[0])
    merge(model)
    after = np.asarray(query.kernel.get_value()[0])
    np.testing.assert_allclose(after.T @ after, np.outer(scale, scale) * (before.T @ before), atol=1e-5)


def test_the_cayley_transform_and_its_sum() -> None:
    q = np.asarray(skew(jnp.array([0.1, -0.2, 0.3]), 3))
    np.testing.assert_allclose(q, np.array([[0, 0.1, -0.2], [-0.1, 0, 0.3], [0.2, -0.3, 0]], np.float32))
    one = np.eye(3)
    np.testing.assert_allclose(cayley_less_one(q) + one, (one - q) @ np.linalg.inv(one + q), atol=1e-6)
    powers = [np.linalg.matrix_power(q, k) for k in range(6)]
    np.testing.assert_allclose(neumann_less_one(q, 2), 2 * powers[1], atol=1e-6)
    np.testing.assert_allclose(neumann_less_one(q, 3), 2 * (powers[1] + powers[2]) + powers[3], atol=1e-6)
    np.testing.assert_allclose(neumann_less_one(q, 4), neumann_less_one(q, 3), atol=0)
    np.testing.assert_allclose(neumann_less_one(q, 6), 2 * sum(powers[1:5]) + powers[5], atol=1e-6)


@pytest.mark.parametrize(
    ("number", "wanted", "expected"), [(40, 32, 40), (40, 6, 5), (12, 5, 4), (96, 32, 32), (8, 99, 8)]
)
def test_a_block_size_that_does_not_divide_becomes_the_nearest_that_does(
    number: int, wanted: int, expected: int
) -> None:
    assert near_divisor(number, wanted) == expected


def test_constrained_training_stays_within_the_bound() -> None:
    method = Oft(block_size=8, constrained=True, eps=0.02, targets=("q_proj", "v_proj"))
    step, state, frozen = trainer(attached(method), method)
    state, _ = run(step, state, frozen, 3)
    for path, leaf in state.trainable.items():
        if path.endswith("packed_rotation"):
            norms = np.sqrt(2 * np.square(leaf).sum(axis=-1))
            assert norms.max() == pytest.approx(0.01, rel=1e-5)  # 0.02 / the root of 4 blocks
            np.testing.assert_allclose(projected(leaf, 0.02), leaf, rtol=1e-6)


def permutation(features: int, size: int, factor: int) -> np.ndarray:
    """P: within every 2^factor blocks, first the even half blocks, then the odd ones."""
    order = []
    for start in range(0, features, 2**factor * size):
        halves = np.arange(start, start + 2**factor * size).reshape(-1, size // 2)
        order += [*halves[0::2].ravel(), *halves[1::2].ravel()]
    return np.eye(features)[order]


@pytest.mark.parametrize("factor", [0, 1, 2])
def test_a_butterfly_factor_is_the_permuted_block_diagonal(factor: int) -> None:
    rng = np.random.default_rng(0)
    x, blocks = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(4, 4, 4)).astype(np.float32)
    diagonal = np.zeros((16, 16), np.float32)
    for index, block in enumerate(blocks):
        diagonal[4 * index : 4 * index + 4, 4 * index : 4 * index + 4] = block
    p = permutation(16, 4, factor)
    np.testing.assert_allclose(butterfly(jnp.array(x), jnp.array(blocks), factor), x @ p @ diagonal @ p.T, atol=1e-5)


def test_boft_drops_a_share_of_the_blocks_of_one_factor() -> None:
    model = tiny.randomize(attached(Boft(block_size=4, factors=2, dropout=0.5, targets=("q_proj",))))
    graph, leaves = variables.flat(model.blocks.attention.query.adapters.default)
    values = {path: leaf.get_value()[0] for path, leaf in leaves.items()}
    counts = set()
    for seed in range(8):
        adapter = variables.join(graph, values | {"dropout.key": jax.random.key_data(jax.random.key(seed))})
        adapter.train()
        kept = np.any(adapter._dropped(adapter.less_one()) != 0, axis=(2, 3))
        counts.add(tuple(kept.sum(axis=1).tolist()))
    assert counts == {(8, 4), (4, 8)}


def test_hra_is_the_product_of_its_reflections() -> None:
    method = Hra(rank=4, targets=("q_proj",))
    model = tiny.randomize(attached(method))
    query = model.blocks.attention.query
    u = np.asarray(query.adapters.default.u.get_value()[1])
    u = u / np.linalg.norm(u, axis=0)
    kernel = np.asarray(query.kernel.get_value()[1])
    product = np.eye(32)
    for column in u.T:
        product = product @ (np.eye(32) - 2 * np.outer(column, column))
    merge(model)
    np.testing.assert_allclose(query.kernel.get_value()[1], product.T @ kernel, atol=1e-5)


def test_hra_with_gram_schmidt_reflects_what_its_vectors_span() -> None:
    model = tiny.randomize(attached(Hra(rank=3, gram_schmidt=True, targets=("q_proj",))))
    query = model.blocks.attention.query
    basis, _ = np.linalg.qr(query.adapters.default.u.get_value()[1])
    kernel = np.asarray(query.kernel.get_value()[1])
    merge(model)
    np.testing.assert_allclose(query.kernel.get_value()[1], kernel - 2 * basis @ (basis.T @ kernel), atol=1e-5)


def test_hra_starts_at_the_base_but_for_rounding() -> None:
    np.testing.assert_allclose(attached(Hra(rank=8))(tiny.tokens()), tiny.model()(tiny.tokens()), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Oft, {"blocks": 4}, "method.block_size=32 and method.blocks=4: set one of them"),
        (Oft, {"block_size": 0}, "method.block_size=0 and method.blocks=0: set one of them"),
        (Oft, {"terms": 1}, "method.terms=1 leaves nothing to train"),
        (Oft, {"block_size": 1}, "method.block_size=1 leaves .* blocks of 1 feature"),
        (Oft, {"eps": 0.0}, "method.eps must be a number above 0"),
        (Oft, {"block_size": 0, "blocks": 32, "targets": ("q_proj",)}, "method.blocks=32 leaves .* blocks of 1 feature"),
        (Boft, {"blocks": 4}, "method.block_size=4 and method.blocks=4: set one of them"),
        (Boft, {"factors": 0}, "method.factors must be a positive integer, got 0"),
        (Boft, {"block_size": 6}, "method.block_size=6 must divide the 32 input features"),
        (Boft, {"block_size": 0, "blocks": 5}, "method.blocks=5 must divide the 32 input features"),
        (Boft, {"factors": 3, "targets": ("down_proj",)}, "method.factors=3 needs .* multiple of 4; .* has 10 blocks of 4"),
        (Hra, {"rank": 0}, "method.rank must be a positive integer, got 0"),
        (Hra, {"rank": 33, "gram_schmidt": True}, "at most 32 reflections can be orthogonal"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(method(**options))
