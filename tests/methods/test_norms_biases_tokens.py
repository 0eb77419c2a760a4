"""LN tuning, BitFit and trainable tokens: what their options mean and refuse. The rest is in test_contract.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax.adapters import attach, count_trainable, use
from peftjax.adapters.registry import attached
from peftjax.methods import BitFit, LnTuning, TrainableTokens


def attach_to(model: Any, method: Any, name: str = "default") -> Any:
    return attach(model, method, name, rngs=nnx.Rngs(0))


def refusal(model: Any, method: Any) -> str:
    with pytest.raises(ValueError, match="method") as caught:
        attach_to(model, method)
    assert not attached(model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        (LnTuning(), {}, {"input_layernorm", "norm", "post_attention_layernorm"}),
        (LnTuning(layers_to_transform=(1,), targets=("input_layernorm",)), {}, {"model.layers.1.input_layernorm"}),
        (BitFit(), {"attention_bias": True}, {"k_proj", "o_proj", "q_proj", "v_proj"}),
        (BitFit(exclude=r".*\.(0|1)\..*|.*[koq]_proj"), {"attention_bias": True}, {"model.layers.2.self_attn.v_proj"}),
    ],
)
def test_the_file_names_the_layers_as_peft_needs_it(method: Any, fields: dict[str, Any], expected: set[str]) -> None:
    model = attach_to(tiny.model(**fields), method)
    assert set(method.to_hf(model, "default")["target_modules"]) == expected


def test_norms_and_biases_of_bfloat16_start_from_the_bases_bits() -> None:
    for method in (LnTuning(), BitFit()):
        model = tiny.model(dtype="bfloat16", attention_bias=True)
        tiny.randomize(model, nnx.Param)
        expected = model(tiny.tokens())
        np.testing.assert_array_equal(attach_to(model, method)(tiny.tokens()), expected)


def test_ln_tuning_refuses_layers_that_are_no_norms() -> None:
    assert "input_layernorm, norm, post_attention_layernorm" in refusal(tiny.model(), LnTuning(targets=("q_proj",)))


def test_bitfit_refuses_layers_and_models_without_a_bias() -> None:
    assert "no layer of this model has a bias" in refusal(tiny.model(), BitFit())
    method = BitFit(targets=("q_proj", "up_proj"))
    assert "model.layers.0.mlp.up_proj has no bias" in refusal(tiny.model(attention_bias=True), method)


@pytest.mark.slow_cases
@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_rows_of_the_embedding_and_columns_of_a_tied_head(tied: bool) -> None:
    ids = (7, 3, 40)
    fields = {"tie_word_embeddings": tied, "num_hidden_layers": 1}
    model = tiny.randomize(attach_to(tiny.model(**fields), TrainableTokens(token_indices=ids)))
    rows = model.embed.adapters.default.delta.get_value()
    expected = tiny.model(**fields)
    table = expected.embed.embedding
    table.set_value(table.get_value().at[jnp.array(ids)].set(rows))
    with jax.disable_jit():  # one operation at a time: two compiled programs round differently
        np.testing.assert_array_equal(model(tiny.tokens()), expected(tiny.tokens()))
    assert count_trainable(model) == rows.size
    assert ("default" in model.head.adapters.names()) == tied


def test_trained_tokens_of_an_embedding_and_a_head_that_are_not_tied_are_two_sets() -> None:
    method = TrainableTokens(token_indices=(1, 2), targets=("embed_tokens", "lm_head"))
    model = attach_to(tiny.model(), method)
    assert count_trainable(model) == 2 * 2 * 32
    np.testing.assert_array_equal(model(tiny.tokens()), use(model, None)(tiny.tokens()))
    tied = attach_to(tiny.model(tie_word_embeddings=True), method)
    assert count_trainable(tied) == 2 * 32


def test_trained_tokens_of_a_tied_head_alone_leave_the_embedding() -> None:
    method = TrainableTokens(token_indices=(1, 2), targets=("lm_head",))
    fields = {"tie_word_embeddings": True, "num_hidden_layers": 1}
    model, base = tiny.randomize(attach_to(tiny.model(**fields), method)), tiny.model(**fields)
    with jax.disable_jit():  # one operation at a time: two compiled programs round differently
        changed = np.any(np.asarray(model(tiny.tokens()) != base(tiny.tokens())), axis=(0, 1))
    assert set(np.flatnonzero(changed)) == {1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method.token_indices is empty"),
        ({"token_indices": (4, 2, 4)}, "method.token_indices has 4 more than once"),
        ({"token_indices": (4, 48)}, "48 is not a token of model.embed_tokens; its ids are 0 to 47"),
        ({"token_indices": (-1,)}, "-1 is not a token"),
        ({"token_indices": (1,), "targets": ("q_proj",)}, "'q_proj' matches no layer"),
    ],
)
def test_tokens_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_to(tiny.model(), TrainableTokens(**options))
