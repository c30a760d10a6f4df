"""Models that mix attention and recurrence, and those with recurrence alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import isqrt

from kvsim.models import layer_kinds
from kvsim.models.attention import Attention, Latent, PooledIndex
from kvsim.models.config import MAX_LAYERS, Body
from kvsim.models.families.family import (
    ATTENTION_BIAS,
    LENIENT,
    MLP_BIAS,
    NORMED,
    Family,
    _plain_mlps,
    _slide,
)
from kvsim.models.families.llama import (
    _GRANITE_MOE,
    _SHARED_GATED,
)
from kvsim.models.feedforward import (
    Experts,
    Mlp,
    after,
    if_any,
    listed_or,
    periodic,
)
from kvsim.models.recurrent import (
    DelayedValue,
    DeltaNet,
    Kda,
    Lightning,
    Mamba,
    Mamba2,
    MLstm,
    NGramEmbedding,
    RgLru,
    Rwkv,
    ShortConv,
)


class WideAttention(Attention):
    """Zamba2's: it reads the layer's input beside the embedding, so its heads are twice as wide (where
    ``attention_head_dim`` does not say otherwise)."""

    def _head_dim(self, body: Body) -> int:
        given = body.reader.count_or_none("head_dim", "attention_head_dim")
        if given is not None:
            return given
        if 2 * body.hidden % body.num_q_heads:
            raise body.reader.error("num_attention_heads", f"allowed are divisors of twice hidden_size {body.hidden}")
        body.reader.sources["head_dim"] = f"2 x {body.reader.sources['hidden_size']} / num_attention_heads"
        return 2 * body.hidden // body.num_q_heads


class AdjustedMlp(Mlp):
    """LFM2's: two thirds of ``block_ff_dim``, scaled and rounded up (unless told not to)."""

    def width(self, body: Body) -> int:
        reader = body.reader
        inner = reader.count("intermediate_size", ("block_ff_dim", "intermediate_size"))
        if not reader.switch(("block_auto_adjust_ff_dim", True)):
            return inner
        scale, multiple = reader.value("block_ffn_dim_multiplier"), reader.value("block_multiple_of")
        inner = int(2 * inner / 3)
        if isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < 1000:
            inner = int(scale * inner)
        step = reader.count("block_multiple_of", "block_multiple_of", fill=True) if multiple else 1
        return step * -(-inner // step)


def qwen4_kinds(body: Body) -> list[str]:
    """Every ``full_attention_interval``-th layer has an indexer; the others are linear, some with an embedding of
    n-grams (``ple_layer_ids``, counted from 1)."""
    return _with_ngrams(body, layer_kinds.every("full_attention_interval", rest="linear", default=4)(body))


def _with_ngrams(body: Body, kinds: list[str]) -> list[str]:
    chosen = body.reader.indices("ple_layer_ids") or set()
    if not chosen <= {at + 1 for at, kind in enumerate(kinds) if kind == "linear"}:
        raise body.reader.error("ple_layer_ids", "allowed are numbers of linear layers, counted from 1")
    return ["ngram" if at + 1 in chosen else kind for at, kind in enumerate(kinds)]


def _qwen4_ngrams(body: Body, kinds: list[str]) -> None:
    kinds[:] = _with_ngrams(body, ["linear" if kind == "ngram" else kind for kind in kinds])


def _streams(body: Body) -> tuple[int, int]:
    """``(width of all residual streams, weights that mix them into one)``."""
    wide = body.reader.count("hc_count", "hc_count", fill=True) * body.hidden
    return wide, wide + 2 * wide * body.reader.count("hc_lowrank", "hc_lowrank", fill=True)


def _qwen4_layer(body: Body) -> int:
    """The hyper-connections around attention and experts."""
    wide, mixing = _streams(body)
    return 2 * (mixing + wide * wide // body.hidden)


@cache
def _primes_from(start: int, count: int) -> tuple[int, ...]:
    """The first ``count`` primes from ``start`` on."""
    out: list[int] = []
    number = start
    while len(out) < count:
        if number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1)):
            out.append(number)
        number += 1
    return tuple(out)


