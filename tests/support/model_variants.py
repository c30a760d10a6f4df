"""Settings of every family's class that change its cache or its weights, over the class's own defaults.

tests/kvsim/test_model_oracle.py builds each on the ``meta`` device; a family that is not here is built as its defaults
say.
"""

from __future__ import annotations

from typing import Any

STEP3 = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "share_expert_dim": 48,
}
SMALL_LATENT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
LONGCAT_LACKS = ("num_hidden_layers", "intermediate_size", "moe_intermediate_size")
LAST_SPARSE = ["dense"] * 3 + ["sparse"] * 2
ROPE = {"rope_type": "default", "rope_theta": 1e4}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ministral": [{"head_dim": 128}],
    "sarvam_moe": [{}, {"use_qk_norm": False, "attention_bias": True, "n_shared_experts": 2}],
    "sarvam_mla": [{}, {"q_lora_rank": 1536, "first_k_dense_replace": 3}],
    "hyperclovax": [{}, {"use_post_norm": False}],
    "cohere2_moe": [
        {"num_hidden_layers": 6, "num_shared_experts": 2},
        {
            "num_hidden_layers": 6,
            "prefix_dense_intermediate_size": 512,
            "num_key_value_heads": 8,
            "first_k_dense_replace": 2,
        },
    ],
    "lfm3": [{}, {"conv_bias": True, "attention_bias": True}],
    "solar_open": [{}, {"attention_bias": True}],
    "exaone": [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}],
    "hy_v3": [{}, {"num_shared_experts": 2}],
    "nemotron": [{"num_key_value_heads": 8}],
    "hunyuan_v1_dense": [{"head_dim": 128}],
    "hunyuan_v1_moe": [{"head_dim": 128, "num_experts": 4}],
    "deepseek_v2": [
        {**SMALL_LATENT, "num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "first_k_dense_replace": 1},
        {**SMALL_LATENT, "num_experts_per_tok": 2, "q_lora_rank": None, "first_k_dense_replace": 1},
    ],
    "biogpt": [{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}],
    "lfm2": [
        {},
        {"full_attn_idxs": [2, 5], "num_hidden_layers": 8},
        {"full_attn_idxs": [2, 5], "num_hidden_layers": 8, "block_auto_adjust_ff_dim": False, "conv_bias": True},
    ],
    "lfm2_moe": [{"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}],
    "granitemoehybrid": [
        {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
        {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2, "num_local_experts": 0},
    ],
    "bamba": [
        {"attn_layer_indices": [1, 4]},
        {"attn_layer_indices": [1, 4], "mamba_conv_bias": False, "mamba_proj_bias": True, "mlp_bias": True},
    ],
    "falcon_h1": [
        {},
        {"mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_d_head": "auto"},
        {"mamba_d_ssm": 2048, "mamba_d_head": 16},
        {"mamba_proj_bias": True},
        {"projectors_bias": True},
    ],
    "glm_moe_dsa": [{}, {"index_topk_freq": 4, "index_skip_topk_offset": 3}],
    "gemma4_text": [
        {},
        {"num_kv_shared_layers": 10},
        {"num_kv_shared_layers": 10, "use_double_wide_mlp": True},
        {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
        {"hidden_size_per_layer_input": 0},
        {"per_layer_config": {}},
    ],
    "gemma3n_text": [
        {},
        {"num_kv_shared_layers": 10, "num_hidden_layers": 30, "intermediate_size": 8192},
        {"num_kv_shared_layers": 0},
    ],
    "gemma3_text": [{}, {"sliding_window_pattern": 4}],
    "dots1": [
        {
            "num_key_value_heads": 8,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "head_dim": 128,
        }
    ],
    "jamba": [{}, {"num_experts": 1}, {"attn_layer_period": 4, "attn_layer_offset": 1, "mamba_dt_rank": "auto"}],
    "minimax": [{}, {"head_dim": 64}],
    "exaone4": [{}, {"sliding_window_pattern": 3}],
    "cohere2": [{}, {"sliding_window_pattern": 5}],
    "qwen3_moe": [{"head_dim": 128}, {"head_dim": 128, "use_sliding_window": True, "sliding_window": 64}],
    "qwen2_moe": [{}, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 10}],
    "qwen2": [{}, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 10}],
    "smollm3": [{}, {"use_sliding_window": True, "sliding_window": 64}],
    "laguna": [{}, {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}],
    "llama4_text": [
        {},
        {"num_hidden_layers": 4, "attention_chunk_size": None, "num_local_experts": 2},
        {"num_hidden_layers": 8, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "num_local_experts": 4},
    ],
    "recurrent_gemma": [{}, {"lru_width": 2560, "num_key_value_heads": 1}],
    "opt": [
        {},
        {"_remove_final_layer_norm": True},
        {"do_layer_norm_before": False},
        {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16},
    ],
    "stablelm": [{}, {"qk_layernorm": True, "use_qkv_bias": True, "num_key_value_heads": 8}],
    "ernie4_5_moe": [{}, {"moe_layer_start_index": 2, "moe_layer_interval": 2}],
    "mamba2": [{}, {"tie_word_embeddings": True, "use_bias": True}],
    "mamba": [{}, {"use_bias": True, "use_conv_bias": False}, {"intermediate_size": 1024}],
    "zamba2": [{}, {"attention_head_dim": 80}],
    "gemma4_unified_text": [{}, {"attention_k_eq_v": True, "num_global_key_value_heads": 2}],
    "olmo_hybrid": [{}, {"linear_num_key_heads": None}],
    "qwen3_next": [{}, {"mlp_only_layers": [0, 1], "decoder_sparse_step": 1}],
    "falcon": [
        {},
        {"new_decoder_architecture": True, "num_kv_heads": 1},
        {"multi_query": False, "bias": True, "parallel_attn": False},
    ],
    "deepseek_v4": [{}, {"compress_ratios": [0, 0, 4, 128, 4, 128], "num_hidden_layers": 6, "layer_types": None}],
    "nemotron_h": [{}, {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "use_bias": True}],
    "gpt_oss": [{}, {"attention_bias": False}],
    "minicpm3": [{}],
    "kimi_linear": [{}, {"q_lora_rank": 256}],
    "mimo_v2_flash": [{}, {"attention_bias": True}],
    "longcat_flash": [
        {
            **{key: value for key, value in SMALL_LATENT.items() if key not in LONGCAT_LACKS},
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "head_dim": 16,
            "moe_topk": 2,
            "zero_expert_num": 4,
            "expert_ffn_hidden_size": 32,
        }
    ],
    "exaone_moe": [{}, {"first_k_dense_replace": 3, "num_shared_experts": 2}],
    "beam": [
        {"num_hidden_layers": 7, "attention_bias": True, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 5},
        {"num_hidden_layers": 4, "sliding_window": 16},
    ],
    "cohere_compass_text": [
        {"num_hidden_layers": 4, "num_key_value_heads": 8, "rope_parameters": {"full_attention": ROPE}},
        {
            "num_hidden_layers": 4,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        },
    ],
    "cosmos3_edge_text": [{"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}, {"num_hidden_layers": 2}],
    "ctrl": [{"n_layer": 2, "dff": 100}],
    "deepseek_ocr2_text": [
        {
            "num_hidden_layers": 2,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse"],
        }
    ],
    "doge": [
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "mlp_bias": True},
        {"num_hidden_layers": 2, "sliding_window": 16},
    ],
    "dory": [
        {
            "num_hidden_layers": 8,
            "n_input_layers": 2,
            "n_output_layers": 2,
            "n_recurrent_loops": 4,
            "sliding_window": 6,
        },
        {"num_hidden_layers": 8, "n_input_layers": 2, "n_output_layers": 2, "recurrent_kv_cache_mode": "last_loop"},
        {"num_hidden_layers": 6, "n_input_layers": 2, "n_output_layers": 2, "attention_bias": True, "mlp_bias": True},
    ],
    "dots3_note_text": [
        {"num_hidden_layers": 6},
        {
            "num_hidden_layers": 6,
            "swa_kv_lora_rank": 256,
            "swa_head_dim": 128,
            "swa_qk_nope_head_dim": 96,
            "swa_num_attention_heads": 32,
            "swa_num_key_value_heads": 32,
            "sliding_window_size": 6,
        },
        {"num_hidden_layers": 6, "use_dsa": False, "first_k_dense_replace": 2, "attention_bias": True},
        {"num_hidden_layers": 3, "use_sliding_window": False},
    ],
    "ernie4_5_vl_moe_text": [{"num_hidden_layers": 3}],
    "flint": [
        {"num_hidden_layers": 7},
        {"num_hidden_layers": 7, "attention_bias": True, "mlp_only_layers": [0], "decoder_sparse_step": 2},
    ],
    "glm5_next_text": [
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
            "index_topk": 16,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "index_kpool": 4,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "pad_token_id": 0,
        }
    ],
    "glm_image_text": [{"num_hidden_layers": 2, "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}}],
    "glm_ocr_text": [{"num_hidden_layers": 2, "attention_bias": True}],
    "gpt_neox_japanese": [{"num_hidden_layers": 2}, {"num_hidden_layers": 2, "intermediate_multiple_size": 2}],
    "granite4_vision_text": [{"num_hidden_layers": 2, "num_key_value_heads": 8}],
    "granite_docling_text": [{"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}],
    "hrm_text": [
        {"num_hidden_layers": 3, "H_cycles": 3, "L_cycles": 1, "head_dim": 64},
        {"num_hidden_layers": 2, "mlp_bias": True, "tie_word_embeddings": True},
    ],
    "hunyuan_vl_text": [
        {"num_hidden_layers": 2, "head_dim": 128, "rope_parameters": {**ROPE, "mrope_section": [16, 16, 16, 16]}}
    ],
    "hy_v4": [{"num_hidden_layers": 6, "attention_bias": True}, {"num_hidden_layers": 4, "hc_mult": 2}],
    "hy_v4_vl_text": [{"num_hidden_layers": 6}],
    "inkling_text": [
        {"num_hidden_layers": 6},
        {
            "num_hidden_layers": 7,
            "local_layer_ids": [0, 2, 4],
            "dense_mlp_idx": 2,
            "unpadded_vocab_size": 1000,
            "swa_num_attention_heads": 32,
            "swa_head_dim": 64,
            "conv_kernel_size": 3,
            "sliding_window_size": 6,
        },
        {"num_hidden_layers": 6, "dense_mlp_idx": 1, "dense_intermediate_size": 512, "intermediate_size": 256},
    ],
    "inkling2_text": [
        {
            "num_hidden_layers": 7,
            "swa_num_attention_heads": 32,
            "swa_num_key_value_heads": 4,
            "rel_extent": 64,
            "sliding_window_size": 6,
        },
        {"num_hidden_layers": 3, "layer_types": ["hybrid", "hybrid_sliding", "hybrid"]},
    ],
    "inkling2_loop_text": [
        {
            "num_hidden_layers": 12,
            "n_layers_per_attn_res_block": 3,
            "loop_layer_index_start": 3,
            "loop_layer_index_end": 6,
            "loop_num_passes": 4,
        },
        {"num_hidden_layers": 18, "loop_config": {"core_start": 6, "core_end": 12, "num_passes": 2, "gate_rank": 8}},
    ],
    "jetmoe": [
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 16,
            "intermediate_size": 48,
            "num_local_experts": 4,
        }
    ],
    "kolibri1": [{"num_hidden_layers": 7, "sliding_window": 6, "num_experts": 8}],
    "lara_mini": [
        {"num_hidden_layers": 7},
        {"num_hidden_layers": 5, "attention_bias": True, "linear_num_value_heads": 8},
    ],
    "mistral_large4_text": [
        {
            "num_hidden_layers": 8,
            "kv_source_layers": [0, 1, 1, 3, 4, 4, 4, 3],
            "indexer_types": ["full", "full", "shared", "full", "full", "shared", "full", "shared"],
        },
        {"num_hidden_layers": 6, "index_topk_freq": 3, "first_k_dense_replace": 2, "no_rope_layer_interval": 2},
    ],
    "mllama_text_model": [{"num_hidden_layers": 6, "cross_attention_layers": [2, 4], "pad_token_id": 0}],
    "modernbert-decoder": [
        {"num_hidden_layers": 5, "global_attn_every_n_layers": 2, "local_attention": 9, "attention_bias": True},
        {"num_hidden_layers": 2, "decoder_bias": False},
    ],
    "molmo2_text": [{"num_hidden_layers": 2, "qkv_bias": True}, {"num_hidden_layers": 2, "additional_vocab_size": 0}],
    "muse_glimmer_text": [{"num_hidden_layers": 6, "sliding_window": 6}],
    "muse_spark_text": [
        {
            "num_hidden_layers": 5,
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse"],
            "moe_hidden_size": 128,
        }
    ],
    "paddleocr_vl_text": [{"num_hidden_layers": 2}],
    "qwen4_exp_text": [
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "ple_layer_ids": [1, 3],
            "eos_token_id": 1,
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 32,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 50,
            "hc_lowrank": 8,
            "pad_token_id": 0,
        }
    ],
    "qwen2_vl_text": [{"num_hidden_layers": 2, "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}}],
    "qwen2_5_vl_text": [{"num_hidden_layers": 2, "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}}],
    "qwen3_vl_text": [{"num_hidden_layers": 2}],
    "qwen3_vl_moe_text": [{"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}],
    "glm4v_text": [{"num_hidden_layers": 2, "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}}],
    "glm4v_moe_text": [
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "head_dim": 128,
            "rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]},
        }
    ],
    "chameleon": [{"num_hidden_layers": 2, "num_key_value_heads": 8, "vocabulary_map": {"<image>": 3}}],
    "step3p5": [
        {
            "num_hidden_layers": 5,
            "sliding_window": 6,
            "num_sliding_attention_heads": 6,
            **STEP3,
            "mlp_layer_types": LAST_SPARSE,
            "layer_types": ["full_attention"] + ["sliding_attention"] * 4,
        },
        {"num_hidden_layers": 5, "moe_layers_enum": "2,3", "sliding_window": 6, **STEP3},
    ],
    "voxtral_realtime_text": [{"num_hidden_layers": 2, "sliding_window": 6}],
    "unlimited_ocr_text": [{"num_hidden_layers": 2}],
    "xlstm": [{"num_hidden_layers": 2}],
    "zaya": [
        {
            "num_hidden_layers": 4,
            "layer_types": ["hybrid", "hybrid_sliding"] * 2,
            "sliding_window": 6,
            "cca_time0": 3,
            "lm_head_bias": True,
            "num_experts": 4,
            "router_hidden_size": 32,
        }
    ],
    "afmoe": [{}, {"num_dense_layers": 3, "global_attn_every_n_layers": 3}],
}

ON_CPU = ("biogpt", "deepseek_v2", "glm5_next_text", "jetmoe", "longcat_flash", "qwen4_exp_text", "step3p5")
"""Families whose forward pass needs data: small ones with random weights."""

SKIPPED: dict[str, str] = {
    "qwen3_omni_moe_talker_text": "in no AutoModel by itself",
    "glm4_moe": "its class's defaults are no model (96 heads of a width of 4,096)",
    "dbrx": "its class does not start in 5.23 (rope_theta)",
    "emu3_text_model": "its whole model does not start in 5.24 (pad_token_id), and it is in no AutoModel",
    "mistral4": "in no AutoModel; a catalogue row is built by its class",
    "qwen2_5_omni_text": "in no AutoModel by itself",
    "qwen3_omni_moe_text": "in no AutoModel by itself",
}
"""Families that cannot be built alone, and why."""

_EXPANDED = "5.17 caches the keys and values of sparse attention expanded to every head"
_DATA = "5.17 reads a number from a tensor, which has none here"
EARLIER: dict[str, tuple[tuple[int, int], str]] = {
    "llama4_text": ((5, 24), "a chunk size of null is no model before 5.24"),
    "deepseek_v32": ((5, 23), _EXPANDED),
    "glm_moe_dsa": ((5, 23), _EXPANDED),
    "axk2": ((5, 23), _EXPANDED),
    "hy_v4": ((5, 23), _EXPANDED),
    "glm5_next_text": ((5, 23), _EXPANDED),
    "qwen4_exp_text": ((5, 24), "5.17 keeps no positions beside the index keys"),
    "opt": ((5, 23), _DATA),
    "aria_text": ((5, 23), _DATA),
}
"""Families whose class was another before a version of transformers, and what it did."""

NO_CACHE: dict[str, str] = {
    "openai-gpt": "its class keeps no cache",
    "xlstm": "the state lies in another object",
    "voxtral_realtime_text": "its forward asks for sound",
    "granite4_vision_text": "its forward reads a number from a tensor",
    "glm_image_text": "a rotary section that its class's defaults do not have",
    "recurrent_gemma": "the state lies in its modules",
    "rwkv": "another output",
}
"""Families whose forward pass leaves no cache to weigh on the ``meta`` device; their parameters are compared."""

RECORDED = (
    "beam", "cohere_compass_text", "cosmos3_edge_text", "ctrl", "deepseek_ocr2_text", "doge", "dory",
    "dots3_note_text", "ernie4_5_vl_moe_text", "flint", "glm5_next_text", "glm_image_text", "glm_ocr_text",
    "gpt_neox_japanese", "granite4_vision_text", "granite_docling_text", "hrm_text", "hunyuan_vl_text", "hy_v4",
    "hy_v4_vl_text", "inkling2_loop_text", "inkling2_text", "inkling_text", "jetmoe", "kolibri1", "lara_mini",
    "mistral_large4_text", "mllama_text_model", "modernbert-decoder", "molmo2_text", "muse_glimmer_text",
    "muse_spark_text", "paddleocr_vl_text", "phi4_multimodal", "qwen4_exp_text", "unlimited_ocr_text", "xlstm",
    "zaya",
)  # fmt: skip
"""Families whose figures tests/support/model_types.json keeps, as an older transformers may lack their class."""
