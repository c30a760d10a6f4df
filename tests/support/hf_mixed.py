"""Model families that mix kinds of layers or change attention scores: one row each, as tiny seeded random models.

tests/kvruntime/test_hf_mixed.py runs every row; docs/models.md's table of kvruntime is made of them.
"""

from __future__ import annotations

from functools import cache

import torch
import transformers
from hf_models import DEVICE, GQA

WINDOW = 16
SLIDES = {**GQA, "num_hidden_layers": 3, "sliding_window": WINDOW}
SLIDES["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**SLIDES, "head_dim": 32, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
DELTA = {
    **GQA,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16}
GEMMA4 = {**GEMMA, "num_kv_shared_layers": 0, "global_head_dim": 64, "hidden_size_per_layer_input": 0}
LLAMA4 = {
    **GQA,
    "head_dim": 32,
    "attention_chunk_size": WINDOW,
    "num_local_experts": 2,
    "intermediate_size_mlp": 32,
    "layer_types": ["chunked_attention", "full_attention"],
}
QWEN2 = {**GQA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

MIXED: dict[str, tuple[str, dict[str, object], str, str]] = {
    "Qwen2, later layers slide": ("Qwen2Config", QWEN2, "full attention", "windows"),
    "Gemma 2": ("Gemma2Config", GEMMA, "full attention, soft-capped scores", "windows"),
    "Gemma 3": ("Gemma3TextConfig", GEMMA, "full attention", "windows"),
    "Gemma 4": ("Gemma4TextConfig", GEMMA4, "full attention, heads of their own dimension", "windows"),
    "Olmo 3": ("Olmo3Config", SLIDES, "full attention", "windows"),
    "Cohere 2": ("Cohere2Config", SLIDES, "full attention; Command A and R7B", "windows"),
    "gpt-oss": (
        "GptOssConfig",
        {**SLIDES, "head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {}},
        "full attention with learned sinks",
        "windows, with the same sinks",
    ),
    "MiMo-V2-Flash": (
        "MiMoV2FlashConfig",
        {**SLIDES, "head_dim": 192, "v_head_dim": 128, "num_experts": 2, "layer_types": None},
        "full attention, keys and values of unlike dimensions",
        "windows with sinks",
    ),
    "Llama 4": ("Llama4TextConfig", LLAMA4, "full attention without RoPE", "chunks"),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
        "gated full attention",
        "gated delta nets",
    ),
    "Qwen3.5": ("Qwen3_5TextConfig", DELTA, "gated full attention; Qwen3.5 and 3.6", "gated delta nets"),
    "Olmo Hybrid": ("OlmoHybridConfig", GQA, "full attention", "gated delta nets"),
    "LFM2": ("Lfm2Config", {**GQA, "layer_types": ["conv", "full_attention"]}, "full attention", "convolutions"),
    "Granite 4": (
        "GraniteMoeHybridConfig",
        {**GQA, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "num_local_experts": 2},
        "full attention",
        "Mamba 2 states",
    ),
    "Nemotron-H": (
        "NemotronHConfig",
        {
            **GQA,
            "layers_block_type": ["mamba", "attention"],
            "head_dim": 32,
            "n_groups": 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
        },
        "full attention",
        "Mamba 2 states",
    ),
    "Bamba": ("BambaConfig", {**GQA, **MAMBA, "attn_layer_indices": [1]}, "full attention", "Mamba 2 states"),
    "Falcon-H1": (
        "FalconH1Config",
        {**GQA, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16},
        "full attention in every layer",
        "Mamba 2 states in every layer",
    ),
    "Jamba": (
        "JambaConfig",
        {
            **GQA,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
        },
        "full attention",
        "Mamba states",
    ),
}
"""Family -> (transformers config class, its arguments, what is packed, what stays as it is)."""


@cache
def mixed(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The family's tiny model, seeded; every caller gets the same object."""
    config_class, arguments, _, _ = MIXED[family]
    torch.manual_seed(7)
    config = getattr(transformers, config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(DEVICE, dtype)
    with torch.no_grad():  # default weights are near zero: larger ones make attention, and so the cache, matter
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "emb" not in name and "attn" in name:
                weight.mul_(4)
            if name.endswith("sinks"):
                weight.normal_()
    model.generation_config.eos_token_id = None
    return model
