"""Reading the text model in a multimodal config.json. Equality with transformers is in tests/interop."""

import json
from typing import Any

import pytest

from peftjax.models import from_hf_config
from peftjax.models.multimodal import other_part, text_name
from tests import tiny

LLAVA: dict[str, Any] = {"model_type": "llava", "text_config": tiny.CONFIG, "vision_config": {}, "dtype": "bfloat16"}


def test_sizes_and_options_that_a_text_config_omits_are_those_of_transformers() -> None:
    gemma = from_hf_config({"model_type": "gemma3", "text_config": {"num_hidden_layers": 6, "sliding_window": 8}})
    assert (gemma.vocab, gemma.embed, gemma.heads, gemma.tied) == (262208, 2304, 8, True)
    assert gemma.windows == (8,) * 5 + (0,)
    ministral = from_hf_config({"model_type": "mistral3", "text_config": tiny.CONFIG | {"model_type": "ministral3"}})
    assert (type(ministral).__name__, ministral.rope.kind, ministral.growth) == ("MinistralConfig", "yarn", 0.1)
    vicuna = from_hf_config({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}})
    assert (vicuna.vocab, vicuna.embed, vicuna.mlp, vicuna.layers, vicuna.tied) == (32064, 4096, 11008, 32, False)


def test_the_fields_of_qwen_may_be_flat_and_its_rotary_embedding_is_that_of_text() -> None:
    text = {key: value for key, value in tiny.CONFIG.items() if key != "model_type"}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    nested = from_hf_config({"model_type": "qwen2_5_vl", "text_config": text, "vision_config": {}})
    flat = from_hf_config(text | {"model_type": "qwen2_5_vl", "vision_config": {}, "image_token_id": 47})
    assert flat.rope == nested.rope
    assert (flat.rope.kind, flat.rope.theta, flat.qkv_bias) == ("default", 1e6, True)
    assert flat.to_hf()["vision_config"] == {}
    assert flat.to_hf()["vocab_size"] == 48


def test_the_whole_config_is_written_again_with_what_changed_in_the_text() -> None:
    config = from_hf_config(LLAVA, dtype="float32")
    written = config.to_hf()
    assert written == LLAVA | {
        "dtype": "float32", "tie_word_embeddings": False,
        "text_config": tiny.CONFIG | {"dtype": "float32"},
    }  # fmt: skip
    assert from_hf_config(json.loads(json.dumps(written))).embed == 32
    tied = from_hf_config(LLAVA | {"tie_word_embeddings": True})
    assert tied.tied


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": None}, "model_type 'llava' needs text_config"),
        ({"text_config": {"model_type": "cohere"}}, "model_type 'cohere' is not supported"),
        ({"text_config": tiny.CONFIG | {"attention_dropout": 0.1}}, "attention_dropout=0.1 is not supported"),
        ({"model_type": "lava"}, "Did you mean 'llava'"),
    ],
)
def test_what_cannot_be_read_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(LLAVA | fields)


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.norm.weight", "model.norm.weight"),
        ("model.language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.rotary.layers", None),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.layers.0.weight", None),
        ("visual.patch_embed.proj.weight", None),
        ("model.image_newline", None),
    ],
)
def test_a_tensor_is_the_text_models_or_another_parts(stored: str, ours: str | None) -> None:
    assert text_name(stored) == ours
    assert other_part("model.vision_tower.layers.0.weight") == other_part("vision_tower.norm.bias") == "vision_tower"
