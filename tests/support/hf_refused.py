"""Models that no cache runs under: one row each, and the table of docs/models.md that says why.

tests/kvruntime/test_hf_refused.py holds every row's message.
"""

from __future__ import annotations

import transformers
from hf_models import GQA, SMALL

from kvruntime import make_cache

MLA = {
    **SMALL,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
REFUSED = {
    "MLA": ("DeepseekV3Config", MLA, r"multi-head latent attention \(config key kv_lora_rank = 16\)"),
    "chunks alone": (
        "Llama4TextConfig",
        {**GQA, "head_dim": 32, "attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 32},
        "nothing to pack, its layers are sliding or chunked windows only",
    ),
    "windows alone": ("MistralConfig", {**GQA, "sliding_window": 64}, "nothing to pack, its layers are sliding or"),
    "shared layers": (
        "Gemma3nTextConfig",
        {**GQA, "head_dim": 32, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8},
        r"layers that share another's cache \(config key num_kv_shared_layers = 1\)",
    ),
    "no interface": ("FalconConfig", SMALL, "does not go through transformers' attention interface"),
    "state space": (
        "MambaConfig",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
        "MambaForCausalLM is not supported: nothing to pack, its layers are linear-attention or state-space",
    ),
    "split values": (
        "DiffLlamaConfig",
        GQA,
        r"DiffLlamaAttention works on what the cache gives before it attends \(torch\.chunk\(value_states, 2",
    ),
    "a mask made of values": (
        "DogeConfig",
        {**GQA, "sliding_window": None},
        r"DogeAttention works on what the cache gives before it attends \(value_states\.transpose",
    ),
    "repeated heads": (
        "JetMoeConfig",
        {**GQA, "kv_channels": 32, "num_local_experts": 2, "num_experts_per_tok": 2},
        r"JetMoeAttention works on what the cache gives before it attends \(key_states\.repeat",
    ),
    "cross-attention": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 97, "add_cross_attention": True},
        r"cross-attention \(config key add_cross_attention",
    ),
}
"""What stands in the way -> (transformers config class, its arguments, the message)."""


def refused(reason: str) -> tuple[object, str]:
    """The model, and what make_cache says of it."""
    config_class, arguments, _ = REFUSED[reason]
    config = getattr(transformers, config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    try:
        make_cache(model)
    except ValueError as error:
        return model, str(error)
    return model, ""


def refused_table() -> str:
    """In Markdown."""
    lines = ["| what stands in the way | for example | the line that says so |", "|---|---|---|"]
    for reason, (config_class, _, _) in REFUSED.items():
        said = refused(reason)[1].partition(" is not supported: ")[2]
        lines.append(f"| {reason} | `{config_class.removesuffix('Config')}` | {said} |")
    return "\n".join(lines)
