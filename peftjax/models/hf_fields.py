"""The fields of config.json that transformers reads, by model_type.

`tests/interop/test_hf_fields.py` compares the tables with the configuration and model classes of transformers. A field
that is in none of them cannot change what transformers computes.
"""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Read by code that all models share: attention masks, caches and the base class of configurations.
SHARED = _names("""
    attention_chunk_size is_causal kv_sharing_modes layer_types num_hidden_layers number_of_conv_states
    per_layer_config sliding_window
""")
_BERT = _names("""
    add_cross_attention attention_probs_dropout_prob bos_token_id chunk_size_feed_forward classifier_dropout
    embedding_size eos_token_id hidden_act hidden_dropout_prob hidden_size initializer_range
    intermediate_size is_decoder is_encoder_decoder layer_norm_eps max_position_embeddings
    num_attention_heads num_labels pad_token_id problem_type tie_word_embeddings type_vocab_size use_cache
    vocab_size
""")
# What most decoders read.
_DECODER = _names("""
    attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size initializer_range intermediate_size
    max_position_embeddings num_attention_heads num_key_value_heads original_max_position_embeddings pad_token_id
    partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache
    vocab_size
""")
_MOE = _DECODER | _names("num_experts_per_tok output_router_logits router_aux_loss_coef")
_QWEN_MOE = _MOE | _names("""
    decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts use_sliding_window
""")
_GEMMA2 = (_DECODER - {"hidden_act"}) | _names("""
    attention_bias attn_logit_softcapping final_logit_softcapping hidden_activation query_pre_attn_scalar
    use_bidirectional_attention
""")
_T5 = _names("""
    classifier_dropout d_ff d_kv d_model decoder_start_token_id dense_act_fn dropout_rate eos_token_id
    feed_forward_proj head_dim hidden_size initializer_factor is_decoder is_encoder_decoder is_gated_act
    layer_norm_epsilon num_attention_heads num_decoder_layers num_heads num_labels num_layers pad_token_id
    problem_type relative_attention_max_distance relative_attention_num_buckets scale_decoder_outputs
    tie_word_embeddings use_cache vocab_size
""")
# Read by the model_type's own classes.
OWN: dict[str, frozenset[str]] = {
    "llama": _DECODER | {"attention_bias", "mlp_bias", "pretraining_tp"},
    "mistral": _DECODER,
    "qwen2": _DECODER | {"max_window_layers", "use_sliding_window"},
    "qwen3": _DECODER | {"attention_bias", "max_window_layers", "use_sliding_window"},
    "mixtral": _MOE | {"num_experts", "num_local_experts", "router_jitter_noise"},
    "qwen2_moe": _QWEN_MOE | {"max_window_layers", "qkv_bias", "shared_expert_intermediate_size"},
    "qwen3_moe": _QWEN_MOE | {"attention_bias"},
    "phi3": _DECODER | {"embd_pdrop", "resid_pdrop"},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2
    | _names("""
        image_token_id mm_tokens_per_image rope_local_base_freq sliding_window_pattern text_config vision_config
    """),
    "olmo2": _DECODER | {"attention_bias"},
    "olmo3": _DECODER | {"attention_bias"},
    "smollm3": _DECODER
    | _names("""
        attention_bias mlp_bias no_rope_layer_interval no_rope_layers use_sliding_window
    """),
    "granite": _DECODER
    | _names("""
        attention_bias attention_multiplier embedding_multiplier logits_scaling mlp_bias residual_multiplier
    """),
    "llama4_text": _MOE
    | _names("""
        attention_bias attn_scale attn_temperature_tuning floor_scale image_size image_token_id
        interleave_moe_layer_step intermediate_size_mlp moe_layers no_rope_layer_interval no_rope_layers num_channels
        num_local_experts output_attentions output_hidden_states patch_size pixel_shuffle_ratio projector_dropout
        projector_input_dim projector_output_dim return_dict router_jitter_noise text_config use_qk_norm
        vision_config
    """),
    "ministral3": _DECODER,
    "glm4": _DECODER | {"attention_bias"},
    "gpt_oss": _MOE | {"attention_bias", "num_experts", "num_local_experts", "swiglu_alpha", "swiglu_limit"},
    "gpt2": _names("""
        activation_function add_cross_attention attn_pdrop bos_token_id classifier_dropout embd_pdrop
        eos_token_id hidden_dropout hidden_size initializer_range layer_norm_epsilon max_position_embeddings
        n_embd n_head n_inner n_layer n_positions num_attention_heads num_labels pad_token_id problem_type
        reorder_and_upcast_attn resid_pdrop scale_attn_by_inverse_layer_idx scale_attn_weights
        summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type
        summary_use_proj tie_word_embeddings use_cache vocab_size
    """),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _names("""
        activation attention_dropout bos_token_id chunk_size_feed_forward dim dropout eos_token_id hidden_dim
        hidden_size initializer_range max_position_embeddings n_heads n_layers num_attention_heads num_labels
        pad_token_id problem_type qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_word_embeddings
        vocab_size
    """),
    "modernbert": _names("""
        attention_bias attention_dropout bos_token_id classifier_activation classifier_bias classifier_dropout
        classifier_pooling cls_token_id decoder_bias deterministic_flash_attn embedding_dropout eos_token_id
        global_attn_every_n_layers global_rope_theta head_dim hidden_activation hidden_size
        initializer_cutoff_factor initializer_range intermediate_size local_attention local_rope_theta
        max_position_embeddings mlp_bias mlp_dropout norm_bias norm_eps num_attention_heads num_labels
        original_max_position_embeddings pad_token_id partial_rotary_factor problem_type rope_parameters
        rope_scaling rope_theta sep_token_id sparse_pred_ignore_index sparse_prediction tie_word_embeddings
        vocab_size
    """),
    "deberta-v2": _names("""
        attention_head_size attention_probs_dropout_prob bos_token_id cls_dropout conv_act conv_groups
        conv_kernel_size embedding_size eos_token_id hidden_act hidden_dropout_prob hidden_size
        initializer_range intermediate_size layer_norm_eps legacy max_position_embeddings
        max_relative_positions norm_rel_ebd num_attention_heads num_labels output_attentions
        output_hidden_states pad_token_id pooler_dropout pooler_hidden_act pooler_hidden_size pos_att_type
        position_biased_input position_buckets problem_type relative_attention return_dict share_att_key
        tie_word_embeddings type_vocab_size vocab_size
    """),
    "t5": _T5,
    "mt5": (_T5 - {"scale_decoder_outputs"}) | {"bos_token_id"},
    "vit": _names("""
        attention_probs_dropout_prob encoder_stride head_dim hidden_act hidden_dropout_prob hidden_size
        image_size initializer_range intermediate_size layer_norm_eps num_attention_heads num_channels
        num_labels patch_size pooler_act pooler_output_size qkv_bias
    """),
}


def reads(model_type: str, name: str) -> bool:
    """Whether transformers reads a field of config.json for a model_type."""
    return name in SHARED or name in OWN[model_type]
