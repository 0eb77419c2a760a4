"""Adapters made of adapters. That peft makes the same of them: tests/interop/test_combine.py."""

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, methods
from peftjax.adapters import attach, provenance, use
from peftjax.adapters.adapter import over_layers
from peftjax.adapters.registry import BaseName, active
from peftjax.adapters.sites import adapters_named
from peftjax.core import variables
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.methods import Lora
from peftjax.methods.lora.combine import combine
from peftjax.methods.lora.mix import SPARSE, WAYS

pytestmark = pytest.mark.slow

E, KV = 32, 16  # embed, kv heads * head dim
SAME = {"rank": 4, "alpha": 6.0, "targets": ("q_proj", "embed_tokens")}
WEIGHTS = (0.7, -1.2)


def model_with(*options: dict[str, Any]) -> Any:
    """A model with adapters `first`, `second`, ... of these options, as if they had been trained."""
    model = tiny.model()
    for index, (name, option) in enumerate(zip(("first", "second", "third"), options, strict=False)):
        attach(model, Lora(**option), name, rngs=nnx.Rngs(index))
    return tiny.randomize(model)


def deltas(model: Any, name: str) -> dict[str, np.ndarray]:
    """What the adapters called `name` add to the kernels, [*stack, in, out], by path."""
    return {
        site.path: np.asarray(over_layers(one, lambda one: one.delta())) for site, one in adapters_named(model, name)
    }


