"""Llama and what descends from it: grouped heads, gated MLPs, windows, experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvsim.models import layer_kinds
from kvsim.models.attention import Attention, BlockSparse
from kvsim.models.config import Body, ConfigReader
from kvsim.models.families.family import (
    ATTENTION_BIAS,
    BIASED,
    HEADED,
    LENIENT,
    MLP_BIAS,
    NORMED,
    SINKS,
    Family,
    _one,
    _plain_mlps,
    _same_heads,
    _slide,
)
from kvsim.models.families.latent import _DEEPSEEK_MOE
from kvsim.models.feedforward import (
    Experts,
    Mlp,
    after,
    if_enabled,
    interleaved,
    listed_or,
    ranged,
    stepped_but,
)
from kvsim.models.feedforward import stepped as stepped_layers


def _overrides(body: Body) -> ConfigReader | None:
    """What ``per_layer_config`` says of the full layers, ``None`` where it is not there."""
    if "per_layer_config" not in body.reader.config:
        return None
    each = body.reader.child("per_layer_config")
    if each is None or not each.config:
        return ConfigReader({})
    values = list(each.config.values())
    first = values[0]
    if not isinstance(first, Mapping) or any(value != first for value in values):
        raise body.reader.error("per_layer_config", "allowed is one and the same JSON object for every full layer")
    odd = set(first) - {"head_dim", "num_key_value_heads"}
    if odd:
        raise body.reader.error("per_layer_config", f"{min(map(str, odd))} is not known of this model type")
    return ConfigReader(first, body.reader.label("per_layer_config."))


def _per_layer_config(body: Body, kinds_of: list[str]) -> None:
    """``per_layer_config`` must speak of the full layers, all of them and no others."""
    each = body.reader.child("per_layer_config")
    if each is not None and each.config:
        named = {int(key) for key in each.config if str(key).isdecimal() and len(str(key)) < 6}
        if len(named) != len(each.config) or named != {at for at, kind in enumerate(kinds_of) if kind == "full"}:
            raise body.reader.error("per_layer_config", "allowed are the full layers, all of them")


class GlobalAttention(Attention):
    """Gemma 4's full layers: ``global_head_dim``, and with ``attention_k_eq_v`` heads of their own; as the other
    layers where there is a ``per_layer_config`` with nothing in it."""

    def _kv_heads(self, body: Body) -> int:
        reader = body.reader
        told = _overrides(body)
        if told is not None:
            return (
                told.count("num_kv_heads", "num_key_value_heads")
                if told.has("num_key_value_heads")
                else (super()._kv_heads(body))
            )
        if reader.switch(("attention_k_eq_v", False)):
            given = reader.count_or_none("num_kv_heads", "num_global_key_value_heads")
            if given is not None:
                return given
        return super()._kv_heads(body)

    def _head_dim(self, body: Body) -> int:
        told = _overrides(body)
        if told is not None:
            return told.count("head_dim", "head_dim") if told.has("head_dim") else super()._head_dim(body)
        given = body.reader.count_or_none("head_dim", "global_head_dim")
        if given is not None:
            return given
        body.reader.sources["head_dim"] = "global_head_dim (absent: 512 by its class)"
        return 512


def _jetmoe(reader: ConfigReader) -> Mapping[str, Any]:
    """JetMoE's query heads: a kv head's for every expert that a token uses, whatever the config says."""
    heads = reader.count("heads", "num_key_value_heads")
    chosen = reader.count("chosen", "num_experts_per_tok", fill=True)
    return {**reader.config, "num_attention_heads": heads * chosen}


@dataclass(frozen=True)
class ExpertAttention(Attention):
    """JetMoE's: queries and outputs come from experts, whose weights :class:`AttentionExperts` counts."""

    def params(self, body: Body) -> int:
        num_kv_heads, dim, _ = self.heads(body)
        return 2 * body.hidden * num_kv_heads * dim + body.hidden


class AttentionExperts(Experts):
    """JetMoE's: as many experts of attention, with a router of their own."""

    def block(self, body: Body) -> tuple[int, int]:
        dense, routed = super().block(body)
        count = body.reader.count("num_experts", self.count)
        width = body.reader.count("heads", "num_key_value_heads") * body.reader.count("dim", "kv_channels")
        return dense + count * body.hidden, routed + 2 * count * body.hidden * width


