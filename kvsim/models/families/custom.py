"""Models whose code is published beside the weights, not in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvsim.layout import LayerShape
from kvsim.models.attention import Attention
from kvsim.models.config import AbsentKeyError, Body, ConfigReader, Shapes
from kvsim.models.families.family import (
    Family,
    _one,
    _plain_mlps,
)
from kvsim.models.families.latent import _DEEPSEEK_MOE
from kvsim.models.families.llama import (
    _LLAMA,
)
from kvsim.models.feedforward import (
    Mlp,
    listed_or,
)


class GroupedAttention(Attention):
    """ChatGLM's: ``multi_query_group_num`` heads where ``multi_query_attention`` is on."""

    def _kv_heads(self, body: Body) -> int:
        if body.reader.switch(("multi_query_attention", False)):
            return body.reader.count("num_kv_heads", "multi_query_group_num")
        body.reader.sources["num_kv_heads"] = body.reader.label("num_attention_heads")
        return body.num_q_heads


def nas_blocks(body: Body) -> list[Shapes]:
    """Nemotron's ``block_configs``: a layer's ``n_heads_in_group`` query heads share one kv head, or no attention."""
    reader = body.reader
    blocks = reader.listed("block_configs", body.num_layers)
    if blocks is None:
        raise reader.error("block_configs", "this model type must describe its blocks")
    if body.hidden % body.num_q_heads:
        raise reader.error("num_attention_heads", f"allowed are divisors of hidden_size {body.hidden}")
    head_dim = body.hidden // body.num_q_heads
    reader.sources |= {
        "num_kv_heads": f"{reader.label('num_attention_heads')} / block_configs attention.n_heads_in_group",
        "head_dim": f"{reader.sources['hidden_size']} / num_attention_heads",
    }
    out: list[Shapes] = []
    for at, block in enumerate(blocks):
        attention = block.get("attention") if isinstance(block, dict) else None
        where = f"config key {reader.label('block_configs')}[{at}].attention"
        if not isinstance(attention, dict):
            raise ValueError(f"{where} is {str(attention)[:40]}: allowed is a JSON object")
        if attention.get("no_op") is True or attention.get("replace_with_linear") is True:
            out.append(())
            continue
        for key in ("window_length", "num_sink_tokens", "sparsify", "unshifted_sink"):
            if attention.get(key):
                raise ValueError(f"{where}.{key} is {attention[key]!r}: not supported")
        group = attention.get("n_heads_in_group")
        if isinstance(group, bool) or not isinstance(group, int) or group < 1 or body.num_q_heads % group:
            raise ValueError(
                f"{where}.n_heads_in_group is {group!r}: allowed are divisors of the {body.num_q_heads} query heads"
            )
        out.append((LayerShape(body.num_q_heads // group, head_dim, head_dim),))
    return out


def _nas_weights(body: Body) -> int:
    """Weights of Nemotron's blocks: attention and MLP each with its norm, one matrix, or nothing."""
    hidden, blocks = body.hidden, body.reader.listed("block_configs", body.num_layers) or []
    square = hidden * hidden
    total = 0
    for at, (block, shapes) in enumerate(zip(blocks, nas_blocks(body), strict=True)):
        if shapes:
            total += 2 * square + hidden * 2 * sum(
                s.num_kv_heads * s.key_dim for s in shapes if isinstance(s, LayerShape)
            )
        elif block["attention"].get("replace_with_linear") is True:
            total += square
        total += hidden * (block["attention"].get("no_op") is not True)
        mlp = block.get("ffn")
        if not isinstance(mlp, dict):
            raise AbsentKeyError(f"config key {body.reader.label('block_configs')}[{at}].ffn is not an object")
        if mlp.get("no_op") is True:
            continue
        factor = mlp.get("ffn_mult")
        if mlp.get("replace_with_linear") is True:
            total += square
        elif isinstance(factor, int | float) and 0 < factor < 1e3:
            total += 3 * hidden * -(-int(2 * factor * hidden / 3) // 256) * 256
        else:
            raise AbsentKeyError(f"config key {body.reader.label('block_configs')}[{at}].ffn.ffn_mult is {factor!r}")
        total += hidden
    return total


def _openelm(reader: ConfigReader) -> Mapping[str, Any]:
    """The query heads of the widest layer as those of the model."""
    given = reader.get("num_query_heads")
    heads = [one for one in given if isinstance(one, int)] if isinstance(given, list) else []
    return {**reader.config, "num_attention_heads": max(heads, default=None)}


def _openelm_heads(body: Body) -> tuple[list[int], list[int], int]:
    """OpenELM's query heads and kv heads, layer by layer, and the head dim."""
    reader = body.reader
    heads = []
    for key in ("num_query_heads", "num_kv_heads"):
        given = reader.listed(key, body.num_layers)
        if given is None:
            raise reader.error(key, "this model type must list its heads")
        if not all(isinstance(one, int) and not isinstance(one, bool) and 0 < one <= 65536 for one in given):
            raise reader.error(key, "allowed are whole numbers above 0")
        heads.append(given)
    if any(queries % kv for queries, kv in zip(*heads, strict=True)):
        raise reader.error("num_kv_heads", "allowed are divisors of num_query_heads, layer by layer")
    reader.sources["num_kv_heads"] = reader.label("num_kv_heads")
    return heads[0], heads[1], reader.count("head_dim", "head_dim")


def openelm_layers(body: Body) -> list[Shapes]:
    """OpenELM's (arXiv:2404.14619): deeper layers have more heads."""
    _, kv, dim = _openelm_heads(body)
    return [(LayerShape(heads, dim, dim),) for heads in kv]


def _openelm_weights(body: Body) -> int:
    """Attention, and a gated MLP whose width grows with the depth, rounded as the class does."""
    reader, hidden = body.reader, body.hidden
    queries, kv, dim = _openelm_heads(body)
    total = sum(hidden * dim * (2 * query + 2 * heads) for query, heads in zip(queries, kv, strict=True))
    if reader.switch(("normalize_qk_projections", True)):
        total += 2 * dim * body.num_layers
    divisor = reader.count("ffn_divisor", "ffn_dim_divisor")
    factors = reader.listed("ffn_multipliers", body.num_layers)
    if factors is None:
        raise AbsentKeyError(f"config key {reader.label('ffn_multipliers')} is absent")
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e3:
            raise reader.error("ffn_multipliers", "allowed are numbers above 0")
        width = max(divisor, int(factor * hidden + divisor / 2) // divisor * divisor)
        width += divisor if width < 0.9 * factor * hidden else 0
        total += 3 * hidden * width
    return total


CUSTOM: dict[str, Family] = {
    # Published with code of their own
    "nemotron-nas": Family(
        mixers={}, layers=nas_blocks, norms=0, mlp=None, outer_extra=_nas_weights, inert=("block_configs",)
    ),
    "openelm": Family(
        num_layers="num_transformer_layers",
        hidden="model_dim",
        rewrite=_openelm,
        positions="max_context_length",
        mixers={},
        layers=openelm_layers,
        mlp=None,
        tied=True,
        outer_extra=_openelm_weights,
        count_if=lambda body: (
            body.reader.switch(("ffn_with_glu", True)) and body.reader.switch(("share_input_output_layers", True))
        ),
        inert=("num_query_heads", "num_kv_heads", "num_gqa_groups", "qkv_multipliers"),
    ),
    "internlm2": Family(mixers=_one(Attention(kv_required=False, qkv_bias=("bias", False), out_bias=("bias", False)))),
    "internlm": Family(mixers=_one(Attention(None, head_dim=None, qkv_bias=("bias", True), out_bias=("bias", True)))),
    "baichuan": Family(
        positions=("max_position_embeddings", "model_max_length"), mixers=_one(Attention(None, head_dim=None))
    ),
    "chatglm": Family(
        num_layers="num_layers",
        positions="seq_length",
        vocab=("padded_vocab_size", "vocab_size"),
        mixers=_one(GroupedAttention(head_dim="kv_channels", qkv_bias=("add_qkv_bias", False))),
        mlp=Mlp("ffn_hidden_size"),
        inert=("multi_query_attention", "multi_query_group_num"),
    ),
    "qwen": Family(
        positions=("seq_length", "max_position_embeddings"),
        mixers=_one(Attention(None, head_dim="kv_channels", qkv_bias=True)),
        mlp=Mlp(half=True),
        inert=("use_cache_quantization", "use_cache_kernel"),
    ),
    "deepseek": replace(_LLAMA, experts=replace(_DEEPSEEK_MOE, sparse=listed_or(0)), count_if=_plain_mlps),
    "orion": replace(_LLAMA, norm_vectors=2, count_if=_plain_mlps),
    "exaone": replace(_LLAMA, num_layers=("num_layers", "num_hidden_layers")),
    "minicpm": _LLAMA,
}
