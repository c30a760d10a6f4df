"""What each ``model_type`` of a config.json means: which keys hold the numbers, and what a layer is made of.

One row a family, read from the model's class in transformers 5.17 to 5.23.  :mod:`kvsim.model` reads the
keys, :mod:`kvsim.parameters` counts the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Switch = bool | tuple[str, bool]
"""A fact of the family, or ``(config key, its value where the key is absent)``."""


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts block: the config keys of its sizes, and which layers have it."""

    count: str = "num_local_experts"
    inner: str = "intermediate_size"
    shared_inner: str | None = None  # key: width of the shared expert, which has a gate of its own
    shared_count: str | None = None  # key: number of shared experts as wide as a routed one
    stepped: bool = False  # decoder_sparse_step and mlp_only_layers choose the layers
    first_dense: str | None = None  # key: number of leading layers with a plain MLP


@dataclass(frozen=True)
class Family:
    """How to read one ``model_type``.  The defaults are Llama's."""

    num_layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    num_q_heads: str = "num_attention_heads"
    num_kv_heads: str | None = "num_key_value_heads"  # None: as many as query heads
    kv_heads_required: bool = True  # False: an absent key means as many as query heads
    head_dim: str | None = "head_dim"  # None: always hidden size / query heads
    head_dim_required: bool = False  # True: transformers would fill in a number of its own
    positions: str = "max_position_embeddings"
    inner: str = "intermediate_size"
    inner_required: bool = True  # False: an absent key means 4 x hidden size
    multi_query: str | None = None  # key of a switch (on where absent): one key/value head
    window: str | None = None  # "plain": sliding_window; "required": the same, and absent means a window; "switched"
    # What follows only serves the parameter count.
    countable: bool = True
    tied: bool = False
    learned_positions: bool = False
    norm_vectors: int = 1  # weight; 2: weight and bias; 0: a norm without parameters
    norms: int = 2  # norms a layer
    gated: bool = True
    qkv_bias: Switch = False
    out_bias: Switch = False
    mlp_bias: Switch = False
    head_bias: Switch = False
    qk_norm: str | None = None  # "head": over head_dim; "full": over all heads of a token
    qk_norm_if: Switch = True
    experts: Experts | None = None


ATTENTION_BIAS = ("attention_bias", False)
MLP_BIAS = ("mlp_bias", False)

_GPT2 = Family(
    num_layers="n_layer",
    hidden="n_embd",
    num_q_heads="n_head",
    num_kv_heads=None,
    head_dim=None,
    positions="n_positions",
    inner="n_inner",
    inner_required=False,
    tied=True,
    learned_positions=True,
    norm_vectors=2,
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
_LLAMA = Family(kv_heads_required=False, qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS, mlp_bias=MLP_BIAS)
_QWEN2 = Family(window="switched", qkv_bias=True)
_QWEN3 = Family(
    head_dim_required=True, window="switched", qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS, qk_norm="head"
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, multi_query="multi_query"),
    "gptj": replace(
        _GPT2, tied=False, learned_positions=False, norms=1, qkv_bias=False, out_bias=False, head_bias=True
    ),
    "gpt_neox": Family(
        num_kv_heads=None,
        head_dim=None,
        norm_vectors=2,
        gated=False,
        qkv_bias=("attention_bias", True),
        out_bias=("attention_bias", True),
        mlp_bias=True,
    ),
    "llama": _LLAMA,
    "mistral": Family(window="required"),
    "ministral3": Family(head_dim_required=True, window="plain"),
    "mixtral": Family(window="plain", experts=Experts()),
    "qwen2": _QWEN2,
    "mimo": _QWEN2,
    "qwen2_moe": replace(
        _QWEN2,
        qkv_bias=("qkv_bias", True),
        experts=Experts(
            "num_experts", "moe_intermediate_size", shared_inner="shared_expert_intermediate_size", stepped=True
        ),
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, experts=Experts("num_experts", "moe_intermediate_size", stepped=True)),
    "gemma": Family(head_dim_required=True, tied=True, qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS),
    "phi": Family(
        kv_heads_required=False,
        head_dim=None,
        norm_vectors=2,
        norms=1,
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm="head",
        qk_norm_if=("qk_layernorm", False),
    ),
    "phi3": Family(kv_heads_required=False, window="plain"),
    "phimoe": Family(
        window="plain",
        norm_vectors=2,
        qkv_bias=ATTENTION_BIAS,
        out_bias=ATTENTION_BIAS,
        head_bias=("lm_head_bias", False),
        experts=Experts(),
    ),
    "olmo": Family(kv_heads_required=False, norm_vectors=0, qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS),
    "olmo2": Family(kv_heads_required=False, qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS, qk_norm="full"),
    "olmoe": Family(
        kv_heads_required=False,
        qkv_bias=ATTENTION_BIAS,
        out_bias=ATTENTION_BIAS,
        qk_norm="full",
        experts=Experts("num_experts"),
    ),
    "falcon": Family(
        num_kv_heads="num_kv_heads",
        head_dim=None,
        inner="ffn_hidden_size",
        inner_required=False,
        tied=True,
        norm_vectors=2,
        gated=False,
        qkv_bias=("bias", False),
        out_bias=("bias", False),
        mlp_bias=("bias", False),
    ),
    "cohere": Family(
        kv_heads_required=False,
        tied=True,
        norms=1,
        qkv_bias=ATTENTION_BIAS,
        out_bias=ATTENTION_BIAS,
        qk_norm="full",
        qk_norm_if=("use_qk_norm", False),
    ),
    "nemotron": Family(
        kv_heads_required=False,
        norm_vectors=2,
        gated=False,
        qkv_bias=ATTENTION_BIAS,
        out_bias=ATTENTION_BIAS,
        mlp_bias=MLP_BIAS,
    ),
    "glm4_moe": Family(
        head_dim_required=True,
        qkv_bias=ATTENTION_BIAS,
        qk_norm="head",
        qk_norm_if=("use_qk_norm", False),
        experts=Experts(
            "n_routed_experts",
            "moe_intermediate_size",
            shared_count="n_shared_experts",
            first_dense="first_k_dense_replace",
        ),
    ),
    "minimax_m2": Family(head_dim_required=True, qk_norm="full", experts=Experts()),
    "minimax_m3": Family(head_dim_required=True, countable=False),
    "smollm3": Family(
        window="switched", tied=True, qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS, mlp_bias=MLP_BIAS
    ),
    "starcoder2": Family(
        window="plain",
        tied=True,
        norm_vectors=2,
        gated=False,
        qkv_bias=("use_bias", True),
        out_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
    ),
    "seed_oss": Family(
        head_dim_required=True,
        qkv_bias=("attention_bias", True),
        out_bias=("attention_out_bias", False),
        mlp_bias=MLP_BIAS,
    ),
    "ernie4_5": Family(
        head_dim_required=True,
        tied=True,
        qkv_bias=("use_bias", False),
        out_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
    ),
}

WRAPPERS = ("mistral3", "ministral3")
"""Outer model types whose ``text_config`` is a plain decoder of the table above."""