def query(model: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A [L, in, R] and B [L, R, out] of the queries."""
    adapter = model.blocks.attention.query.adapters.adapter(name)
    return np.asarray(adapter.a.get_value()), np.asarray(adapter.b.get_value())


def masks(layer: str, adapter: str, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = sum(map(ord, layer + adapter + leaf))
    return np.random.default_rng(seed).random(shape) < 0.5


def options_of(how: str) -> dict[str, Any]:
    return {"how": how} | ({"density": 0.5} if how in SPARSE else {})


# --- What each way makes ---


DIFFERENT = (
    {"rank": 4, "alpha": 6.0, "targets": ("q_proj", "v_proj", "embed_tokens")},
    {"rank": 3, "targets": ("q_proj", "down_proj"), "rslora": True, "exclude": ("layers.1.self_attn.q_proj",)},
    {"rank": 2, "init": "pissa", "targets": ("q_proj",), "rank_pattern": {"layers.2.self_attn.q_proj": 1}},
)


@pytest.mark.parametrize("options", [{"how": "cat"}, {"how": "svd", "rank": 40}])
def test_cat_and_an_svd_of_enough_rank_are_the_weighted_sum_of_the_updates(options: dict[str, Any]) -> None:
    model = model_with(*DIFFERENT)
    weights = (0.7, -1.2, 0.4)
    expected: dict[str, np.ndarray] = {}
    for name, weight in zip(("first", "second", "third"), weights, strict=True):
        for path, delta in deltas(model, name).items():
            expected[path] = expected.get(path, 0) + weight * delta
    found = deltas(combine(model, ("first", "second", "third"), weights, **options), "combined")
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        np.testing.assert_allclose(delta, expected[path], atol=1e-5, err_msg=path)
    # of pissa's twice the rank, and not more than the sum of the ranks
    assert model.blocks.attention.query.adapters.combined.ranks == (4 + 3 + 4, 4 + 4, 4 + 3 + 2)


def test_svd_is_the_best_approximation_of_its_rank() -> None:
    model = model_with(*DIFFERENT)
    sums = deltas(combine(model, ("first", "second"), WEIGHTS, how="cat", name="whole"), "whole")
    found = deltas(combine(model, ("first", "second"), WEIGHTS, how="svd", rank=3), "combined")
    for path, delta in found.items():
        u, values, vt = np.linalg.svd(sums[path], full_matrices=False)
        best = np.matmul(u[..., :3] * values[..., None, :3], vt[..., :3, :])
        np.testing.assert_allclose(delta, best, atol=1e-5, err_msg=path)


def test_the_svd_ways_take_the_largest_rank_when_none_is_given() -> None:
    model = combine(model_with(*DIFFERENT), ("first", "second"), WEIGHTS, how="magnitude_prune_svd", density=0.5)
    assert model.blocks.attention.query.adapters.combined.ranks == (4, 4, 4)


def test_linear_shares_each_weight_between_a_and_b_and_its_sign_goes_to_a() -> None:
    model = combine(model_with(SAME, SAME), ("first", "second"), WEIGHTS)
    (a1, b1), (a2, b2), (a, b) = (query(model, name) for name in ("first", "second", "combined"))
    one, two = (0.7 * 1.5) ** 0.5, (1.2 * 1.5) ** 0.5
    np.testing.assert_allclose(a, one * a1 - two * a2, atol=1e-6)
    np.testing.assert_allclose(b, one * b1 + two * b2, atol=1e-6)


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_of_a_single_adapter_the_dense_ways_make_its_multiple(how: str, weight: float) -> None:
    model = model_with(SAME)
    expected = deltas(model, "first")
    for path, delta in deltas(combine(model, ["first"], [weight], how=how), "combined").items():
        np.testing.assert_allclose(delta, weight * expected[path], atol=1e-5, err_msg=path)


def test_magnitude_prune_keeps_the_largest_entries() -> None:
    model = combine(model_with(SAME), ["first"], [1 / 1.5], how="magnitude_prune", density=0.3)
    for given, kept in zip(query(model, "first"), query(model, "combined"), strict=True):
        for layer in range(3):
            chosen = kept[layer] != 0
            assert chosen.sum() == int(0.3 * chosen.size)
            np.testing.assert_allclose(kept[layer][chosen], given[layer][chosen], rtol=1e-5)
            assert np.abs(given[layer][chosen]).min() > np.abs(given[layer][~chosen]).max()


@pytest.mark.parametrize(
    ("majority_sign", "expected"),
    [
        # 3, 1 and 2 of three adapters with weights 1, 2 and 4; -3 and 1, 1; 1 and -2, 0; 0, 0, 0; 2, -2, 0
        ("total", [(3 + 2 + 8) / 3, -3, -8, 0, 2]),
        ("frequency", [(3 + 2 + 8) / 3, (2 + 4) / 2, 1, 0, 2]),
    ],
)
def test_ties_takes_the_mean_of_those_that_have_the_elected_sign(majority_sign: str, expected: list[float]) -> None:
    model = model_with(SAME, SAME, SAME)
    columns = ([3, -3, 1, 0, 2], [1, 1, 0, 0, -2], [2, 1, -2, 0, 0])
    for name, column in zip(("first", "second", "third"), columns, strict=True):
        adapter = model.blocks.attention.query.adapters.adapter(name)
        adapter.a.set_value(jnp.zeros((3, E, 4)).at[:, :5, 0].set(jnp.array(column, jnp.float32)))
    weights = [1 / 1.5, 4 / 1.5, 16 / 1.5]  # whose roots, times those of the scale, are 1, 2 and 4
    combine(model, ["first", "second", "third"], weights, how="ties", density=1.0, majority_sign=majority_sign)
    a, _ = query(model, "combined")
    np.testing.assert_allclose(a[:, :5, 0], [expected] * 3, rtol=1e-6)
    assert not a[:, 5:].any()
    assert not a[:, :, 1:].any()


def test_dare_keeps_a_random_share_and_scales_it_up() -> None:
    model = model_with(SAME)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        combine(model, ["first"], [1 / 1.5], how="dare_linear", density=0.25, name=name, seed=seed)
    given, one = query(model, "first")[0], query(model, "one")[0]
    kept = one != 0
    assert kept.mean() == pytest.approx(0.25, abs=0.08)
    np.testing.assert_allclose(one[kept], 4 * given[kept], rtol=1e-5)
    np.testing.assert_array_equal(one, query(model, "again")[0])
    assert (one != query(model, "other")[0]).any()
    assert (kept[0] != kept[1]).any()


@pytest.mark.parametrize("how", ["dare_linear", "dare_linear_svd"])
def test_dare_takes_the_masks_that_it_is_given(how: str) -> None:
    asked: list[tuple[str, str, str, tuple[int, ...]]] = []

    def draw(*what: Any) -> np.ndarray:
        asked.append(what)
        return masks(*what)

    given = {"rank": 4, "targets": ("q_proj", "v_proj"), "layers_to_transform": (1,)}
    model = combine(model_with(given, given), ("first", "second"), WEIGHTS, how=how, density=0.5, draw=draw)
    shapes = {"a": (E, 4), "b": (4, E), "kernel": (E, E)}
    queries = {what[1:] for what in asked if what[0] == "model.layers.1.self_attn.q_proj"}
    leaves = ("kernel",) if how.endswith("svd") else ("a", "b")
    assert queries == {(name, leaf, shapes[leaf]) for leaf in leaves for name in ("first", "second")}
    assert {what[0] for what in asked} == {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")}
    if how == "dare_linear":
        mask = masks("model.layers.1.self_attn.q_proj", "first", "b", (4, E))
        other = masks("model.layers.1.self_attn.q_proj", "second", "b", (4, E))
        expected = 2 * (0.7 * 2) ** 0.5 * mask * query(model, "first")[1][1]
        expected += 2 * (1.2 * 2) ** 0.5 * other * query(model, "second")[1][1]
        np.testing.assert_allclose(query(model, "combined")[1][1], expected, atol=1e-5)


# --- What comes of it ---


@pytest.mark.parametrize("how", WAYS)
def test_the_new_adapter_is_active_and_the_base_and_the_given_ones_keep_their_bits(how: str, tmp_path: Path) -> None:
    model = model_with(SAME, SAME)
    before = [tiny.bits(model, kind) for kind in (nnx.Param, variables.PeftParam)]
    combine(model, ("first", "second"), WEIGHTS, name="both", **options_of(how))
    assert active(model) == ("both",)
    assert adapters.attached(model).keys() == {"first", "second", "both"}
    both = np.asarray(model(tiny.tokens()))
    assert np.isfinite(both).all()
    assert provenance.base_name(model, "both") is None
    after = [tiny.bits(model, kind) for kind in (nnx.Param, variables.PeftParam)]
    for old, new in zip(before, after, strict=True):
        assert old.items() <= new.items()

    save_adapter(model, tmp_path / "both", "both")
    other = load_adapter(tiny.model(), tmp_path / "both")
    np.testing.assert_array_equal(other(tiny.tokens()), both)


def test_the_new_adapter_is_where_one_of_the_given_is_and_scaled_by_1(tmp_path: Path) -> None:
    given = (
        {"rank": 4, "targets": ("q_proj",), "layers_to_transform": (0,), "rslora": True, "dropout": 0.25},
        {"rank": 4, "targets": ".*k_proj", "exclude": ("layers.1.self_attn.k_proj",)},
    )
    model = combine(model_with(*given), ("first", "second"), (1.0, 1.0))
    attention = model.blocks.attention
    assert attention.query.adapters.combined.ranks == (4, 0, 0)
    assert attention.key.adapters.combined.ranks == (4, 0, 4)
    np.testing.assert_array_equal(attention.query.adapters.combined.scale.get_value(), [[1] * 4, [0] * 4, [0] * 4])
    assert adapters.attached(model)["combined"].dropout == 0.25
    assert adapters.count_trainable(model, "combined") == 4 * (E + E) + 2 * 4 * (E + KV)
    expected = np.asarray(model(tiny.tokens()))
    together = use(model, ("first", "second"))(tiny.tokens())  # they share no layer, so that linear is exact
    np.testing.assert_allclose(expected, together, atol=1e-5)
    save_adapter(use(model, "combined"), tmp_path / "adapter", "combined")
    np.testing.assert_array_equal(load_adapter(tiny.model(), tmp_path / "adapter")(tiny.tokens()), expected)


def test_the_new_adapter_names_the_base_that_the_given_ones_name(tmp_path: Path) -> None:
    model = model_with(SAME, SAME)
    provenance.remember_base(model, "first", BaseName("org/base", "v1"))
    assert provenance.base_name(combine(model, ("first", "second"), WEIGHTS, name="one"), "one") is None
    provenance.remember_base(model, "second", BaseName("org/base", "v1"))
    save_adapter(combine(model, ("first", "second"), WEIGHTS, name="both"), tmp_path, "both")
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("org/base", "v1")


def test_targets_that_all_adapters_share_stay_as_they_are_written() -> None:
    model = combine(model_with({"rank": 2}, {"rank": 3}), ("first", "second"), (1.0, 1.0), how="cat")
    method = adapters.attached(model)["combined"]
    assert isinstance(method, Lora)
    assert (method.targets, method.rank, method.alpha, method.rank_pattern) == ("all-linear", 5, 5, ())


def test_an_adapter_may_be_given_twice() -> None:
    model = model_with(SAME)
    expected = deltas(model, "first")
    for path, delta in deltas(combine(model, ("first", "first"), (0.5, 0.25), how="svd"), "combined").items():
        np.testing.assert_allclose(delta, 0.75 * expected[path], atol=1e-5)


def test_a_bfloat16_adapter_makes_a_bfloat16_one() -> None:
    half = SAME | {"dtype": "bfloat16"}
    model = combine(model_with(half, SAME), ("first", "second"), WEIGHTS, how="cat")
    assert model.blocks.attention.query.adapters.combined.a.get_value().dtype == jnp.bfloat16


# --- What is refused ---


@functools.cache
def refusing() -> Any:
    """A model with adapters of every kind, the first of them active."""
    model = tiny.model(attention_bias=True)
    for name, option in {
        "first": SAME, "second": SAME, "third": SAME | {"rank": 2}, "dora": SAME | {"dora": True},
        "shifted": {"targets": ("q_proj",), "lora_bias": True}, "biased": {"targets": ("q_proj",), "bias": "lora_only"},
        "saving": {"targets": ("q_proj",), "modules_to_save": ("lm_head",)},
    }.items():  # fmt: skip
        attach(model, Lora(**option), name, rngs=nnx.Rngs(0))
    attach(model, methods.Ia3(targets=("k_proj",), feedforward=()), "ia3", rngs=nnx.Rngs(0))
    return use(model, "first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "tie"}, "how='tie' is unknown. Did you mean 'ties'"),
        ({"names": ("first", "secnd")}, "no adapter 'secnd' is attached. Did you mean 'second'"),
        ({"names": ()}, "names must be a list"),
        ({"names": "first"}, "names must be a list"),
        ({"weights": (1.0,)}, "weights must be a list of 2 numbers, one for each adapter, got (1.0,)"),
        ({"weights": 0.5}, "weights must be a list of 2 numbers, one for each adapter, got 0.5"),
        ({"weights": (1.0, "2")}, "weights must be finite numbers, got '2'"),
        ({"weights": (1.0, float("nan"))}, "weights must be finite numbers, got nan"),
        ({"how": "ties"}, "how='ties' needs a density above 0 and up to 1, got None"),
        ({"how": "dare_linear", "density": 0.0}, "needs a density above 0 and up to 1, got 0.0"),
        ({"how": "magnitude_prune_svd", "density": 1.5}, "needs a density above 0 and up to 1, got 1.5"),
        ({"density": 0.5}, "density=0.5 is not used with how='linear'"),
        ({"how": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign must be 'total' or 'frequency'"),
        ({"rank": 4}, "rank=4 is not used with how='linear'"),
        ({"how": "svd", "rank": 0}, "rank must be a positive integer, got 0"),
        (
            {"names": ("first", "third")},
            "needs equal ranks, but in model.layers.0.self_attn.q_proj 'first' has 4 and 'third' 2",
        ),
        ({"name": "first"}, "adapter 'first' is already attached"),
        ({"name": "1st"}, "adapter name '1st'"),
        ({"names": ("first", "ia3")}, "adapter 'ia3' has the method 'ia3'; only lora adapters can be combined"),
        ({"names": ("first", "dora")}, "adapter 'dora' has dora=True"),
        ({"names": ("first", "shifted")}, "adapter 'shifted' has lora_bias=True"),
        ({"names": ("first", "biased")}, "adapter 'biased' has bias='lora_only'"),
        ({"names": ("first", "saving")}, "adapter 'saving' has modules_to_save="),
    ],
)
def test_what_cannot_be_combined_is_refused_and_the_model_stays(options: dict[str, Any], message: str) -> None:
    model = refusing()
    before = nnx.split(model)[0]
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as refused:
        combine(model, **{"names": ("first", "second"), "weights": WEIGHTS} | options)
    assert message in str(refused.value)
    assert nnx.split(model)[0] == before


def test_what_goes_wrong_while_combining_leaves_the_model_as_it_was() -> None:
    def draw(*what: Any) -> np.ndarray:
        raise RuntimeError("no mask")

    model = use(model_with(SAME, SAME), "first")
    before = nnx.split(model)[0]
    with pytest.raises(RuntimeError, match="no mask"):
        combine(model, ("first", "second"), WEIGHTS, how="dare_linear", density=0.5, draw=draw)
    assert nnx.split(model)[0] == before
    assert active(model) == ("first",)