def _qwen4_tables(body: Body) -> int:
    """The hashed n-grams' embeddings: every head of every table has a prime number of rows, each another."""
    reader = body.reader
    chosen = reader.indices("ple_layer_ids")
    if not chosen:
        return 0
    keys = ("ngram_size", "heads_per_ngram", "ngram_vocab_size_base", "make_ngram_vocab_size_divisible_by")
    order, each, base, step = (reader.count(key, key, fill=True) for key in keys)
    heads = (order - 1) * each
    width = reader.count_or_none("ple_embed_dim", "ple_embed_dim") or body.hidden
    if heads < 1 or width % heads or heads * len(chosen) > MAX_LAYERS:
        raise reader.error("heads_per_ngram", f"allowed are divisors of the embedding's width {width}")
    primes = _primes_from(base, heads * len(chosen))
    rows = [sum(primes[at : at + heads]) for at in range(0, len(primes), heads)]
    return sum(-(-count // step) * step for count in rows) * (width // heads)


def _even_primes(body: Body) -> bool:
    """Whether the tables' rows can be told at once: a base of billions takes long to find primes from."""
    base = body.reader.value("ngram_vocab_size_base")
    return not body.reader.indices("ple_layer_ids") or (isinstance(base, int) and base <= 10**8)


class ZayaExperts(Experts):
    """ZAYA's: a router of three layers, which knows one expert that does nothing."""

    def block(self, body: Body) -> tuple[int, int]:
        dense, routed = super().block(body)
        count = body.reader.count("num_experts", self.count)
        width = body.reader.count("router", "router_hidden_size", fill=True)
        dense -= count * body.hidden
        return dense + (body.hidden + 1) * width + width + 2 * width * (width + 1) + (count + 1) * width, routed


def _zaya_outer(body: Body) -> int:
    """The input's scale and bias; the routers' scales of what the layer before passed on, which the first lacks."""
    return 2 * body.hidden + (body.num_layers - 1) * body.reader.count("router", "router_hidden_size", fill=True)


def _xlstm_layer(body: Body) -> int:
    """The gated MLP of an xLSTM block, as wide as ``ffn_proj_factor`` says, rounded up."""
    reader = body.reader
    factor = reader.value("ffn_proj_factor")
    factor = 2.667 if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1000:
        raise reader.error("ffn_proj_factor", "allowed are numbers above 0")
    step = reader.count("round", "ffn_round_up_to_multiple_of", fill=True)
    return 3 * body.hidden * (-(-int(body.hidden * factor) // step) * step)


_QWEN_HYBRID = Family(
    mixers={
        "full": (replace(NORMED, q_width=2),),
        "linear": (DeltaNet(),),
    },
    kinds=layer_kinds.qwen_hybrid,
    listed="layer_types",
    inert=(
        "full_attention_interval",
        "linear_allow_neg_eigval",
        "mamba_ssm_dtype",
        "mtp_num_hidden_layers",
        "attn_output_gate",
    ),
)
_BAMBA_MAMBA = Mamba2(
    heads="mamba_n_heads",
    head_dim="mamba_d_head",
    groups="mamba_n_groups",
    state="mamba_d_state",
    kernel="mamba_d_conv",
    expand="mamba_expand",
    bias=("mamba_proj_bias", False),
    conv_bias=("mamba_conv_bias", True),
)
_MAMBA_KEYS = ("mamba_expand", "mamba_chunk_size", "chunk_size", "use_mamba_kernels", "mamba_hidden_act")


_ZAMBA2_MAMBA = Mamba2(
    heads="n_mamba_heads",
    derived=True,
    groups="mamba_ngroups",
    state="mamba_d_state",
    kernel="mamba_d_conv",
    expand="mamba_expand",
)


_BAMBA = Family(
    mixers={"full": (LENIENT,), "linear": (_BAMBA_MAMBA,)},
    kinds=layer_kinds.indexed("attn_layer_indices", rest="linear"),
    inert=_MAMBA_KEYS,
    mlp=Mlp(bias=MLP_BIAS),
)


_LFM2 = Family(
    mixers={"full": (Attention(head_dim=None, qk_norm="head"),), "conv": (ShortConv(),)},
    kinds=layer_kinds.indexed("full_attn_idxs", rest="conv"),
    listed="layer_types",
    tied=True,
    inert=("full_attn_idxs", "conv_L_cache", "conv_bias", "conv_dim", "conv_dim_out", "conv_use_xavier_init"),
    mlp=AdjustedMlp(),
)


def _residuals(body: Body) -> int:
    """Kimi K3's attention over the blocks before: a norm and a query of the hidden size each time."""
    return 2 * body.hidden if body.reader.count_or_none("residual_block", "attn_res_block_size") else 0


_KIMI_EXPERTS = Experts(
    "num_experts",
    "moe_intermediate_size",
    ("num_experts_per_token", "num_experts_per_tok"),
    shared_count="num_shared_experts",
    sparse=listed_or(1),
)
_KIMI_LINEAR = Family(
    positions=("model_max_length", "max_position_embeddings"),
    mixers={"full": (Latent(gate=("mla_use_output_gate", False)),), "linear": (Kda(),)},
    layer_extra=lambda body: 2 * _residuals(body),
    outer_extra=_residuals,
    kinds=layer_kinds.kimi,
    listed="layer_types",
    inert=("linear_attn_config",),
    experts=replace(_KIMI_EXPERTS, latent="routed_expert_hidden_size", latent_norm=("latent_moe_use_norm", False)),
)
_MAMBA = Family(
    num_q_heads=None,
    kinds=layer_kinds.linear,
    mixers={"linear": (Mamba("intermediate_size"),)},
    tied=True,
    norms=1,
    mlp=None,
)


LARA = ("linear", "sliding", "linear", "full", "sliding")
"""The layers of Lara 4 Mini, repeated."""

HYBRID: dict[str, Family] = {
    # Recurrences and hybrids
    "qwen3_next": replace(_QWEN_HYBRID, experts=_SHARED_GATED),
    "qwen3_5_text": _QWEN_HYBRID,
    "qwen3_5_moe_text": replace(_QWEN_HYBRID, mlp=None, experts=replace(_SHARED_GATED, sparse=None)),
    "qwen4_exp_text": Family(
        mixers={
            "full": (
                PooledIndex(
                    head_dim_required=True, qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS, qk_norm="head", q_width=2
                ),
            ),
            "linear": (DeltaNet(),),
            "ngram": (DeltaNet(), NGramEmbedding()),
        },
        kinds=qwen4_kinds,
        listed="layer_types",
        check=_qwen4_ngrams,
        norms=0,
        final_norm=False,
        mlp=None,
        experts=replace(_SHARED_GATED, sparse=None),
        layer_extra=_qwen4_layer,
        outer_extra=lambda body: _streams(body)[1],
        lookup_extra=_qwen4_tables,
        count_if=_even_primes,
        quirks=lambda body: ("index positions",),
        inert=(
            "full_attention_interval",
            "indexer_n_heads",
            "ple_layer_ids",
            "number_of_conv_states",
            "output_gate_type",
            "mtp_num_hidden_layers",
            "attn_output_gate",
            "mamba_ssm_dtype",
            "ple_embed_dim",
            "split_ngram_parts",
        ),
    ),
    "lara_mini": Family(
        mixers={**_slide(NORMED), "linear": (DeltaNet(),)},
        window="sliding_window",
        kinds=lambda body: [LARA[layer % 5] for layer in range(body.num_layers)],
        listed="layer_types",
        tied=True,
        mlp=None,
        experts=replace(_SHARED_GATED, sparse=None, shared_gate=False),
    ),
    "zaya": Family(
        mixers={
            "hybrid": (Attention(head_dim_required=True), DelayedValue()),
            "hybrid_sliding": (Attention(head_dim_required=True), DelayedValue()),
        },
        window="sliding_window",
        kinds=layer_kinds.hybrid,
        listed="layer_types",
        tied=True,
        head_bias=("lm_head_bias", False),
        mlp=None,
        experts=ZayaExperts("num_experts", "moe_intermediate_size"),
        layer_extra=lambda body: 8 * body.hidden,
        outer_extra=_zaya_outer,
        count_if=lambda body: not body.reader.switch(ATTENTION_BIAS),
        inert=("router_hidden_size", "cca_time0", "cca_time1"),
    ),
    "xlstm": Family(
        num_layers=("num_hidden_layers", "num_blocks"),
        hidden=("hidden_size", "embedding_dim"),
        num_q_heads=None,
        mixers={"linear": (MLstm(),)},
        kinds=layer_kinds.linear,
        mlp=None,
        layer_extra=_xlstm_layer,
        count_if=lambda body: (
            not body.reader.switch(("use_bias", False))
            and body.reader.switch(("add_out_norm", True))
            and body.reader.get("weight_mode") in (None, "single")
        ),
        inert=(
            "num_heads",
            "qk_dim_factor",
            "v_dim_factor",
            "chunk_size",
            "chunkwise_kernel",
            "max_inference_chunksize",
            "inference_state_dtype",
            "autocast_kernel_dtype",
        ),
    ),
    "olmo_hybrid": Family(
        mixers={"full": (replace(LENIENT, qk_norm="full"),), "linear": (DeltaNet(),)},
        kinds=layer_kinds.olmo_hybrid,
        listed="layer_types",
        inert=(
            "linear_allow_neg_eigval",
            "linear_a_log_min",
            "linear_a_log_max",
            "linear_dt_min",
            "linear_dt_max",
            "linear_dt_init_floor",
        ),
    ),
    "kimi_linear": _KIMI_LINEAR,
    "bailing_hybrid": replace(
        _KIMI_LINEAR,
        mixers={
            "full": (Latent(extra=lambda hidden, heads, kv, dim: hidden * heads),),
            "linear": (Kda(low_rank=False),),
        },
        layer_extra=None,
        outer_extra=None,
        experts=_KIMI_EXPERTS,
        kinds=layer_kinds.every("layer_group_size", rest="linear", default=6),
        inert=("layer_group_size", "short_conv_kernel_size", "kda_safe_gate", "kda_lower_bound"),
    ),
    "nemotron_h": Family(
        mixers={
            "full": (replace(LENIENT, head_dim=("head_dim", "attention_head_dim"), fixed_head_dim=128),),
            "linear": (
                Mamba2(
                    groups=("mamba_n_groups", "n_groups"),
                    kernel=("mamba_d_conv", "conv_kernel"),
                    bias=("use_bias", False),
                    conv_bias=("use_conv_bias", True),
                ),
            ),
        },
        kinds=layer_kinds.letters,
        listed=("layers_block_type", "layer_types"),
        single=True,
        norms=1,
        mlp=Mlp(gated=False, bias=MLP_BIAS),
        experts=Experts(
            "n_routed_experts",
            "moe_intermediate_size",
            shared_inner="moe_shared_expert_intermediate_size",
            gated=False,
            latent="moe_latent_size",
        ),
        count_if=lambda body: (
            _plain_mlps(body)
            and not any(body.reader.switch((key, False)) for key in ("attention_bias", "tie_word_embeddings"))
        ),
        inert=(
            *_MAMBA_KEYS,
            "hybrid_override_pattern",
            "mamba_ssm_cache_dtype",
            "expand",
            "num_logits_to_keep",
            "mtp_hybrid_override_pattern",
            "mtp_layers_block_type",
            "mamba_proj_bias",
        ),
    ),
    "bamba": _BAMBA,
    "falcon_h1": Family(
        mixers={
            "hybrid": (
                replace(
                    LENIENT,
                ),
                replace(
                    _BAMBA_MAMBA,
                    inner="mamba_d_ssm",
                    norm=("mamba_rms_norm", False),
                    out_bias=("projectors_bias", False),
                ),
            )
        },
        kinds=layer_kinds.hybrid,
        mlp=Mlp(bias=MLP_BIAS),
        inert=(
            *_MAMBA_KEYS,
            "mamba_expand",
            "mamba_d_head",
            "mamba_use_mlp",
            "ssm_multipliers",
            "ssm_in_multiplier",
            "ssm_out_multiplier",
            "mamba_norm_before_gate",
        ),
    ),
    "granitemoehybrid": Family(
        mixers={"full": (LENIENT,), "linear": (_BAMBA_MAMBA,)},
        kinds=layer_kinds.linear,
        listed=("layer_types", "layers_block_type"),
        mlp=Mlp("shared_intermediate_size"),
        experts=replace(_GRANITE_MOE, sparse=if_any("num_local_experts")),
        inert=_MAMBA_KEYS,
    ),
    "jamba": Family(
        mixers={
            "full": (Attention(kv_required=False, head_dim=None),),
            "linear": (
                Mamba(
                    expand="mamba_expand",
                    state="mamba_d_state",
                    kernel="mamba_d_conv",
                    rank="mamba_dt_rank",
                    bias=("mamba_proj_bias", False),
                    conv_bias=("mamba_conv_bias", True),
                    normed=True,
                ),
            ),
        },
        kinds=layer_kinds.periodic,
        listed=("layers_block_type", "layer_types"),
        experts=Experts("num_experts", "intermediate_size", sparse=periodic),
        inert=(*_MAMBA_KEYS, "attn_layer_period", "attn_layer_offset", "mamba_inner_layernorms"),
    ),
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": replace(
        _MAMBA,
        mixers={"linear": (Mamba2(heads="num_heads", head_dim="head_dim", state="state_size"),)},
        inert=("chunk_size",),
        tied=False,
    ),
    "zamba": Family(
        mixers={
            "linear": (
                Mamba(
                    expand="mamba_expand",
                    state="mamba_d_state",
                    kernel="mamba_d_conv",
                    heads="n_mamba_heads",
                    rank="mamba_dt_rank",
                ),
            ),
            "hybrid": (
                Attention(head_dim="attention_head_dim", kv_required=False),
                Mamba(
                    expand="mamba_expand",
                    state="mamba_d_state",
                    kernel="mamba_d_conv",
                    heads="n_mamba_heads",
                    rank="mamba_dt_rank",
                ),
            ),
        },
        kinds=layer_kinds.zamba,
        listed=("layers_block_type", "layer_types"),
        inert=(
            *_MAMBA_KEYS,
            "attn_layer_period",
            "attn_layer_offset",
            "hidden_mamba_act",
            "mamba_conv_bias",
            "mamba_proj_bias",
            "attention_hidden_size",
            "mamba_dt_rank",
            "num_logits_to_keep",
        ),
        tied=True,
        countable=False,
    ),
    "zamba2": Family(
        mixers={
            "linear": (_ZAMBA2_MAMBA,),
            "hybrid": (WideAttention(kv_required=False), _ZAMBA2_MAMBA),
        },
        kinds=layer_kinds.zamba2,
        listed=("layers_block_type", "layer_types"),
        tied=True,
        countable=False,
        inert=(
            *_MAMBA_KEYS,
            "mamba_headdim",
            "hybrid_layer_ids",
            "attention_head_dim",
            "attention_hidden_size",
            "kv_channels",
            "num_query_groups",
            "use_conv_bias",
            "num_logits_to_keep",
            "use_shared_attention_adapter",
            "lora_rank",
        ),
    ),
    "minimax": Family(
        mixers={"full": (Attention(),), "linear": (Lightning(),)},
        kinds=layer_kinds.minimax,
        listed="layer_types",
        mlp=None,
        experts=Experts(),
        inert=(
            "attn_type_list",
            "block_size",
            "linear_attn_alpha_factor",
            "linear_attn_beta_factor",
            "full_attn_alpha_factor",
            "full_attn_beta_factor",
            "layernorm_linear_attention_alpha",
            "layernorm_linear_attention_beta",
            "layernorm_full_attention_alpha",
            "layernorm_full_attention_beta",
            "shared_intermediate_size",
            "shared_moe_mode",
        ),
    ),
    "lfm2": _LFM2,
    "lfm2_moe": replace(
        _LFM2,
        mlp=Mlp(),
        experts=Experts("num_experts", "moe_intermediate_size", sparse=after("num_dense_layers", 2)),
    ),
    "lfm3": Family(
        mixers={
            **_slide(replace(NORMED, extra=lambda hidden, heads, kv, dim: hidden * heads)),
            "conv": (ShortConv(),),
        },
        window="sliding_window",
        kinds=layer_kinds.lfm3,
        listed="layer_types",
        tied=True,
        norms=4,
        count_if=lambda body: all(
            body.reader.switch((f"use_{key}", True)) for key in ("sandwich_norm", "attention_gate")
        ),
        inert=("conv_L_cache", "conv_bias"),
    ),
    "recurrent_gemma": Family(
        mixers={
            "sliding": (Attention(kv_required=False, head_dim=None, qkv_bias=ATTENTION_BIAS, out_bias=True),),
            "linear": (RgLru(),),
        },
        window="attention_window_size",
        kinds=layer_kinds.cycled("block_types"),
        mlp=Mlp(bias=True, half=True),
        tied=True,
        inert=("_block_types",),
    ),
    "rwkv": Family(
        num_q_heads=None,
        positions="context_length",
        mixers={"linear": (Rwkv(),)},
        kinds=layer_kinds.linear,
        mlp=None,
        norm_vectors=2,
        outer_extra=lambda body: 2 * body.hidden,
    ),
}
