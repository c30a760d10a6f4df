"""The model families that the cache is run under: one row each, as tiny seeded random models.

tests/kvruntime/test_hf_models.py runs every row; the tables of docs/models.md are tests/support/hf_tables.py.
"""

from __future__ import annotations

from functools import cache

import torch
import transformers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GQA = {**SMALL, "num_key_value_heads": 2}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
OPT = {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[str, dict[str, object], str]] = {
    "GPT-2": ("GPT2Config", GPT, "multi-head, learned positions"),
    "GPT-BigCode": ("GPTBigCodeConfig", GPT, "multi-query"),
    "GPT-NeoX": ("GPTNeoXConfig", SMALL, "multi-head, partial RoPE; Pythia"),
    "OPT": ("OPTConfig", OPT, "multi-head, query scaled beforehand"),
    "Llama": ("LlamaConfig", GQA, "grouped-query; Llama 2 and 3, SmolLM2, Yi, DeepSeek-LLM"),
    "Mistral": ("MistralConfig", {**GQA, "sliding_window": None}, "grouped-query, without a sliding window"),
    "Mixtral": ("MixtralConfig", {**GQA, "sliding_window": None, "num_local_experts": 4}, "grouped-query, experts"),
    "Qwen2": ("Qwen2Config", GQA, "grouped-query, biases; Qwen2 and 2.5"),
    "Qwen3": ("Qwen3Config", {**GQA, "head_dim": 64}, "grouped-query, normalized queries and keys"),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        {**GQA, **EXPERTS, "head_dim": 32, "moe_intermediate_size": 32},
        "grouped-query, experts",
    ),
    "Phi": ("PhiConfig", GQA, "partial RoPE; Phi-1, 1.5 and 2"),
    "Phi-3": ("Phi3Config", GQA, "fused projections; Phi-3 and 4 without a sliding window"),
    "OLMo": ("OlmoConfig", GQA, "clipped projections"),
    "OLMo 2": ("Olmo2Config", GQA, "normalized queries and keys"),
    "OLMoE": ("OlmoeConfig", {**GQA, **EXPERTS}, "experts"),
    "Gemma": ("GemmaConfig", {**GQA, "num_key_value_heads": 1, "head_dim": 256}, "multi-query, head dimension 256"),
    "StarCoder2": ("Starcoder2Config", {**GQA, "sliding_window": None}, "grouped-query, without a sliding window"),
    "Cohere": ("CohereConfig", GQA, "parallel blocks; Command R"),
    "Granite": ("GraniteConfig", GQA, "attention multiplier"),
    "GLM": ("GlmConfig", {**GQA, "head_dim": 32}, "partial RoPE; GLM-4"),
    "SmolLM3": ("SmolLM3Config", GQA, "layers without RoPE"),
    "Nemotron": ("NemotronConfig", GQA, "partial RoPE"),
    "Persimmon": ("PersimmonConfig", SMALL, "multi-head, normalized queries and keys"),
    "Helium": ("HeliumConfig", {**GQA, "head_dim": 32}, "grouped-query"),
    "Qwen2-MoE": (
        "Qwen2MoeConfig",
        {**GQA, **EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "grouped-query, experts and a shared one",
    ),
    "Phi-3.5-MoE": (
        "PhimoeConfig",
        {**GQA, "sliding_window": None, "num_local_experts": 2, "num_experts_per_tok": 1},
        "grouped-query, experts; the host makes its rotary table, so no step is a CUDA graph",
    ),
    "GLM-4.5": (
        "Glm4MoeConfig",
        {
            **GQA,
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
        "partial RoPE, experts",
    ),
    "MiniMax-M2": (
        "MiniMaxM2Config",
        {**GQA, "head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "rotary_dim": 16},
        "normalized queries and keys, experts",
    ),
    "ERNIE 4.5": ("Ernie4_5Config", {**GQA, "head_dim": 32}, "grouped-query"),
    "Seed-OSS": ("SeedOssConfig", {**GQA, "head_dim": 32}, "grouped-query, biases"),
    "Apertus": ("ApertusConfig", {**GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "normalized"),
}
"""Family -> (transformers config class, its arguments, what is particular about it)."""

MOE = {**GQA, "head_dim": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MOE_HUNYUAN = {**GQA, "head_dim": 32, "num_experts": 4, "moe_topk": 2}
MOE_GRANITE = {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}
DBRX = {
    "vocab_size": VOCAB,
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 128},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
ALL = "every layer"
MORE: dict[str, tuple[str, dict[str, object], str, str]] = {
    "BitNet": ("BitNetConfig", GQA, f"{ALL}: grouped-query", ""),
    "DBRX": ("DbrxConfig", DBRX, f"{ALL}: clipped projections, experts", ""),
    "GLM-4-0414": ("Glm4Config", {**GQA, "head_dim": 32}, f"{ALL}: partial RoPE", ""),
    "ERNIE 4.5 MoE": ("Ernie4_5_MoeConfig", {**MOE, "moe_num_experts": 4, "moe_k": 2}, f"{ALL}: experts", ""),
    "dots.llm1": ("Dots1Config", {**MOE, **GROUPS}, f"{ALL}: normalized queries and keys, experts", ""),
    "Hunyuan": ("HunYuanDenseV1Config", {**GQA, "head_dim": 32}, f"{ALL}: normalized queries and keys", ""),
    "Hunyuan-MoE": ("HunYuanMoEV1Config", MOE_HUNYUAN, f"{ALL}: experts", ""),
    "Arcee": ("ArceeConfig", GQA, f"{ALL}: grouped-query; AFM-4.5B", ""),
    "Ministral 3": ("Ministral3Config", {**GQA, "head_dim": 32, "sliding_window": None}, f"{ALL}: grouped-query", ""),
    "Granite-MoE": ("GraniteMoeConfig", MOE_GRANITE, f"{ALL}: experts", ""),
    "FlexOlmo": ("FlexOlmoConfig", {**GQA, **EXPERTS}, f"{ALL}: normalized queries and keys, experts", ""),
    "EXAONE 4": (
        "Exaone4Config",
        {**GQA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "full attention without RoPE",
        "windows",
    ),
    "LFM2-MoE": (
        "Lfm2MoeConfig",
        {**MOE, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        "full attention",
        "convolutions",
    ),
}
"""Families that are run by one short generation each: -> (config class, its arguments, what is packed, what stays)."""


@cache
def tiny(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The family's tiny model, seeded; every caller gets the same object."""
    config_class, arguments, *_ = {**MODELS, **MORE}[family]
    torch.manual_seed(7)
    config_class = getattr(transformers, config_class)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments)).eval().to(DEVICE, dtype)
    with torch.no_grad():  # default weights are near zero: larger ones make attention, and so the cache, matter
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "emb" not in name and "wte" not in name and "wpe" not in name:
                weight.mul_(4)
    model.generation_config.eos_token_id = None
    return model


def prompt(batch_size: int, length: int, padding: tuple[int, ...] = (), seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids and their attention mask; row b begins with ``padding[b]`` padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}
