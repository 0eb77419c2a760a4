"""Schedules in closed form, optimizers against their papers' equations, frozen leaves and decay masks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftjax.core.errors import UserError
from peftjax.training import config as configuration
from peftjax.training.optim import (
    CUSTOM,
    OPTIMIZERS,
    SCHEDULES,
    OptimConfig,
    decay_mask,
    make_optimizer,
    make_schedule,
)

FROZEN = optax.MaskedNode()


def make_config(**changes: Any) -> OptimConfig:
    """The default configuration with a constant rate, no clip and the given changes."""
    return OptimConfig(**({"learning_rate": 0.01, "schedule": "constant", "b2": 0.99, "clip_norm": 0.0} | changes))


def make_tree(seed: int = 0, dtype: jnp.dtype = jnp.float32) -> dict[str, Any]:
    """Two trained leaves of 30 and 5 elements between frozen ones."""
    rng = np.random.default_rng(seed)
    return {
        "blocks.kernel": FROZEN,
        "blocks.lora.a": jnp.asarray(rng.normal(size=(2, 5, 3)), dtype),
        "norm.scale": jnp.asarray(rng.normal(size=5), dtype),
        "tail": FROZEN,
    }


MASK = {"blocks.kernel": FROZEN, "blocks.lora.a": True, "norm.scale": False, "tail": FROZEN}
TRAINED = ("blocks.lora.a", "norm.scale")


def run(config: OptimConfig, steps: int = 5) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The parameters after `steps` updates, and the gradients they were made from."""
    params, gradients = make_tree(), [make_tree(seed) for seed in range(1, steps + 1)]
    tx = make_optimizer(config, steps, MASK)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    trained = [{name: np.asarray(tree[name], np.float64) for name in TRAINED} for tree in (params, *gradients)]
    return trained[0], trained[1:]


def elements(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


# Schedules.


def test_constant_keeps_the_rate_from_the_first_step_to_the_last() -> None:
    schedule = make_schedule(make_config(learning_rate=0.3), 100)
    assert [float(schedule(step)) for step in (0, 50, 99, 100)] == pytest.approx([0.3] * 4)


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [
        ("constant", 0.3, 0.3),
        ("linear", 0.3 * (0.1 + 0.9 * 0.75), 0.03),
        ("cosine", 0.3 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), 0.03),
    ],
)
def test_each_shape_has_its_closed_form(name: str, middle: float, end: float) -> None:
    config = make_config(learning_rate=0.3, schedule=name, warmup_steps=20, final_fraction=0.1)
    schedule = make_schedule(config, 100)
    rates = [float(schedule(step)) for step in (0, 1, 10, 20, 40, 100, 1000)]
    assert rates == pytest.approx([0.0, 0.015, 0.15, 0.3, middle, end, end], rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_rate_ends_at_exactly_zero_and_the_last_update_still_has_one(name: str) -> None:
    schedule = make_schedule(make_config(schedule=name), 50)
    assert schedule(50) == 0
    assert schedule(49) > 0
    assert schedule(0) == np.float32(0.01)


def test_a_warmup_may_take_the_whole_run() -> None:
    schedule = make_schedule(make_config(schedule="cosine", warmup_steps=4, learning_rate=1.0), 4)
    assert [float(schedule(step)) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]


def test_a_traced_step_gives_the_same_float32_rate() -> None:
    schedule = make_schedule(make_config(schedule="cosine", warmup_steps=3), 10)
    for step in range(11):
        assert float(jax.jit(schedule)(jnp.int32(step))) == pytest.approx(float(schedule(step)), rel=1e-6)
        assert schedule(step).dtype == jnp.float32


def test_the_optimizer_uses_the_rate_of_its_update_number() -> None:
    config = make_config(name="sgd", momentum=0.0, schedule="linear", warmup_steps=2, final_fraction=0.5)
    schedule, tx = make_schedule(config, 6), make_optimizer(config, 6, MASK)
    params = make_tree()
    gradient = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update(gradient, state, params)
        np.testing.assert_allclose(updates["norm.scale"], -schedule(step), rtol=1e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_whose_rate_is_an_argument_has_the_same_bits_and_is_compiled_once(name: str) -> None:
    steps = 7
    for schedule in SCHEDULES:

        @jax.jit
        def shared(peak: jax.Array, *arguments: Any, schedule: str = schedule) -> Any:
            return make_optimizer(config(1.0, schedule), steps, MASK, peak).update(*arguments)

        def config(rate: float, schedule: str = schedule) -> OptimConfig:
            fields = {"weight_decay": 0.1, "clip_norm": 0.3, "warmup_steps": 2, "final_fraction": 0.07}
            return make_config(name=name, schedule=schedule, learning_rate=rate, **fields)

        for rate in (0.03, 7e-4):
            tx, params = make_optimizer(config(rate), steps, MASK), make_tree()
            fixed, state = jax.jit(tx.update), tx.init(params)
            for seed in range(1, steps + 1):
                updates, after = fixed(make_tree(seed), state, params)
                jax.tree.map(
                    np.testing.assert_array_equal, shared(rate, make_tree(seed), state, params), (updates, after)
                )
                params, state = optax.apply_updates(params, updates), after
        assert shared._cache_size() == 1


# Optimizers against their equations, in float64.


def test_adamw_follows_its_equations() -> None:
    config = make_config(weight_decay=0.1, b2=0.95, eps=1e-3)
    ours, gradients = run(config)
    for name, decay in zip(TRAINED, (0.1, 0.0), strict=True):
        p, m, v = np.asarray(make_tree()[name], np.float64), 0.0, 0.0
        for t, gradient in enumerate(gradients, start=1):
            m = 0.9 * m + 0.1 * gradient[name]
            v = 0.95 * v + 0.05 * gradient[name] ** 2
            p = p - 0.01 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3) + decay * p)
        np.testing.assert_allclose(ours[name], p, rtol=1e-5, atol=1e-6)


