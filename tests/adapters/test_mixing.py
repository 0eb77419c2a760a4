"""Several methods on one model at once."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, sharding
from peftjax.adapters import merge, use
from peftjax.core import variables
from peftjax.methods import Ia3, LoHa, Lora, ParallelAdapter, PrefixTuning, PromptTuning
from peftjax.totals import next_token_loss
from peftjax.training.step import Objective, init_state, make_train_step

MIXES = {
    "lora and prompt": (Lora(rank=2), PromptTuning(tokens=3)),
    "prefix and parallel adapter": (PrefixTuning(tokens=3), ParallelAdapter()),  # MAM: He et al. 2021, section 4.6
    "lora and ia3 on the same layers": (Lora(rank=2, targets=("k_proj",)), Ia3(targets=("k_proj", "v_proj"))),
}


def mixed(*parts: adapters.Method, **fields: Any) -> Any:
    model = tiny.model(**fields)
    for index, method in enumerate(parts):
        adapters.attach(model, method, f"part{index}", rngs=nnx.Rngs(index))
    return use(tiny.randomize(model), [f"part{index}" for index in range(len(parts))])


def logits(model: Any) -> np.ndarray:
    return np.asarray(model(tiny.tokens()))


@pytest.mark.slow_cases
@pytest.mark.parametrize("mix", MIXES)
def test_each_part_has_its_effect_beside_the_others(mix: str) -> None:
    model = mixed(*MIXES[mix])
    both = logits(model)
    for name in ("part0", "part1"):
        assert np.abs(both - logits(use(model, name))).max() > 1e-3
    np.testing.assert_array_equal(logits(use(model, ("part0", "part1"))), both)
    np.testing.assert_array_equal(logits(use(model, None)), logits(tiny.model()))


EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        ((Lora(rank=2), LoHa(rank=2)), {}),
        pytest.param(
            (Lora(rank=2, targets=("gate_up_proj", "down_proj")), Lora(rank=3, targets=("down_proj",))),
            EXPERTS,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_weight_methods_at_once_are_their_merges_one_after_the_other(parts: Any, fields: dict[str, Any]) -> None:
    model = mixed(*parts, **fields)
    both = logits(model)
    np.testing.assert_allclose(logits(merge(merge(model, "part0"), "part1")), both, atol=2e-5)


def test_the_order_of_use_is_the_order_of_wrapping() -> None:
    model = mixed(Lora(rank=2, targets=("k_proj",)), Ia3(targets=("k_proj",)))
    scaled_last = logits(model)  # (x W + x A B) l
    scaled_first = logits(use(model, ("part1", "part0")))  # (x W) l + x A B
    assert np.abs(scaled_last - scaled_first).max() > 1e-3


@pytest.mark.slow_cases
@pytest.mark.parametrize("mix", MIXES)
def test_all_parts_are_trained_in_one_step(mix: str) -> None:
    model = mixed(*MIXES[mix])
    mesh = sharding.make_mesh()
    sharding.place(model, mesh)
    graph, trainable, frozen = variables.split_by_kind(model)
    before = {path: np.asarray(leaf) for path, leaf in trainable.items() if not isinstance(leaf, optax.MaskedNode)}
    state = init_state(trainable, optax.adam(1e-2), seed=0)
    step = make_train_step(Objective(graph, partial(next_token_loss, chunk=8)), optax.adam(1e-2), state)
    batch = {key: np.asarray(value) for key, value in tiny.batch(0).items()}
    with jax.set_mesh(mesh):
        state, _ = step(state, frozen, sharding.shard_batch(batch, mesh))
    assert {path.split(".adapters.")[1].split(".")[0] for path in before} == {"part0", "part1"}
    assert all((np.asarray(state.trainable[path]) != value).any() for path, value in before.items())


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="names an adapter twice"):
        use(mixed(Lora(rank=2), LoHa(rank=2)), ("part0", "part0"))
