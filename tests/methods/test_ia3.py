"""(IA)3's options. What every method promises: test_contract.py."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.adapters import attach
from peftjax.methods import Ia3

TARGETS = ("k_proj", "v_proj", "down_proj")


def attached(**options: Any) -> Any:
    return attach(tiny.model(), Ia3(**options), rngs=nnx.Rngs(1))


def test_outputs_are_scaled_and_inputs_of_feedforward_targets() -> None:
    model = attached(targets=TARGETS, feedforward=("down_proj",))
    key, down = model.blocks.attention.key.adapters.default, model.blocks.feedforward.down.adapters.default
    assert (key.into, key.out_of.shape) == (None, (3, 16))
    assert (down.into.shape, down.out_of) == ((3, 40), None)


def test_a_small_change_of_the_scale_is_not_lost_in_bfloat16() -> None:
    key = attached(targets=TARGETS).blocks.attention.key.adapters.default
    key.out_of.set_value(key.out_of.get_value()[0] * 1.003)
    y = jnp.linspace(1, 2, 16, dtype=jnp.bfloat16)
    scaled = np.asarray(key.scale_output(y), np.float32)
    assert np.any(scaled != np.asarray(y, np.float32))


def test_peft_gets_whole_names_where_it_could_not_say_the_choice_otherwise() -> None:
    options = {"targets": TARGETS, "feedforward": ("down_proj",)}
    model = attached(**options)
    plain = Ia3(**options).to_hf(model, "default")
    assert (plain["target_modules"], plain["feedforward_modules"]) == (list(TARGETS), ["down_proj"])
    some = Ia3(**options, layers_to_transform=(1,)).to_hf(model, "default")
    assert some["target_modules"] == [
        f"model.layers.1.{name}" for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    assert some["feedforward_modules"] == ["model.layers.1.mlp.down_proj"]
    assert "layers_to_transform" not in some
    assert Ia3(targets=TARGETS).to_hf(model, "default")["feedforward_modules"] == []


def test_feedforward_modules_that_peft_would_guess_are_refused() -> None:
    with pytest.raises(ValueError, match="feedforward_modules is missing; peft then guesses it"):
        Ia3.from_hf({"target_modules": ["k_proj"]})
    assert Ia3.from_hf({"target_modules": ["k_proj"], "feedforward_modules": []}).feedforward == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": TARGETS, "feedforward": ("up_proj",)}, "method.feedforward: 'up_proj' matches no target. .*Targets: down_proj, k"),
        ({"targets": TARGETS, "feedforward": r".*\.dwn_proj"}, r"method.feedforward: '.\*\\\\.dwn_proj' matches no target"),
    ],
)  # fmt: skip
def test_feedforward_targets_must_be_among_the_targets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attached(**options)