def test_lion_follows_its_equations() -> None:
    ours, gradients = run(make_config(name="lion", weight_decay=0.1, b1=0.8, b2=0.7))
    for name, decay in zip(TRAINED, (0.1, 0.0), strict=True):
        p, m = np.asarray(make_tree()[name], np.float64), 0.0
        for gradient in gradients:
            p = p - 0.01 * (np.sign(0.8 * m + 0.2 * gradient[name]) + decay * p)
            m = 0.7 * m + 0.3 * gradient[name]
        np.testing.assert_allclose(ours[name], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_follows_its_equations(momentum: float) -> None:
    ours, gradients = run(make_config(name="sgd", weight_decay=0.1, momentum=momentum))
    for name, decay in zip(TRAINED, (0.1, 0.0), strict=True):
        p, m = np.asarray(make_tree()[name], np.float64), 0.0
        for gradient in gradients:
            m = momentum * m + gradient[name]
            p = p - 0.01 * (m + decay * p)
        np.testing.assert_allclose(ours[name], p, rtol=1e-5, atol=1e-6)


def rms_clipped(update: np.ndarray) -> np.ndarray:
    return update / max(1.0, math.sqrt(np.mean(update**2)))


def test_adafactor_follows_its_equations_where_it_does_not_factor() -> None:
    ours, gradients = run(make_config(name="adafactor", weight_decay=0.1))
    for name, decay in zip(TRAINED, (0.1, 0.0), strict=True):
        p, v = np.asarray(make_tree()[name], np.float64), 0.0
        for t, gradient in enumerate(gradients, start=1):
            c = 1 - t**-0.8
            v = c * v + (1 - c) * gradient[name] ** 2
            p = p - 0.01 * (rms_clipped(gradient[name] / np.sqrt(v)) + decay * p)
        np.testing.assert_allclose(ours[name], p, rtol=1e-5, atol=1e-6)


def test_adafactor_factors_a_large_matrix_into_rows_and_columns() -> None:
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(128, 160)), jnp.float32)}
    tx = make_optimizer(make_config(name="adafactor"), 4, {"kernel": True})
    state = tx.init(params)
    assert elements(state) == 128 + 160 + 3  # a placeholder, and two counters
    p, rows, columns = np.asarray(params["kernel"], np.float64), 0.0, 0.0
    for t in range(1, 5):
        gradient = rng.normal(size=(128, 160)) * rng.uniform(0.1, 2, size=(128, 1))
        updates, state = tx.update({"kernel": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        c = 1 - t**-0.8
        rows = c * rows + (1 - c) * np.mean(gradient**2, axis=1, keepdims=True)
        columns = c * columns + (1 - c) * np.mean(gradient**2, axis=0, keepdims=True)
        p = p - 0.01 * rms_clipped(gradient / np.sqrt(rows * columns / np.mean(rows)))
    np.testing.assert_allclose(params["kernel"], p, rtol=1e-4, atol=1e-5)


def test_the_clip_scales_all_gradients_by_one_norm() -> None:
    gradient, tx = make_tree(1), make_optimizer(make_config(name="sgd", momentum=0.0, clip_norm=0.5), 1, MASK)
    norm = math.sqrt(sum(float(jnp.sum(gradient[name] ** 2)) for name in TRAINED))
    assert norm > 0.5
    for factor, scale in ((1.0, 0.5 / norm), (0.4 / norm, 0.4 / norm)):  # above and below the clip
        given = jax.tree.map(lambda g, factor=factor: factor * g, gradient)
        updates, _ = tx.update(given, tx.init(make_tree()), make_tree())
        for name in TRAINED:
            np.testing.assert_allclose(updates[name], -0.01 * scale * gradient[name], rtol=1e-5)


# Frozen leaves, decay, dtypes.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "adamw"}, 2 * 35 + 2),  # two moments; the counters of Adam and of the schedule
        ({"name": "lion"}, 35 + 2),
        ({"name": "sgd"}, 35 + 1),
        ({"name": "sgd", "momentum": 0.0}, 1),
        ({"name": "adafactor"}, 35 + 2 * 2 + 2),  # and two placeholders a leaf
    ],
)
def test_only_trained_leaves_have_optimizer_state(changes: dict[str, Any], expected: int) -> None:
    tx = make_optimizer(make_config(**changes, weight_decay=0.1, clip_norm=1.0), 10, MASK)
    assert elements(tx.init(make_tree())) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_change_nothing_and_are_not_changed(name: str) -> None:
    config = make_config(name=name, weight_decay=0.1, clip_norm=0.5, schedule="cosine")
    whole = make_tree()
    bare = {path: whole[path] for path in TRAINED}
    tx, tx_bare = make_optimizer(config, 3, MASK), make_optimizer(config, 3, {path: MASK[path] for path in TRAINED})
    state, state_bare = tx.init(whole), tx_bare.init(bare)
    step, step_bare = jax.jit(tx.update), jax.jit(tx_bare.update)
    for seed in range(1, 4):
        gradient = make_tree(seed)
        updates, state = step(gradient, state, whole)
        updates_bare, state_bare = step_bare({path: gradient[path] for path in TRAINED}, state_bare, bare)
        whole, bare = optax.apply_updates(whole, updates), optax.apply_updates(bare, updates_bare)
    assert whole["blocks.kernel"] == whole["tail"] == FROZEN
    assert list(whole) == list(make_tree())
    for path in TRAINED:
        np.testing.assert_array_equal(whole[path], bare[path])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_the_learning_rate_times_the_parameter_where_the_mask_says_so(name: str) -> None:
    config = make_config(name=name, weight_decay=0.1, clip_norm=1.0)
    tx, params = make_optimizer(config, 1, MASK), make_tree()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["blocks.lora.a"], -0.01 * 0.1 * params["blocks.lora.a"], rtol=1e-6)
    np.testing.assert_array_equal(updates["norm.scale"], 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_parameters_have_float32_state_and_updates(name: str) -> None:
    params, tx = make_tree(dtype=jnp.bfloat16), make_optimizer(make_config(name=name, weight_decay=0.1), 2, MASK)
    state = tx.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    updates, after = tx.update(make_tree(1, jnp.bfloat16), state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.apply_updates(params, updates))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_a_momentum_kept_in_bfloat16_moves_the_update_by_its_rounding_alone(name: str) -> None:
    params, updates = make_tree(), {}
    for dtype in ("float32", "bfloat16"):
        tx = make_optimizer(make_config(name=name, momentum_dtype=dtype), 3, MASK)
        state = tx.init(params)
        for _ in range(3):
            updates[dtype], state = tx.update(make_tree(1), state, params)
        kept = {
            leaf.dtype
            for path, leaf in jax.tree.leaves_with_path(state)
            if leaf.ndim and ".nu" not in jax.tree_util.keystr(path)
        }
        assert kept == {jnp.dtype(dtype)}
    for path in TRAINED:
        np.testing.assert_allclose(updates["bfloat16"][path], updates["float32"][path], rtol=2**-7)


def test_the_second_moment_of_bfloat16_gradients_keeps_moving() -> None:
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    tx = make_optimizer(make_config(b2=0.999), 100, {"kernel": True})
    state = tx.init(params)
    for _ in range(100):
        _, state = tx.update({"kernel": jnp.ones((4, 4), jnp.bfloat16)}, state, params)
    nu = next(leaf for path, leaf in jax.tree.leaves_with_path(state) if ".nu" in jax.tree_util.keystr(path))
    np.testing.assert_allclose(nu, 1 - 0.999**100, rtol=1e-4)


def test_the_state_of_an_abstract_tree_is_known_without_arrays() -> None:
    tx = make_optimizer(make_config(), 10, MASK)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_tree())
    assert elements(jax.eval_shape(tx.init, abstract)) == 2 * 35 + 2