class DoubledAttention(Attention):
    """MiMo-V2's sliding layers: ``swa_num_key_value_heads``, or twice the full layers'."""

    def _kv_heads(self, body: Body) -> int:
        given = body.reader.count_or_none("num_kv_heads", "swa_num_key_value_heads")
        return given or 2 * body.reader.count("num_kv_heads", "num_key_value_heads")


class DoubleMlp(Mlp):
    """Gemma 4's: with ``use_double_wide_mlp`` the layers that share a cache have twice the width."""

    def widths(self, body: Body) -> list[int]:
        out = super().widths(body)
        shared = body.reader.count_or_none("num_shared", "num_kv_shared_layers", zero=True) or 0
        if body.reader.switch(("use_double_wide_mlp", False)) and shared:
            out[-shared:] = [2 * width for width in out[-shared:]]
        return out


def _gemma3n_layer(body: Body) -> int:
    """AltUp, LAuReL and per-layer inputs of one Gemma 3n layer."""
    reader, hidden = body.reader, body.hidden
    inputs, rank, width = (
        reader.count(key, key, fill=True) for key in ("altup_num_inputs", "laurel_rank", "hidden_size_per_layer_input")
    )
    altup = 2 * hidden + inputs * inputs + inputs * inputs * inputs + inputs * hidden
    return altup + 2 * rank * hidden + hidden + 2 * width * hidden + hidden


def _gemma3n_outer(body: Body) -> int:
    reader, hidden = body.reader, body.hidden
    inputs, width = (reader.count(key, key, fill=True) for key in ("altup_num_inputs", "hidden_size_per_layer_input"))
    return body.num_layers * width * hidden + width + 2 * (inputs - 1) * hidden * hidden


def _per_layer_lookup(body: Body) -> int:
    """The per-layer embeddings of Gemma 3n and 4."""
    reader = body.reader
    width = reader.count_or_none("per_layer", "hidden_size_per_layer_input", zero=True, fill=True) or 0
    return reader.count("per_layer_vocab", "vocab_size_per_layer_input", fill=True) * body.num_layers * width


def _gemma4_layer(body: Body) -> int:
    """A scalar, the norms of the expert block, and the per-layer inputs of one Gemma 4 layer."""
    reader, hidden = body.reader, body.hidden
    width = reader.count_or_none("per_layer", "hidden_size_per_layer_input", zero=True, fill=True) or 0
    total = 2 * width * hidden + hidden if width else 0
    return total + (3 * hidden if reader.switch(("enable_moe_block", False)) else 0)


def _gemma4_outer(body: Body) -> int:
    width = body.reader.count_or_none("per_layer", "hidden_size_per_layer_input", zero=True, fill=True) or 0
    return body.num_layers * width * body.hidden + width if width else 0


def _step3_experts(body: Body) -> list[bool]:
    """Step 3.5's ``mlp_layer_types``, else ``moe_layers_enum`` ("3,4,5"), else all but the first three."""
    reader = body.reader
    given = reader.get("moe_layers_enum")
    if given is None or reader.get("mlp_layer_types") is not None:
        return listed_or(3)(body)
    items = [item for item in given.split(",") if item.strip()] if isinstance(given, str) else given
    if not isinstance(items, list) or not all(str(item).strip().isdecimal() and len(str(item)) < 8 for item in items):
        raise reader.error("moe_layers_enum", "allowed are layer numbers")
    chosen = {int(item) for item in items}
    return [layer in chosen for layer in range(body.num_layers)]


def _step3_layers(body: Body, kinds_of: list[str]) -> None:
    """``per_layer_config`` may give window layers their number of query heads, and nothing else."""
    each = body.reader.child("per_layer_config")
    for value in each.config.values() if each is not None else ():
        if not isinstance(value, Mapping) or set(value) != {"num_attention_heads"}:
            raise body.reader.error("per_layer_config", "allowed are objects of num_attention_heads alone")


STEP3_HEADS = ("num_attention_groups", "num_key_value_heads")
STEP3 = Attention(
    STEP3_HEADS, head_dim_required=True, qk_norm="head", extra=lambda hidden, heads, kv, dim: hidden * heads
)
_LLAMA = Family(mixers=_one(LENIENT), mlp=Mlp(bias=MLP_BIAS))
_WINDOWED = Family(window="sliding_window", kinds=layer_kinds.windowed, listed="layer_types")


