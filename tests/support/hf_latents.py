"""Model families with multi-head latent attention: one row each, as tiny seeded random models.

tests/kvruntime/test_hf_latents.py runs every row; docs/models.md's table of kvruntime has them.
"""

from __future__ import annotations

from functools import cache

import torch
import transformers
from hf_models import DEVICE, SMALL

MLA = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
}

LATENTS: dict[str, tuple[str, dict[str, object], str]] = {
    "DeepSeek-V2": ("DeepseekV2Config", MLA, "DeepSeek-V2 and its Lite"),
    "DeepSeek-V3": ("DeepseekV3Config", MLA, "DeepSeek-V3, R1, Kimi K2"),
    "GLM-4.7-Flash": ("Glm4MoeLiteConfig", {**MLA, "mlp_layer_types": ["dense", "dense"]}, "GLM-4.7-Flash"),
    "Youtu": ("YoutuConfig", MLA, "Youtu-LLM"),
}
"""Family -> (transformers config class, its arguments, which models)."""


@cache
def latent(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The family's tiny model, seeded; every caller gets the same object."""
    config_class, arguments, _ = LATENTS[family]
    torch.manual_seed(7)
    config = getattr(transformers, config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(DEVICE, dtype)
    with torch.no_grad():  # default weights are near zero: larger ones make attention, and so the cache, matter
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "attn" in name:
                weight.mul_(6)
    model.generation_config.eos_token_id = None
    return model
