"""Keys of published ``config.json`` files that inference does not read: there is nothing to tell of them."""

from __future__ import annotations

GENERIC = """
_name_or_path add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty
max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
output_attentions output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
"""Those that transformers writes into any file."""
TRANSFORMER = """
attn_drop_rate context_norm_scale diffusion_batch_mul diffusion_head_repeats drop_path_rate drop_rate
flash_if_available fused_if_available latent_condition_weight vae_path
"""
TOKENIZER = "disable_quant_resi dropout freeze_codebook_for_hybrid hybrid levels test_mode using_znorm"
TEXT_ENCODER = """
attention_dropout head_dim hidden_act image_token_id initializer_range layer_types max_position_embeddings
max_window_layers rope_parameters rope_scaling sliding_window text_config use_mrope use_sliding_window
video_token_id vision_config vision_end_token_id vision_start_token_id vision_token_id
"""
"""Some of them are looked at by :mod:`hart_runtime.common.qwen2_config`."""


def unread(network: str) -> frozenset[str]:
    """Of one of these networks, with those of every file."""
    return frozenset(GENERIC.split() + network.split())