_QWEN2 = replace(
    _WINDOWED,
    mixers=_slide(Attention(qkv_bias=True)),
    kinds=layer_kinds.switched,
    inert=("max_window_layers", "use_sliding_window"),
)


_QWEN3 = replace(_QWEN2, mixers=_slide(NORMED))


_STEPPED = Experts(("num_experts", "num_local_experts"), "moe_intermediate_size", sparse=stepped_layers)


_GEMMA2 = Family(
    inert=("sliding_window_size",),
    mixers=_slide(HEADED),
    window="sliding_window",
    kinds=layer_kinds.every(2),
    listed="layer_types",
    tied=True,
    norms=4,
)


_GEMMA3 = replace(
    _GEMMA2,
    mixers=_slide(NORMED),
    kinds=layer_kinds.every("sliding_window_pattern", default=6),
    inert=("sliding_window_pattern", "_sliding_window_pattern"),
)


_COHERE = Family(mixers=_one(replace(LENIENT, qk_norm="full", qk_norm_if=("use_qk_norm", False))), tied=True, norms=1)
_GLM_MOE = Family(
    mixers=_one(
        replace(HEADED, out_bias=False, qkv_bias=ATTENTION_BIAS, qk_norm="head", qk_norm_if=("use_qk_norm", False))
    ),
    experts=Experts(
        ("n_routed_experts", "num_experts"),
        "moe_intermediate_size",
        shared_count="n_shared_experts",
        sparse=after("first_k_dense_replace"),
    ),
)
_SHARED_GATED = Experts(
    ("num_experts", "num_local_experts"),
    "moe_intermediate_size",
    shared_inner="shared_expert_intermediate_size",
    shared_gate=True,
    sparse=stepped_layers,
)
_GRANITE_MOE = Experts("num_local_experts", "intermediate_size", shared_inner="shared_intermediate_size")


_EXAONE4 = Family(
    mixers=_slide(replace(LENIENT, qkv_bias=False, out_bias=False, qk_norm="head")),
    window="sliding_window",
    kinds=layer_kinds.exaone4,
    listed="layer_types",
    inert=("sliding_window_pattern",),
)


