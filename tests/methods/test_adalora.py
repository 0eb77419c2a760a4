"""AdaLoRA: its budget, its penalty and its files with removed ranks. Beside peft: tests/interop/test_adalora.py."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tests.tiny as tiny
from peftjax.adapters import attach, count_trainable
from peftjax.core import variables
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.methods import AdaLora

pytestmark = pytest.mark.slow

E, KV, L = 32, 16, 3
SMALL = {"init_rank": 4, "target_rank": 2, "targets": ("q_proj", "v_proj")}


def attached(method: AdaLora, model: Any = None) -> Any:
    return attach(tiny.model() if model is None else model, method, rngs=nnx.Rngs(0))


def ranks(model: Any) -> int:
    adapters = [
        projection.adapters.default for projection in (model.blocks.attention.query, model.blocks.attention.value)
    ]
    return sum(int(np.count_nonzero(adapter.singular_values.get_value())) for adapter in adapters)


def trained(method: AdaLora, updates: int) -> tuple[list[int], Any]:
    """The number of entries that are left after every update with random gradients, and the model."""
    model = attached(method)
    _, leaves = variables.flat(model)
    _, tree, _ = variables.split_by_kind(model)
    optimizer = method.optimizer(optax.adam(1e-2), leaves)
    state, left, rng = optimizer.init(tree), [], np.random.default_rng(0)
    for _ in range(updates):
        gradients = {
            path: leaf if isinstance(leaf, optax.MaskedNode) else jnp.array(rng.normal(size=leaf.shape), jnp.float32)
            for path, leaf in tree.items()
        }
        changes, state = optimizer.update(gradients, state, tree)
        tree = {
            path: leaf if isinstance(leaf, optax.MaskedNode) else leaf + changes[path] for path, leaf in tree.items()
        }
        variables.update(model, tree)
        left.append(ranks(model))
    return left, model


def test_the_budget_falls_along_a_cubic_to_the_target() -> None:
    left, _ = trained(AdaLora(total_steps=11, warmup_steps=2, final_steps=1, **SMALL), 13)
    budget = [int(12 * (1 - (step - 2) / 8) ** 3 + 12) for step in range(3, 11)]  # 6 targets, ranks 4 to 2
    assert left == [24, 24, *budget, 12, 12, 12]


def test_entries_are_removed_at_intervals_and_may_come_back_in_between() -> None:
    left, _ = trained(AdaLora(total_steps=8, interval=3, **SMALL), 8)
    assert left == [24, 24, int(12 * (5 / 8) ** 3 + 12), 24, 24, int(12 * (2 / 8) ** 3 + 12), 24, 12]


def test_layers_that_are_left_out_have_no_share_in_the_budget() -> None:
    method = AdaLora(total_steps=3, layers_to_transform=(0, 2), **SMALL)
    left, model = trained(method, 3)
    assert left[-1] == 8 + 2 * 4  # random gradients reach the entries of layer 1, which have scale 0
    values = np.asarray(model.blocks.attention.query.adapters.default.singular_values.get_value())
    assert np.all(values[1] != 0)


def test_the_penalty_is_the_mean_distance_from_orthogonal() -> None:
    method = AdaLora(total_steps=5, orthogonality=0.3, layers_to_transform=(1,), **SMALL)
    model = tiny.randomize(attached(method))
    expected = []
    for projection in (model.blocks.attention.query, model.blocks.attention.value):
        adapter = projection.adapters.default
        p, q = (np.asarray(leaf.get_value()[1]) for leaf in (adapter.p, adapter.q))
        expected += [np.linalg.norm(p.T @ p - np.eye(4)), np.linalg.norm(q @ q.T - np.eye(4))]
    assert float(method.penalty(model)) == pytest.approx(0.3 * np.mean(expected), rel=1e-5)
    assert AdaLora(total_steps=5, orthogonality=0.0).penalty(model) is None


def test_removed_entries_are_not_in_the_file_and_stay_out(tmp_path: Path) -> None:
    method = AdaLora(total_steps=4, **SMALL)
    model = tiny.randomize(attached(method))
    query = model.blocks.attention.query.adapters.default
    kept = np.ones((L, 4), bool)
    kept[0, [0, 2]], kept[1, 1:] = False, False
    query.singular_values.set_value(jnp.where(kept, query.singular_values.get_value(), 0.0))
    save_adapter(model, tmp_path / "first")
    file = load_file(tmp_path / "first" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_"
    assert [file[f"{prefix.format(layer)}A"].shape for layer in range(L)] == [(2, E), (1, E), (4, E)]
    assert [file[f"{prefix.format(layer)}B"].shape for layer in range(L)] == [(E, 2), (E, 1), (E, 4)]
    assert [file[f"{prefix.format(layer)}E"].shape for layer in range(L)] == [(2, 1), (1, 1), (4, 1)]
    pattern = json.loads((tmp_path / "first" / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern["model.layers.0.self_attn.q_proj.lora_E"] == [False, True, False, True]
    assert sum(sum(entries) for entries in pattern.values()) == kept.sum() + 3 * 4

    other = load_adapter(tiny.model(), tmp_path / "first")
    np.testing.assert_allclose(other(tiny.tokens()), model(tiny.tokens()), atol=1e-6)
    assert count_trainable(other) == 7 * (E + 1 + E) + 12 * (E + 1 + KV)
    save_adapter(other, tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert np.isfinite(method.penalty(other))

    values = other.blocks.attention.query.adapters.default.singular_values
    values.set_value(values.get_value().at[0, 1].set(0.0))
    save_adapter(other, tmp_path / "third")
    pattern = json.loads((tmp_path / "third" / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern["model.layers.0.self_attn.q_proj.lora_E"] == [False, True, False, False]


def test_a_layer_that_lost_all_its_ranks_is_in_the_file_without_rows(tmp_path: Path) -> None:
    model = tiny.randomize(attached(AdaLora(total_steps=4, **SMALL)))
    values = model.blocks.attention.query.adapters.default.singular_values
    values.set_value(values.get_value().at[1].set(0.0))
    save_adapter(model, tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {"A": (0, E), "B": (E, 0), "E": (0, 1)}
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    assert {key: file[f"{prefix}{key}"].shape for key in shapes} == shapes
    other = load_adapter(tiny.model(), tmp_path / "adapter")
    np.testing.assert_allclose(other(tiny.tokens()), model(tiny.tokens()), atol=1e-6)


def test_an_adapter_that_was_never_trained_keeps_all_its_ranks(tmp_path: Path) -> None:
    save_adapter(attached(AdaLora(total_steps=4, **SMALL)), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["rank_pattern"] is None
    assert count_trainable(load_adapter(tiny.model(), tmp_path / "new")) == L * 4 * (2 * E + 1 + E + KV + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method.total_steps=0: set it to the number of steps"),
        ({"total_steps": 9, "target_rank": 13}, "method.target_rank=13 is above method.init_rank=12"),
        ({"total_steps": 9, "warmup_steps": 5, "final_steps": 4}, "leave none of 9 steps between them"),
        ({"total_steps": 9, "final_steps": -1}, "method.final_steps must be an integer of at least 0, got -1"),
        ({"total_steps": 9, "beta2": 1.0}, "method.beta2 must be above 0 and below 1"),
        ({"total_steps": 9, "orthogonality": -0.1}, "method.orthogonality must be a finite number of at least 0"),
        (
            {"total_steps": 9, "init_rank": 17},
            "method.init_rank=17 exceeds the smaller dimension .16. of .*k_proj; use at most 16",
        ),
        ({"total_steps": 9, "interval": 0}, "method.interval must be a positive integer, got 0"),
        ({"total_steps": 9, "rank_pattern": {"x.lora_E": [True]}}, "'x.lora_E' needs 12 entries"),
        ({"total_steps": 9, "rank_pattern": {"x.lora_E": [True] * 12}}, "'x.lora_E' is not a target"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(AdaLora(**options))
