"""GPT-2 and its kin: learned positions, ALiBi, biased norms, MLPs without a gate."""

from __future__ import annotations

from dataclasses import replace

from kvsim.models import layer_kinds
from kvsim.models.attention import Attention
from kvsim.models.config import Body
from kvsim.models.families.family import (
    ALL_BIASED,
    ATTENTION_BIAS,
    Family,
    _one,
    _slide,
)
from kvsim.models.feedforward import (
    Experts,
    Mlp,
)


class FalconAttention(Attention):
    """Falcon has a ``num_kv_heads`` that only the new decoder architecture obeys, and a multi-query switch."""

    def _kv_heads(self, body: Body) -> int:
        reader = body.reader
        if reader.switch(("new_decoder_architecture", False)):
            return reader.count("num_kv_heads", "num_kv_heads" if reader.has("num_kv_heads") else "num_key_value_heads")
        if reader.switch(("multi_query", True)):
            reader.sources["num_kv_heads"] = reader.label("multi_query = true")
            return 1
        if reader.has("num_kv_heads"):
            return reader.count("num_kv_heads", "num_kv_heads")
        reader.sources["num_kv_heads"] = reader.label("num_attention_heads")
        return body.num_q_heads


def _falcon_norms(body: Body) -> int:
    """Parameters of a Falcon layer's norms."""
    reader = body.reader
    norms = 2
    if reader.switch(("parallel_attn", True)):
        given = reader.count_or_none("norms", "num_ln_in_parallel_attn")
        norms = given or (2 if reader.switch(("new_decoder_architecture", False)) else 1)
    return norms * body.norm_vectors * body.hidden


def _opt_outer(body: Body) -> int:
    """OPT's projections between the width of words and the hidden width, less the embedding's difference, and its
    last norm, which a model that normalizes behind its layers lacks."""
    reader = body.reader
    width = reader.count_or_none("word_embed_proj_dim", "word_embed_proj_dim") or body.hidden
    vocab = reader.count("vocab_size", "vocab_size")
    last = reader.switch(("do_layer_norm_before", True)) and not reader.switch(("_remove_final_layer_norm", False))
    projected = 0 if width == body.hidden else 2 * width * body.hidden + vocab * (width - body.hidden)
    return projected + (body.norm_vectors * body.hidden if last else 0)


class MultipleMlp(Mlp):
    """GPT-NeoX-Japanese's: ``intermediate_multiple_size`` times the hidden size."""

    def width(self, body: Body) -> int:
        return body.hidden * body.reader.count("intermediate_size", "intermediate_multiple_size", fill=True)


_GPT2 = Family(
    num_layers="n_layer",
    hidden="n_embd",
    num_q_heads="n_head",
    positions="n_positions",
    mixers=_one(ALL_BIASED),
    mlp=Mlp("n_inner", required=False, gated=False, bias=True),
    tied=True,
    learned_positions=0,
    norm_vectors=2,
)


_GPTJ = replace(
    _GPT2,
    mixers=_one(Attention(num_kv_heads=None, head_dim=None)),
    tied=False,
    learned_positions=None,
    norms=1,
    head_bias=True,
)
_OPT = Family(
    mixers=_one(replace(ALL_BIASED, qkv_bias=("enable_bias", True), out_bias=("enable_bias", True))),
    mlp=Mlp("ffn_dim", gated=False, bias=("enable_bias", True)),
    tied=True,
    learned_positions=2,
    norm_vectors=2,
)