LLAMA: dict[str, Family] = {
    # Llama and its kin
    "llama": _LLAMA,
    "mistral": replace(_WINDOWED, mixers=_slide(Attention()), kinds=layer_kinds.mistral),
    "ministral": replace(_WINDOWED, mixers=_slide(Attention(kv_required=False))),
    "ministral3": replace(_WINDOWED, mixers=_slide(Attention(head_dim_required=True))),
    "mixtral": replace(_WINDOWED, mixers=_slide(Attention()), mlp=None, experts=Experts()),
    "gemma": Family(mixers=_one(HEADED), tied=True),
    "gemma2": _GEMMA2,
    "vaultgemma": replace(_GEMMA2, norms=2),
    "gemma3_text": _GEMMA3,
    "gemma3n_text": replace(
        _GEMMA3,
        kinds=layer_kinds.every(5),
        sharing="num_kv_shared_layers",
        layer_extra=_gemma3n_layer,
        outer_extra=_gemma3n_outer,
        lookup_extra=_per_layer_lookup,
    ),
    "gemma4_text": Family(
        mixers=_slide(
            GlobalAttention(
                qkv_bias=ATTENTION_BIAS,
                out_bias=ATTENTION_BIAS,
                qk_norm="head",
                shared_value=("attention_k_eq_v", False),
            ),
            NORMED,
        ),
        window="sliding_window",
        kinds=layer_kinds.every(6),
        listed="layer_types",
        forced_last="full",
        check=_per_layer_config,
        sharing="num_kv_shared_layers",
        tied=True,
        norms=4,
        experts=Experts(
            "num_experts",
            "moe_intermediate_size",
            ("top_k_experts", "num_experts_per_tok"),
            sparse=if_enabled("enable_moe_block"),
            router_vectors=1,
            dense_too=True,
            extra=lambda hidden, count: hidden,
        ),
        layer_extra=_gemma4_layer,
        outer_extra=_gemma4_outer,
        lookup_extra=_per_layer_lookup,
        mlp=DoubleMlp(),
    ),
    "cohere": _COHERE,
    "cohere2": replace(
        _COHERE,
        mixers=_slide(replace(LENIENT, head_dim=None)),
        window="sliding_window",
        kinds=layer_kinds.every("sliding_window_pattern", default=4),
        listed="layer_types",
        inert=("sliding_window_pattern", "_sliding_window_pattern"),
    ),
    "cohere2_moe": replace(
        _COHERE,
        mixers=_slide(HEADED),
        window="sliding_window",
        kinds=layer_kinds.cohere2_moe,
        listed="layer_types",
        mlp=Mlp(("prefix_dense_intermediate_size", "intermediate_size")),
        experts=Experts("num_experts", shared_count="num_shared_experts", sparse=after("first_k_dense_replace", 0)),
        inert=("sliding_window_pattern", "prefix_dense_sliding_window_pattern"),
    ),
    "olmo": Family(mixers=_one(LENIENT), norm_vectors=0),
    "olmo2": Family(mixers=_one(replace(LENIENT, qk_norm="full"))),
    "olmo3": Family(
        mixers=_slide(replace(LENIENT, qk_norm="full")),
        window="sliding_window",
        kinds=layer_kinds.every(4),
        listed="layer_types",
    ),
    "olmoe": Family(mixers=_one(replace(LENIENT, qk_norm="full")), mlp=None, experts=Experts("num_experts")),
    "flex_olmo": Family(mixers=_one(replace(LENIENT, qk_norm="full")), mlp=None, experts=Experts("num_experts")),
    "granite": _LLAMA,
    "granitemoe": Family(mixers=_one(LENIENT), mlp=None, experts=Experts()),
    "granitemoeshared": Family(mixers=_one(LENIENT), mlp=None, experts=_GRANITE_MOE),
    "granite_swa": replace(
        _WINDOWED,
        mixers=_slide(replace(LENIENT, extra=SINKS)),
        kinds=layer_kinds.every(4, first=True),
        mlp=Mlp(bias=MLP_BIAS),
        tied=True,
    ),
    "granitemoe_swa": replace(
        _WINDOWED,
        mixers=_slide(replace(LENIENT, extra=SINKS)),
        kinds=layer_kinds.every(4, first=True),
        mlp=None,
        experts=_GRANITE_MOE,
    ),
    "arcee": Family(mixers=_one(LENIENT), mlp=Mlp(gated=False, bias=MLP_BIAS)),
    "apertus": Family(
        mixers=_one(replace(LENIENT, head_dim=None, qk_norm="head")),
        mlp=Mlp(gated=False, extra=lambda hidden, inner: 2),
    ),
    "bitnet": Family(
        mixers=_one(replace(LENIENT, head_dim=None, extra=lambda hidden, heads, kv, dim: hidden)),
        mlp=Mlp(extra=lambda hidden, inner: inner),
    ),
    "diffllama": Family(mixers=_one(replace(LENIENT, extra=lambda hidden, heads, kv, dim: 4 * dim))),
    "cwm": replace(
        _WINDOWED,
        mixers=_slide(Attention(kv_required=False)),
        kinds=layer_kinds.every(4, first=True),
        mlp=Mlp(bias=MLP_BIAS),
    ),
    "nemotron": Family(mixers=_one(BIASED), norm_vectors=2, mlp=Mlp(gated=False, bias=MLP_BIAS)),
    "nanochat": Family(mixers=_one(replace(LENIENT, head_dim=None)), mlp=Mlp(gated=False), norm_vectors=0),
    "phi": Family(
        mixers=_one(
            Attention(
                kv_required=False,
                head_dim=None,
                qkv_bias=True,
                out_bias=True,
                qk_norm="head",
                qk_norm_if=("qk_layernorm", False),
            )
        ),
        norm_vectors=2,
        norms=1,
        mlp=Mlp(gated=False, bias=True),
        head_bias=True,
    ),
    "phi3": replace(_WINDOWED, mixers=_slide(Attention(kv_required=False))),
    "phimoe": replace(
        _WINDOWED,
        mixers=_slide(BIASED),
        norm_vectors=2,
        mlp=None,
        head_bias=("lm_head_bias", False),
        experts=Experts(),
    ),
    "glm": Family(mixers=_one(replace(HEADED, qkv_bias=("attention_bias", True), out_bias=False))),
    "glm4": Family(mixers=_one(replace(HEADED, qkv_bias=("attention_bias", True), out_bias=False)), norms=4),
    "glm4_moe": _GLM_MOE,
    "sarvam_moe": replace(
        _GLM_MOE,
        mixers=_one(
            replace(HEADED, out_bias=False, qkv_bias=ATTENTION_BIAS, qk_norm="head", qk_norm_if=("use_qk_norm", True))
        ),
        experts=replace(_DEEPSEEK_MOE, sparse=listed_or(1)),
        count_if=lambda body: not body.reader.switch(("use_qkv_bias", False)),
    ),
    "helium": Family(
        mixers=_one(replace(HEADED, out_bias=False)),
        mlp=Mlp(bias=MLP_BIAS),
        count_if=lambda body: body.num_q_heads * body.reader.count("head_dim", "head_dim") == body.hidden,
    ),
    "exaone4": _EXAONE4,
    "exaone_moe": replace(
        _EXAONE4,
        experts=Experts("num_experts", "moe_intermediate_size", shared_count="num_shared_experts", sparse=listed_or(1)),
    ),
    "qwen2": _QWEN2,
    "mimo": _QWEN2,
    "qwen2_moe": replace(
        _QWEN2,
        mixers=_slide(Attention(qkv_bias=("qkv_bias", True))),
        kinds=layer_kinds.switched_even,
        experts=_SHARED_GATED,
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, kinds=layer_kinds.switched_all, experts=_STEPPED),
    "dots1": replace(
        _WINDOWED,
        mixers=_slide(replace(NORMED, head_dim_required=False)),
        kinds=layer_kinds.windowed_from,
        experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 0)),
        inert=("max_window_layers", "use_sliding_window"),
    ),
    "smollm3": replace(
        _WINDOWED,
        mixers=_slide(BIASED),
        kinds=layer_kinds.smollm3,
        mlp=Mlp(bias=MLP_BIAS),
        tied=True,
        inert=("use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"),
    ),
    "starcoder2": replace(
        _WINDOWED,
        mixers=_slide(Attention(qkv_bias=("use_bias", True), out_bias=("use_bias", True))),
        tied=True,
        norm_vectors=2,
        mlp=Mlp(gated=False, bias=("use_bias", True)),
    ),
    "seed_oss": Family(
        mixers=_one(
            Attention(head_dim_required=True, qkv_bias=("attention_bias", True), out_bias=("attention_out_bias", False))
        ),
        mlp=Mlp(bias=MLP_BIAS),
    ),
    "ernie4_5": Family(
        mixers=_one(Attention(head_dim_required=True, qkv_bias=("use_bias", False), out_bias=("use_bias", False))),
        tied=True,
        mlp=Mlp(bias=("use_bias", False)),
    ),
    "ernie4_5_moe": Family(
        mixers=_one(Attention(qkv_bias=("use_bias", False), out_bias=("use_bias", False))),
        tied=True,
        mlp=Mlp(bias=("use_bias", False)),
        experts=Experts(
            "moe_num_experts",
            "moe_intermediate_size",
            "moe_k",
            sparse=ranged,
            shared_count="moe_num_shared_experts",
            router_vectors=1,
        ),
        count_if=lambda body: not body.reader.switch(("use_bias", False)),
    ),
    "hunyuan_v1_dense": Family(mixers=_one(replace(LENIENT, qk_norm="head")), inert=("attention_head_dim",)),
    "hunyuan_v1_moe": Family(
        mixers=_one(replace(LENIENT, qk_norm="head")),
        inert=("attention_head_dim",),
        mlp=None,
        experts=Experts("num_experts", "intermediate_size", "moe_topk", shared_inner="intermediate_size"),
        count_if=lambda body: all(
            isinstance(body.reader.get(key), int | None) for key in ("num_experts", "intermediate_size", "moe_topk")
        ),
    ),
    "hy_v3": Family(
        mixers=_one(replace(NORMED, kv_required=True)),
        mlp=Mlp(bias=MLP_BIAS),
        experts=Experts("num_experts", "moe_intermediate_size", shared_count="num_shared_experts", sparse=listed_or(1)),
        count_if=lambda body: _plain_mlps(body) and body.reader.get("num_shared_experts") != 0,
    ),
    "hyperclovax": Family(
        mixers=_one(LENIENT),
        mlp=Mlp(bias=MLP_BIAS),
        layer_extra=lambda body: 2 * body.hidden if body.reader.switch(("use_post_norm", True)) else 0,
    ),
    "beam": replace(
        _WINDOWED,
        mixers=_slide(replace(NORMED, extra=lambda hidden, heads, kv, dim: (hidden * dim + 1) * heads)),
        kinds=layer_kinds.every(6),
        forced_last="full",
        norms=4,
        experts=Experts("num_experts", "moe_intermediate_size", sparse=listed_or(3)),
    ),
    "flint": replace(
        _WINDOWED,
        mixers=_slide(replace(NORMED, extra=SINKS)),
        kinds=layer_kinds.flint,
        experts=replace(_SHARED_GATED, shared_gate=False, sparse=stepped_but(0, 1)),
    ),
    "kolibri1": replace(
        _WINDOWED,
        mixers=_slide(replace(NORMED, qkv_bias=False, out_bias=False)),
        kinds=layer_kinds.every(5),
        norms=4,
        mlp=None,
        experts=replace(_SHARED_GATED, shared_gate=False, sparse=None),
    ),
    "doge": replace(
        _WINDOWED,
        mixers=_slide(replace(LENIENT, qk_norm="head", extra=lambda hidden, heads, kv, dim: kv * (kv * dim + 1))),
        mlp=Mlp(bias=MLP_BIAS),
        layer_extra=lambda body: 2 * body.hidden,
        count_if=lambda body: not any(body.reader.switch((key, False)) for key in ("is_moe", "attention_bias")),
        inert=("keep_window_size", "num_experts", "num_experts_per_tok"),
    ),
    "jetmoe": Family(
        rewrite=_jetmoe,
        mixers=_one(ExpertAttention(head_dim="kv_channels")),
        tied=True,
        mlp=None,
        experts=AttentionExperts(extra=lambda hidden, count: hidden),
        inert=("num_attention_heads",),
    ),
    "cohere_compass_text": replace(
        _COHERE,
        mixers=_slide(replace(LENIENT, head_dim=None)),
        window="sliding_window",
        listed="layer_types",
        inert=("sliding_window_pattern",),
    ),
    "internlm3": Family(
        mixers=_one(replace(LENIENT, qkv_bias=("qkv_bias", False), out_bias=("bias", False))),
        mlp=Mlp(bias=("bias", False)),
    ),
    "iquestcoder": _LLAMA,
    "jais2": Family(
        mixers=_one(replace(LENIENT, qkv_bias=("attention_bias", True), out_bias=("attention_bias", True))),
        mlp=Mlp(gated=False, bias=("mlp_bias", True)),
        norm_vectors=2,
    ),
    "aria_text": Family(
        mixers=_one(LENIENT),
        mlp=None,
        experts=Experts("moe_num_experts", "intermediate_size", "moe_topk", shared_count="moe_num_shared_experts"),
        count_if=_plain_mlps,
    ),
    "afmoe": replace(
        _WINDOWED,
        mixers=_slide(replace(LENIENT, qk_norm="head", extra=lambda hidden, heads, kv, dim: hidden * heads * dim)),
        kinds=layer_kinds.every("global_attn_every_n_layers", default=4),
        inert=("global_attn_every_n_layers",),
        norms=4,
        experts=Experts(
            "num_experts",
            "moe_intermediate_size",
            shared_count="num_shared_experts",
            sparse=after("num_dense_layers", 1),
            router_vectors=1,
        ),
    ),
    "gpt_oss": Family(
        mixers=_slide(
            replace(LENIENT, qkv_bias=("attention_bias", True), out_bias=("attention_bias", True), extra=SINKS)
        ),
        window="sliding_window",
        kinds=layer_kinds.every(2),
        listed="layer_types",
        mlp=None,
        experts=Experts("num_local_experts", bias=True),
        inert=("initial_context_length",),
    ),
    "llama4_text": Family(
        mixers={"full": (LENIENT,), "chunked": (LENIENT,)},
        chunk="attention_chunk_size",
        kinds=layer_kinds.chunked,
        listed="layer_types",
        mlp=Mlp("intermediate_size_mlp"),
        experts=Experts("num_local_experts", "intermediate_size", sparse=interleaved, shared_inner="intermediate_size"),
        inert=("no_rope_layers", "no_rope_layer_interval", "attn_temperature_tuning"),
    ),
    "laguna": replace(
        _WINDOWED,
        mixers=_slide(replace(HEADED, qk_norm="head", extra=lambda hidden, heads, kv, dim: hidden * heads)),
        kinds=layer_kinds.full,
        experts=replace(_SHARED_GATED, shared_gate=False, sparse=listed_or(1), router_vectors=1),
        count_if=lambda body: _same_heads(body) and body.reader.get("gating") in (None, True, "per-head"),
        inert=("num_attention_heads_per_layer", "gating"),
    ),
    "mellum": replace(
        _WINDOWED,
        mixers=_slide(NORMED),
        kinds=layer_kinds.full,
        experts=Experts(("num_local_experts", "num_experts"), "moe_intermediate_size", sparse=listed_or(0)),
    ),
    "step3p5": Family(
        mixers=_slide(
            STEP3,
            replace(
                STEP3,
                num_kv_heads=("attention_other_setting.num_attention_groups", *STEP3_HEADS),
                head_dim=("attention_other_setting.head_dim", "head_dim"),
                num_q_heads=(
                    "num_sliding_attention_heads",
                    "attention_other_setting.num_attention_heads",
                    "num_attention_heads",
                ),
            ),
        ),
        window="sliding_window",
        listed="layer_types",
        nested=("attention_other_setting",),
        check=_step3_layers,
        experts=Experts(
            ("n_routed_experts", "moe_num_experts"),
            "moe_intermediate_size",
            ("num_experts_per_tok", "moe_top_k"),
            shared_inner=("share_expert_dim", "share_expert_dims"),
            sparse=_step3_experts,
        ),
        count_if=lambda body: (
            all(body.reader.get(key) in (None, True) for key in ("use_qk_norm", "use_head_wise_attn_gate", "use_moe"))
            and not any(body.reader.switch((key, False)) for key in ("attention_bias", "mlp_bias"))
        ),
        inert=(
            "attention_other_setting",
            "attention_other_setting.attention_type",
            "mtp_layer_types",
            "mtp_mlp_layer_types",
            "per_layer_config",
            "moe_layers_enum",
            "num_local_experts",
        ),
    ),
    "solar_open": Family(
        mixers=_one(replace(HEADED, head_dim_required=False, out_bias=False)),
        mlp=None,
        experts=replace(_DEEPSEEK_MOE, sparse=None),
    ),
    "minimax_m2": Family(
        mixers=_one(Attention(head_dim_required=True, qk_norm="full")),
        mlp=None,
        experts=Experts(),
        inert=("shared_intermediate_size", "mtp_transformer_layers"),
    ),
    "minimax_m3": Family(
        mixers={"full": (NORMED,), "indexed": (BlockSparse(head_dim_required=True, qk_norm="head"),)},
        kinds=layer_kinds.minimax_m3,
        listed="layer_types",
        nested=("sparse_attention_config",),
        mlp=Mlp("dense_intermediate_size"),
        experts=Experts(
            inner=("moe_intermediate_size", "intermediate_size"),
            shared_inner="shared_intermediate_size",
            sparse=after("first_k_dense_replace", 0),
        ),
        inert=(
            "index_block_size",
            "index_topk_blocks",
            "index_local_blocks",
            "sparse_attention_config",
            "sparse_attention_config.use_sparse_attention",
            "sparse_attention_config.sparse_block_size",
            "sparse_attention_config.sparse_topk_blocks",
            "sparse_attention_config.sparse_init_block",
            "sparse_attention_config.sparse_local_block",
            "sparse_attention_config.sparse_score_type",
            "sparse_attention_config.sparse_disable_index_value",
            "attention_output_gate",
        ),
    ),
    "mimo_v2_flash": Family(
        mixers=_slide(
            Attention(head_dim_required=True, value_dim="v_head_dim", qkv_bias=ATTENTION_BIAS),
            DoubledAttention(
                "swa_num_key_value_heads",
                head_dim=("swa_head_dim", "head_dim"),
                value_dim=("swa_v_head_dim", "v_head_dim"),
                qkv_bias=ATTENTION_BIAS,
                extra=SINKS,
            ),
        ),
        window=("sliding_window_size", "sliding_window"),
        window_of=lambda key, window: window + (key == "sliding_window_size"),
        kinds=layer_kinds.mimo_v2,
        listed="layer_types",
        inert=(
            "hybrid_layer_pattern",
            "sliding_window",
            "attention_chunk_size",
            "swa_num_attention_heads",
            "add_swa_attention_sink_bias",
            "swa_rope_theta",
            "hybrid_block_size",
        ),
        experts=Experts(
            "n_routed_experts",
            "moe_intermediate_size",
            shared_count="n_shared_experts",
            sparse=after("first_k_dense_replace", 1),
        ),
    ),
}
