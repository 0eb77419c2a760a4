"""The types of the fields of Hugging Face's JSON files, by the file's name."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peftjax.core.errors import UserError


class Kind(NamedTuple):
    """A kind of value.

    Attributes:
        name: How messages call it.
        fits: Whether a value is of this kind.
    """

    name: str
    fits: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _any_of(*tests: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(fits(value) for fits in tests)


SIZE = Kind("an integer of at least 1", lambda value: _is_integer(value) and value >= 1)
COUNT = Kind("an integer of at least 0", lambda value: _is_integer(value) and value >= 0)
INTEGER = Kind("an integer", _is_integer)
NUMBER = Kind("a finite number", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", _is_text)
TEXTS = Kind("a list of strings", _is_list_of(_is_text))
INTEGERS = Kind("a list of integers", _is_list_of(_is_integer))
NUMBERS = Kind("a list of numbers above 0", _is_list_of(POSITIVE.fits))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TOKEN = Kind("a string or an object", _any_of(_is_text, OBJECT.fits))
TEMPLATE = Kind("a string, an object or a list", _any_of(_is_text, OBJECT.fits, lambda value: isinstance(value, list)))
NAMES = Kind("a string or a list of strings", _any_of(_is_text, TEXTS.fits))
LAYERS = Kind("an integer or a list of integers", _any_of(_is_integer, _is_list_of(_is_integer)))
CHOICE = Kind("true, false or a string", _any_of(FLAG.fits, _is_text))


def _fields(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


_SPECIAL_TOKENS = _fields(TOKEN, "bos_token eos_token pad_token unk_token sep_token cls_token mask_token")
TYPES: dict[str, dict[str, Kind]] = {
    "config.json": _fields(
        SIZE,
        """d_ff d_kv d_model head_dim hidden_size intermediate_size max_position_embeddings n_ctx n_embd n_head n_inner
        n_layer n_positions num_attention_heads num_channels num_decoder_layers num_heads num_hidden_layers
        num_key_value_heads num_layers original_max_position_embeddings relative_attention_max_distance
        relative_attention_num_buckets sliding_window_pattern vocab_size dim hidden_dim n_heads n_layers conv_groups
        global_attn_every_n_layers decoder_sparse_step interleave_moe_layer_step intermediate_size_mlp
        moe_intermediate_size no_rope_layer_interval num_experts num_experts_per_tok num_local_experts
        attention_chunk_size floor_scale""",
    )
    | _fields(COUNT, "type_vocab_size local_attention shared_expert_intermediate_size")
    | _fields(
        INTEGER,
        """max_window_layers num_labels pooler_output_size sliding_window position_buckets max_relative_positions
        conv_kernel_size pad_token_id""",
    )
    | _fields(
        NUMBER,
        """attention_dropout attention_probs_dropout_prob attn_logit_softcapping attn_pdrop classifier_dropout dropout_rate
        embd_pdrop final_logit_softcapping hidden_dropout_prob initializer_factor initializer_range layer_norm_eps
        layer_norm_epsilon partial_rotary_factor query_pre_attn_scalar resid_pdrop rms_norm_eps rope_local_base_freq
        rope_theta dropout seq_classif_dropout embedding_dropout mlp_dropout norm_eps global_rope_theta local_rope_theta
        cls_dropout pooler_dropout attention_multiplier attn_scale embedding_multiplier logits_scaling
        residual_multiplier router_jitter_noise swiglu_alpha swiglu_limit""",
    )
    | _fields(
        FLAG,
        """add_cross_attention attention_bias is_decoder is_encoder_decoder is_gated_act mlp_bias qkv_bias
        scale_attn_by_inverse_layer_idx scale_attn_weights scale_decoder_outputs tie_word_embeddings use_cache
        use_sliding_window norm_bias classifier_bias relative_attention share_att_key position_biased_input
        norm_topk_prob use_qk_norm""",
    )
    | _fields(
        TEXT,
        """activation_function dense_act_fn feed_forward_proj hidden_act hidden_activation model_type pooler_act
        position_embedding_type problem_type activation classifier_activation classifier_pooling norm_rel_ebd conv_act
        pooler_hidden_act""",
    )
    | _fields(NAMES, "pos_att_type")
    | _fields(OBJECT, "id2label label2id quantization_config rope_parameters rope_scaling text_config vision_config")
    | _fields(TEXTS, "architectures layer_types")
    | _fields(INTEGERS, "mlp_only_layers moe_layers no_rope_layers"),
    "rope_parameters": _fields(POSITIVE, "beta_fast beta_slow factor rope_theta")
    | _fields(
        NUMBER,
        """attention_factor high_freq_factor llama_4_scaling_beta low_freq_factor mscale mscale_all_dim
        partial_rotary_factor""",
    )
    | _fields(SIZE, "original_max_position_embeddings")
    | _fields(NUMBERS, "long_factor short_factor")
    | _fields(FLAG, "truncate")
    | _fields(TEXT, "rope_type type")
    | _fields(OBJECT, "full_attention sliding_attention"),
    "tokenizer_config.json": _fields(FLAG, "add_bos_token add_eos_token add_prefix_space clean_up_tokenization_spaces")
    | _SPECIAL_TOKENS
    | _fields(TEMPLATE, "chat_template")
    | _fields(TEXT, "tokenizer_class")
    | _fields(OBJECT, "added_tokens_decoder"),
    "special_tokens_map.json": _SPECIAL_TOKENS,
    "chat_template.json": _fields(TEMPLATE, "chat_template"),
    "quantization_config": _fields(FLAG, "load_in_4bit load_in_8bit bnb_4bit_use_double_quant")
    | _fields(TEXT, "quant_method bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_quant_storage")
    | _fields(TEXTS, "llm_int8_skip_modules modules_to_not_convert"),
    "model.safetensors.index.json": _fields(OBJECT, "weight_map"),
    "adapter_config.json": _fields(
        SIZE, "num_virtual_tokens token_dim num_layers num_attention_heads init_r target_r vector_length"
    )
    | _fields(INTEGER, "tinit tfinal")
    | _fields(NUMBER, "r lora_alpha lora_dropout alpha dropout module_dropout rank_dropout scaling")
    | _fields(FLAG, "fan_in_fan_out inference_mode use_dora use_rslora")
    | _fields(TEXT, "base_model_name_or_path bias peft_type peft_version revision task_type")
    | _fields(OBJECT, "alpha_pattern rank_pattern")
    | _fields(NAMES, "exclude_modules feedforward_modules layers_pattern target_modules")
    | _fields(TEXTS, "modules_to_save target_parameters")
    | _fields(LAYERS, "layers_to_transform")
    | _fields(CHOICE, "init_lora_weights"),
}
# Objects in config.json whose fields have types of their own: {field: key of `TYPES`}.
INNER = {"text_config": "config.json", "quantization_config": "quantization_config"} | dict.fromkeys(
    ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention"), "rope_parameters"
)


def check_types(values: Mapping[str, Any], where: str, file: str) -> None:
    """Check the fields of a JSON file whose types are known; null stands for a field that is missing.

    `where` names the file in messages. `file` is a key of `TYPES`; other files are not checked.

    Raises:
        UserError: A value is of another type.
    """
    for name, kind in TYPES.get(file, {}).items():
        value = values.get(name)
        if value is None:
            continue
        if not kind.fits(value):
            text = repr(value)
            shown = text if len(text) <= 80 else f"{text[:80]}..."
            raise UserError(f"{where}: {name} must be {kind.name}, not {shown} ({type(value).__name__})")
        if name in INNER:
            check_types(value, f"{where}: {name}", INNER[name])
