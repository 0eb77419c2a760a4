"""Reading the config.json of GPT-2, Phi-3 and Gemma: what is used, what is refused by name. Equality with transformers
is in tests/interop."""

import dataclasses
from typing import Any

import pytest

from peftjax.models import from_hf_config
from tests import tiny

GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "summary_type": "cls_index", "n_ctx": 16,
}  # fmt: skip
SIZES = {key: value for key, value in tiny.CONFIG.items() if key != "tie_word_embeddings"}
PHI3 = SIZES | {"model_type": "phi3"}
GEMMA2 = SIZES | {"model_type": "gemma2", "num_hidden_layers": 7}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text"}
TYPES = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]  # the default of Gemma 3
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "only False"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True is not supported for model_type 'gpt2'"),
        (GPT2, {"n_head": 5}, "n_embd=32 is not a multiple of n_head=5"),
        (GPT2, {"hidden_size": 32}, "hidden_size=32: transformers reads this for model_type 'gpt2'"),
        (PHI3, {"resid_pdrop": 0.1}, "resid_pdrop=0.1 is not supported"),
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported for model_type 'phi3'"),
        (
            PHI3,
            {"rope_scaling": FACTORS | {"type": "longrope"}, "partial_rotary_factor": 0.5},
            "a head of width 4 needs 2",
        ),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (GEMMA2, {"sliding_window": None}, "layer_types has sliding_attention, but no window is in use"),
        (GEMMA2, {"is_causal": False}, "is_causal=False: transformers reads this for model_type 'gemma2'"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        (GEMMA3, {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has rope_theta"),
        (GEMMA3, {"model_type": "gemma3"}, "'gemma3' needs text_config"),
        (
            SIZES,
            {"model_type": "olmo3", "rope_parameters": {"rope_theta": 1e4}},
            "for model_type 'olmo3' it holds full_att",
        ),
        (SIZES, {"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 3 layers"),
        (SIZES, {"model_type": "llama4_text", "moe_layers": []}, "moe_layers leave no layer with experts"),
        (SIZES, {"model_type": "llama4_text", "layer_types": ["full_attention"]}, "layer_types must name chunked_att"),
        (
            SIZES,
            {"model_type": "llama4_text", "layer_types": ["chunked_attention"] * 3, "attention_chunk_size": None},
            "layer_types contains chunked_attention, which requires",
        ),
        (
            SIZES,
            {"model_type": "ministral3", "rope_parameters": {"rope_type": "default"}},
            "needs llama_4_scaling_beta",
        ),
        (SIZES, {"model_type": "gpt_oss", "hidden_act": "gelu"}, "only 'silu'"),
        (SIZES, {"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds the number of exp"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(
    config: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(config | fields)


@pytest.mark.parametrize(
    ("config", "fields", "same"),
    [
        (GPT2, {"rope_theta": 1e4}, {}),
        (PHI3, {"full_attn_mod": 2}, {"full_attn_mod": 1, "mlp_bias": False, "auto_map": {}}),
        (GEMMA2, {"hidden_act": "gelu", "sliding_window_size": 5}, {"hidden_act": "gelu_pytorch_tanh"}),
        (GEMMA3, {"_sliding_window_pattern": 2}, {"_sliding_window_pattern": 2, "layer_types": TYPES}),
        (GEMMA2, {"rope_local_base_freq": 1e4}, {"sliding_window_size": 4096}),
        (tiny.CONFIG, {"attn_logit_softcapping": 50.0, "is_llama_config": True, "rope_interleaved": False}, {}),
        (tiny.CONFIG | {"model_type": "qwen2"}, {"use_mrope": False, "auto_map": {}, "_model_name_or_path": "a"}, {}),
    ],
)
def test_fields_that_transformers_does_not_read_change_nothing_and_are_named_once(
    config: dict[str, Any], fields: dict[str, Any], same: dict[str, Any]
) -> None:
    plain = from_hf_config(config | same)  # no warning: the fields describe what is computed
    with pytest.warns(UserWarning, match=f"ignoring {', '.join(sorted(fields))}, as transformers does") as warned:
        read = from_hf_config(config | fields)
    assert len(warned) == 1
    assert dataclasses.replace(read, hf="") == dataclasses.replace(plain, hf="")


def test_caps_and_windows_of_gemma_are_those_of_transformers_where_fields_are_left_out() -> None:
    two, three = from_hf_config(GEMMA2), from_hf_config(GEMMA3)
    assert (two.attention_cap, two.logits_cap, two.windows) == (50.0, 30.0, (4096, 0) * 3 + (4096,))
    assert (three.attention_cap, three.logits_cap, three.windows) == (None, None, (4096,) * 5 + (0, 4096))
    assert (three.rope.theta, three.local_rope.theta) == (1_000_000.0, 10_000.0)
    uncapped = from_hf_config(GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (uncapped.attention_cap, uncapped.logits_cap) == (None, None)


def test_fields_that_are_left_out_have_the_defaults_of_transformers() -> None:
    assert from_hf_config(SIZES | {"model_type": "mixtral"}).rope.theta == 1_000_000.0
    short = {key: value for key, value in PHI3.items() if key != "max_position_embeddings"}
    assert from_hf_config(short).max_positions == 4096


def test_the_dropout_of_granites_pretraining_is_not_applied_and_is_named() -> None:
    granite = SIZES | {"model_type": "granite"}
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1 is not applied in training"):
        read = from_hf_config(granite | {"attention_dropout": 0.1})
    assert dataclasses.replace(read, hf="") == dataclasses.replace(from_hf_config(granite), hf="")
    assert read.to_hf()["attention_dropout"] == 0.1


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_older_names_of_longrope_mean_the_same(kind: str) -> None:
    fields = {"original_max_position_embeddings": 32, "rope_theta": 500.0}
    old, new = (
        from_hf_config(PHI3 | fields | {"rope_scaling": FACTORS | {"type": name}}) for name in (kind, "longrope")
    )
    assert old.rope == new.rope
    assert (new.rope.kind, new.rope.original_positions, new.rope.theta) == ("longrope", 32, 500.0)


def test_more_tokens_than_gpt2_has_positions_are_refused() -> None:
    model = tiny.make(from_hf_config(GPT2))
    with pytest.raises(ValueError, match="17 tokens exceed the model's 16 positions"):
        model(tiny.tokens(shape=(1, 17)))