GPT: dict[str, Family] = {
    # GPT-2 and its kin
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, mixers=_one(replace(ALL_BIASED, multi_query="multi_query"))),
    "gpt_neo": replace(
        _GPT2,
        num_layers="num_layers",
        hidden="hidden_size",
        num_q_heads="num_heads",
        positions="max_position_embeddings",
        mixers=_slide(replace(ALL_BIASED, qkv_bias=False)),
        kinds=layer_kinds.gpt_neo,
        window="window_size",
        quirks=lambda body: ("whole",),
        inert=("attention_types", "attention_layers"),
        mlp=Mlp("intermediate_size", required=False, gated=False, bias=True),
    ),
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_neox": Family(
        mixers=_one(replace(ALL_BIASED, qkv_bias=("attention_bias", True), out_bias=("attention_bias", True))),
        norm_vectors=2,
        mlp=Mlp(gated=False, bias=True),
    ),
    "openai-gpt": replace(_GPT2, final_norm=False, mlp=Mlp((), required=False, gated=False, bias=True)),
    "opt": replace(
        _OPT,
        final_norm=False,
        outer_extra=_opt_outer,
        count_if=lambda body: body.reader.switch(("layer_norm_elementwise_affine", True)),
    ),
    "biogpt": replace(_OPT, mixers=_one(ALL_BIASED), mlp=Mlp(gated=False, bias=True)),
    "xglm": replace(
        _OPT,
        num_layers=("num_layers", "num_hidden_layers"),
        hidden=("d_model", "hidden_size"),
        num_q_heads=("attention_heads", "num_attention_heads"),
        mixers=_one(ALL_BIASED),
        mlp=Mlp("ffn_dim", gated=False, bias=True),
        learned_positions=None,
    ),
    "ctrl": replace(
        _GPT2,
        mlp=Mlp("dff", gated=False, bias=True),
        learned_positions=None,
        head_bias=True,
    ),
    "gpt_neox_japanese": Family(
        mixers=_one(Attention(num_kv_heads=None, head_dim=None)),
        mlp=MultipleMlp(gated=False),
        tied=True,
        norm_vectors=2,
        outer_extra=lambda body: body.hidden,
    ),
    "modernbert-decoder": Family(
        mixers=_slide(Attention(num_kv_heads=None, head_dim=None, qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS)),
        window="local_attention",
        window_of=lambda key, window: window // 2,
        kinds=layer_kinds.every("global_attn_every_n_layers", first=True, default=3),
        listed="layer_types",
        tied=True,
        mlp=Mlp(),
        outer_extra=lambda body: body.hidden * (body.hidden + 1),
        head_bias=("decoder_bias", True),
        count_if=lambda body: (
            not any(body.reader.switch((key, False)) for key in ("norm_bias", "mlp_bias", "classifier_bias"))
        ),
        inert=("sliding_window", "global_attn_every_n_layers", "classifier_pooling"),
    ),
    "bloom": Family(
        num_layers=("n_layer", "num_hidden_layers"),
        hidden=("hidden_size", "n_embed"),
        num_q_heads=("n_head", "num_attention_heads"),
        positions="seq_length",
        mixers=_one(ALL_BIASED),
        mlp=Mlp((), required=False, gated=False, bias=True),
        tied=True,
        norm_vectors=2,
        outer_extra=lambda body: 2 * body.hidden,
    ),
    "mpt": Family(
        num_layers="n_layers",
        hidden="d_model",
        num_q_heads="n_heads",
        positions="max_seq_len",
        mixers=_one(Attention(num_kv_heads=None, head_dim=None)),
        nested=("attn_config",),
        mlp=Mlp((), required=False, gated=False),
        tied=True,
        count_if=lambda body: body.reader.value("expansion_ratio") == 4,
    ),
    "dbrx": Family(
        num_layers="n_layers",
        hidden="d_model",
        num_q_heads="n_heads",
        positions="max_seq_len",
        mixers=_one(Attention("attn_config.kv_n_heads", head_dim=None)),
        nested=("attn_config", "ffn_config"),
        mlp=None,
        experts=Experts("ffn_config.moe_num_experts", "ffn_config.ffn_hidden_size", "ffn_config.moe_top_k"),
        inert=("num_key_value_heads",),
    ),
    "falcon": Family(
        mixers=_one(FalconAttention(head_dim=None, qkv_bias=("bias", False), out_bias=("bias", False))),
        mlp=Mlp("ffn_hidden_size", required=False, gated=False, bias=("bias", False)),
        tied=True,
        norm_vectors=2,
        norms=0,
        layer_extra=_falcon_norms,
        quirks=lambda body: ("broadcast",) if body.reader.switch(("new_decoder_architecture", False)) else (),
        inert=("num_kv_heads", "num_key_value_heads", "multi_query"),
    ),
    "persimmon": Family(
        mixers=_one(replace(ALL_BIASED, qk_norm="head", qk_norm_if=("qk_layernorm", True))),
        mlp=Mlp(gated=False, bias=True),
        norm_vectors=2,
    ),
    "stablelm": Family(
        mixers=_one(
            Attention(
                head_dim=None,
                qkv_bias=("use_qkv_bias", False),
                qk_norm="full",
                qk_norm_if=("qk_layernorm", False),
                qk_norm_vectors=1,
            )
        ),
        norm_vectors=2,
        count_if=lambda body: not body.reader.switch(("use_parallel_residual", False)),
    ),
}
