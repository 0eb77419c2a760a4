"""Reading config.json: what is used, and what is refused by name. Equality with transformers is in tests/interop."""

import jax.numpy as jnp
import numpy as np
import pytest

from peftjax.models import from_hf_config
from tests import tiny


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"model_type": "rwkv"}, "'rwkv' is not supported. Supported: bert, deberta-v2, distilbert, gemma2"),
        ({"hidden_act": "swiglu"}, "unknown hidden_act 'swiglu'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"is_causal": False}, "is_causal=False: transformers reads this for model_type 'llama'"),
        ({"sliding_window": 4}, "sliding_window=4 is not a field of model_type 'llama'"),
        ({"head_dim": 7}, "a rotary embedding needs an even width, but it rotates 7 elements of a head"),
        ({"rope_scaling": {"type": "spiral"}}, "unknown rope_type 'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"layer_types": ["sliding_attention"] * 3}, "transformers reads this for model_type 'llama'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types must name"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(tiny.CONFIG | fields)


def test_layer_types_of_a_model_without_windows_may_say_so() -> None:
    assert from_hf_config(tiny.CONFIG | {"layer_types": ["full_attention"] * 3}).windows == (0, 0, 0)


def test_a_missing_field_is_named() -> None:
    config = {key: value for key, value in tiny.CONFIG.items() if key != "intermediate_size"}
    with pytest.raises(ValueError, match="'intermediate_size' is missing"):
        from_hf_config(config)


def test_windows_follow_each_familys_fields() -> None:
    qwen = {"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 1}
    assert from_hf_config(tiny.CONFIG | qwen).windows == (0, 0, 0)
    assert from_hf_config(tiny.CONFIG | qwen | {"use_sliding_window": True}).windows == (0, 5, 5)
    assert from_hf_config(tiny.CONFIG | {"model_type": "mistral"}).windows == (4096, 4096, 4096)
    assert from_hf_config(tiny.CONFIG | {"model_type": "mistral", "sliding_window": None}).windows == (0, 0, 0)
    for kind in ("qwen2", "qwen3", "qwen3_moe"):
        unlimited = {"model_type": kind, "use_sliding_window": True, "sliding_window": None}
        assert from_hf_config(tiny.CONFIG | unlimited).windows == (0, 0, 0)


def test_null_means_as_many_key_heads_as_query_heads() -> None:
    fields = {"model_type": "qwen2", "num_attention_heads": 64, "hidden_size": 128}
    assert from_hf_config(tiny.CONFIG | fields | {"num_key_value_heads": None}).kv_heads == 64
    omitted = {key: value for key, value in (tiny.CONFIG | fields).items() if key != "num_key_value_heads"}
    assert from_hf_config(omitted).kv_heads == 32


def test_rope_scaling_replaces_rope_parameters() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    parameters = {"rope_type": "default", "rope_theta": 500.0}
    with pytest.warns(UserWarning, match="rope_scaling replaces rope_parameters, including its rope_theta"):
        both = from_hf_config(tiny.CONFIG | {"rope_scaling": scaling, "rope_parameters": parameters})
    assert both.rope == from_hf_config(tiny.CONFIG | {"rope_scaling": scaling}).rope


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_mask_of_numbers_equals_one_of_booleans(dtype: type) -> None:
    model, tokens = tiny.model(), tiny.tokens(shape=(2, 4))
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    expected = model(tokens, mask=jnp.asarray(mask, bool))
    np.testing.assert_array_equal(model(tokens, mask=mask.astype(dtype)), expected)


def test_packed_documents_are_computed_as_if_each_stood_alone() -> None:
    model, tokens = tiny.model(), tiny.tokens(shape=(1, 9))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(tokens, segments=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :4], model(tokens[:, :4]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:], model(tokens[:, 4:]), atol=1e-5)


def test_padding_on_the_left_changes_nothing_for_the_tokens_behind_it() -> None:
    model, tokens = tiny.model(), tiny.tokens(shape=(2, 6))
    mask = jnp.array([[False] * 3 + [True] * 6] * 2)
    padded = jnp.concatenate([jnp.zeros((2, 3), tokens.dtype), tokens], axis=1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    np.testing.assert_allclose(model(padded, mask=mask, positions=positions)[:, 3:], model(tokens), atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("fields", [{}, {"model_type": "mistral", "sliding_window": 3}])
def test_the_cache_gives_the_logits_of_the_whole_pass(fields: dict) -> None:
    model, tokens = tiny.model(**fields), tiny.tokens(shape=(2, 8))
    cache, parts = model.make_cache(2, 10), []
    for start, end in ((0, 5), (5, 6), (6, 8)):
        logits, cache = model(tokens[:, start:end], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), model(tokens), atol=1e-5)


def test_bfloat16_computation_over_float32_parameters_stays_near_float32() -> None:
    config = from_hf_config(tiny.CONFIG, dtype="bfloat16", param_dtype="float32")
    mixed = tiny.make(config)
    logits = mixed(tiny.tokens())
    assert logits.dtype == jnp.bfloat16
    assert mixed.head.kernel.dtype == jnp.float32
    np.testing.assert_allclose(logits.astype(jnp.float32), tiny.model()(tiny.tokens()), atol=0.15)