def test_decay_meets_matrices_only_and_stacked_layers_are_no_dimension() -> None:
    shapes_axes = {
        "embed.embedding": ((7, 4), ("vocab", "embed")),
        "blocks.query.kernel": ((3, 4, 4), ("layers", "embed", "heads")),
        "blocks.query.bias": ((3, 4), ("layers", "heads")),
        "blocks.query.adapters.default.a": ((3, 4, 2), ("layers", "embed", "rank")),
        "blocks.norm.scale": ((3, 4), ("layers", "embed")),
        "norm.scale": ((4,), ("embed",)),
        "gate": ((), ()),
        "blocks.gate": ((3,), ("layers",)),
        "blocks.router.kernel": ((3, 4, 2), ("layers", "embed", "expert")),
        "blocks.experts.kernel": ((3, 2, 4, 4), ("layers", "expert", "embed", "mlp")),
        "blocks.experts.bias": ((3, 2, 4), ("layers", "expert", "mlp")),
        "blocks.experts.adapters.default.lambda_d": ((3, 2, 2, 5), ("layers", "expert", "part", "rank")),
    }
    trainable = {path: jnp.zeros(shape) for path, (shape, _) in shapes_axes.items()} | {"frozen": FROZEN}
    axes = {path: axes for path, (_, axes) in shapes_axes.items()} | {"frozen": ("embed", "mlp")}
    mask = decay_mask(trainable, axes)
    assert mask.pop("frozen") == FROZEN
    assert mask == {
        "embed.embedding": True,
        "blocks.query.kernel": True,
        "blocks.query.bias": False,
        "blocks.query.adapters.default.a": True,
        "blocks.norm.scale": False,
        "norm.scale": False,
        "gate": False,
        "blocks.gate": False,
        "blocks.router.kernel": True,
        "blocks.experts.kernel": True,
        "blocks.experts.bias": False,
        "blocks.experts.adapters.default.lambda_d": False,
    }


# User mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, r"optim.name='adam' must be one of .*Did you mean 'adamw'"),
        ({"schedule": "cosin"}, r"optim.schedule='cosin' must be one of .*Did you mean 'cosine'"),
        ({"warmup_steps": 101}, r"optim.warmup_steps=101 must be at most train.steps=100"),
        ({"warmup_steps": -1}, r"optim.warmup_steps=-1 must be at least 0"),
        ({"b2": 1.0}, r"optim.b2=1 must be less than 1"),
        ({"momentum": 1.0}, r"optim.momentum=1 must be less than 1"),
        ({"eps": 0.0}, r"optim.eps=0 must be more than 0"),
    ],
)
def test_a_value_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.validate({"optim": changes, "train": {"steps": 100}})


def test_the_config_offers_exactly_what_there_is() -> None:
    assert configuration.SCHEMA.fields["optim.name"].choices == (*OPTIMIZERS, CUSTOM)
    assert configuration.SCHEMA.fields["optim.schedule"].choices == SCHEDULES
