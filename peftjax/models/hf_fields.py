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
# Read by the model_type's own classes.
OWN: dict[str, frozenset[str]] = {
    "llama": _names("""
        attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings mlp_bias num_attention_heads
        num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor pretraining_tp
        rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "mistral": _names("""
        attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size initializer_range
        intermediate_size max_position_embeddings num_attention_heads num_key_value_heads
        original_max_position_embeddings pad_token_id partial_rotary_factor rms_norm_eps rope_parameters
        rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "qwen2": _names("""
        attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size initializer_range
        intermediate_size max_position_embeddings max_window_layers num_attention_heads num_key_value_heads
        original_max_position_embeddings pad_token_id partial_rotary_factor rms_norm_eps rope_parameters
        rope_scaling rope_theta tie_word_embeddings use_cache use_sliding_window vocab_size
    """),
    "qwen3": _names("""
        attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings max_window_layers num_attention_heads
        num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor rms_norm_eps
        rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache use_sliding_window vocab_size
    """),
    "mixtral": _names("""
        attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size initializer_range
        intermediate_size max_position_embeddings num_attention_heads num_experts num_experts_per_tok
        num_key_value_heads num_local_experts original_max_position_embeddings output_router_logits
        pad_token_id partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta
        router_aux_loss_coef router_jitter_noise tie_word_embeddings use_cache vocab_size
    """),
    "qwen2_moe": _names("""
        attention_dropout bos_token_id decoder_sparse_step eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings max_window_layers mlp_only_layers
        moe_intermediate_size norm_topk_prob num_attention_heads num_experts num_experts_per_tok
        num_key_value_heads original_max_position_embeddings output_router_logits pad_token_id
        partial_rotary_factor qkv_bias rms_norm_eps rope_parameters rope_scaling rope_theta
        router_aux_loss_coef shared_expert_intermediate_size tie_word_embeddings use_cache
        use_sliding_window vocab_size
    """),
    "qwen3_moe": _names("""
        attention_bias attention_dropout bos_token_id decoder_sparse_step eos_token_id head_dim
        hidden_act hidden_size initializer_range intermediate_size max_position_embeddings
        mlp_only_layers moe_intermediate_size norm_topk_prob num_attention_heads num_experts
        num_experts_per_tok num_key_value_heads original_max_position_embeddings output_router_logits
        pad_token_id partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta
        router_aux_loss_coef tie_word_embeddings use_cache use_sliding_window vocab_size
    """),
    "gpt2": _names("""
        activation_function add_cross_attention attn_pdrop bos_token_id classifier_dropout embd_pdrop
        eos_token_id hidden_dropout hidden_size initializer_range layer_norm_epsilon max_position_embeddings
        n_embd n_head n_inner n_layer n_positions num_attention_heads num_labels pad_token_id problem_type
        reorder_and_upcast_attn resid_pdrop scale_attn_by_inverse_layer_idx scale_attn_weights
        summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type
        summary_use_proj tie_word_embeddings use_cache vocab_size
    """),
    "phi3": _names("""
        attention_dropout bos_token_id embd_pdrop eos_token_id head_dim hidden_act hidden_size initializer_range
        intermediate_size max_position_embeddings num_attention_heads num_key_value_heads
        original_max_position_embeddings pad_token_id partial_rotary_factor resid_pdrop rms_norm_eps
        rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "gemma2": _names("""
        attention_bias attention_dropout attn_logit_softcapping bos_token_id eos_token_id
        final_logit_softcapping head_dim hidden_activation hidden_size initializer_range intermediate_size
        max_position_embeddings num_attention_heads num_key_value_heads original_max_position_embeddings
        pad_token_id partial_rotary_factor query_pre_attn_scalar rms_norm_eps rope_parameters rope_scaling
        rope_theta tie_word_embeddings use_bidirectional_attention use_cache vocab_size
    """),
    "gemma3_text": _names("""
        attention_bias attention_dropout attn_logit_softcapping bos_token_id eos_token_id
        final_logit_softcapping head_dim hidden_activation hidden_size image_token_id initializer_range
        intermediate_size max_position_embeddings mm_tokens_per_image num_attention_heads num_key_value_heads
        original_max_position_embeddings pad_token_id partial_rotary_factor query_pre_attn_scalar rms_norm_eps
        rope_local_base_freq rope_parameters rope_scaling rope_theta sliding_window_pattern text_config
        tie_word_embeddings use_bidirectional_attention use_cache vision_config vocab_size
    """),
    "olmo2": _names("""
        attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings num_attention_heads
        num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor
        rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "olmo3": _names("""
        attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings num_attention_heads
        num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor
        rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "smollm3": _names("""
        attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings mlp_bias no_rope_layer_interval
        no_rope_layers num_attention_heads num_key_value_heads original_max_position_embeddings
        pad_token_id partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta
        tie_word_embeddings use_cache use_sliding_window vocab_size
    """),
    "granite": _names("""
        attention_bias attention_dropout attention_multiplier bos_token_id embedding_multiplier
        eos_token_id head_dim hidden_act hidden_size initializer_range intermediate_size logits_scaling
        max_position_embeddings mlp_bias num_attention_heads num_key_value_heads
        original_max_position_embeddings pad_token_id partial_rotary_factor residual_multiplier
        rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "llama4_text": _names("""
        attention_bias attention_dropout attn_scale attn_temperature_tuning bos_token_id eos_token_id
        floor_scale head_dim hidden_act hidden_size image_size image_token_id initializer_range
        interleave_moe_layer_step intermediate_size intermediate_size_mlp max_position_embeddings
        moe_layers no_rope_layer_interval no_rope_layers num_attention_heads num_channels
        num_experts_per_tok num_key_value_heads num_local_experts original_max_position_embeddings
        output_attentions output_hidden_states output_router_logits pad_token_id partial_rotary_factor
        patch_size pixel_shuffle_ratio projector_dropout projector_input_dim projector_output_dim
        return_dict rms_norm_eps rope_parameters rope_scaling rope_theta router_aux_loss_coef
        router_jitter_noise text_config tie_word_embeddings use_cache use_qk_norm vision_config
        vocab_size
    """),
    "ministral3": _names("""
        attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size initializer_range
        intermediate_size max_position_embeddings num_attention_heads num_key_value_heads
        original_max_position_embeddings pad_token_id partial_rotary_factor rms_norm_eps rope_parameters
        rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "glm4": _names("""
        attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings num_attention_heads
        num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor
        rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings use_cache vocab_size
    """),
    "gpt_oss": _names("""
        attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
        initializer_range intermediate_size max_position_embeddings num_attention_heads num_experts
        num_experts_per_tok num_key_value_heads num_local_experts original_max_position_embeddings
        output_router_logits pad_token_id partial_rotary_factor rms_norm_eps rope_parameters
        rope_scaling rope_theta router_aux_loss_coef swiglu_alpha swiglu_limit tie_word_embeddings
        use_cache vocab_size
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
    "t5": _names("""
        classifier_dropout d_ff d_kv d_model decoder_start_token_id dense_act_fn dropout_rate eos_token_id
        feed_forward_proj head_dim hidden_size initializer_factor is_decoder is_encoder_decoder is_gated_act
        layer_norm_epsilon num_attention_heads num_decoder_layers num_heads num_labels num_layers pad_token_id
        problem_type relative_attention_max_distance relative_attention_num_buckets scale_decoder_outputs
        tie_word_embeddings use_cache vocab_size
    """),
    "mt5": _names("""
        bos_token_id classifier_dropout d_ff d_kv d_model decoder_start_token_id dense_act_fn dropout_rate
        eos_token_id feed_forward_proj head_dim hidden_size initializer_factor is_decoder is_encoder_decoder
        is_gated_act layer_norm_epsilon num_attention_heads num_decoder_layers num_heads num_labels num_layers
        pad_token_id problem_type relative_attention_max_distance relative_attention_num_buckets
        tie_word_embeddings use_cache vocab_size
    """),
    "vit": _names("""
        attention_probs_dropout_prob encoder_stride head_dim hidden_act hidden_dropout_prob hidden_size
        image_size initializer_range intermediate_size layer_norm_eps num_attention_heads num_channels
        num_labels patch_size pooler_act pooler_output_size qkv_bias
    """),
}


def reads(model_type: str, name: str) -> bool:
    """Whether transformers reads a field of config.json for a model_type."""
    return name in SHARED or name in OWN[model_type]
