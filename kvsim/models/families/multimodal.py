"""Text sides of vision and audio models, where they are no plain copy of a language model's row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvsim.models import layer_kinds
from kvsim.models.attention import Attention
from kvsim.models.config import LARGEST, Body, ConfigReader
from kvsim.models.families.family import (
    ATTENTION_BIAS,
    BIASED,
    LENIENT,
    MLP_BIAS,
    NORMED,
    Family,
    _one,
    _plain_mlps,
    _slide,
)
from kvsim.models.families.latent import _DEEPSEEK_MOE
from kvsim.models.families.llama import LLAMA
from kvsim.models.feedforward import Experts, Mlp, listed_or


class LatentExperts(Experts):
    """Muse Spark's: experts work in a width of their own, with a norm before and behind them."""

    def block(self, body: Body) -> tuple[int, int]:
        dense, routed = super().block(body)
        return dense + 2 * body.reader.count("expert_latent", self.latent or ()), routed


def _ernie_vl(reader: ConfigReader) -> Mapping[str, Any]:
    """Text and vision have experts of their own, as many and of another width: lists of two say both."""
    out = dict(reader.config)
    for key in ("moe_intermediate_size", "moe_num_experts"):
        given = reader.value(key)
        if isinstance(given, list | tuple):
            sizes = [isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST for size in given]
            if len(given) != 2 or not all(sizes):
                raise reader.error(key, "allowed are two whole numbers, of text and vision")
            out |= {key: given[0], f"vision.{key}": given[1]}
    return out


def _ernie_vision_experts(body: Body) -> int:
    """The experts of images, of which a step over text reads nothing: with their routers."""
    reader = body.reader
    experts, inner = (
        reader.count("text_experts", "moe_num_experts"),
        reader.count("text_inner", "moe_intermediate_size"),
    )
    count = reader.count_or_none("vision_experts", "vision.moe_num_experts") or experts
    width = reader.count_or_none("vision_inner", "vision.moe_intermediate_size") or inner
    return sum(_ernie_sparse(body)) * count * (3 * body.hidden * width + body.hidden + 1)


_ernie_sparse = listed_or(1)


def from_last(body: Body) -> list[str]:
    """Full in every fourth layer counted backward from the last, sliding in the others."""
    return ["sliding" if (body.num_layers - 1 - layer) % 4 else "full" for layer in range(body.num_layers)]


def prompt_kept(body: Body) -> list[str]:
    """Unlimited-OCR's: the prompt is kept whole, answers slide; counted as if all tokens were of the prompt."""
    window = body.reader.value("sliding_window")
    if window is not None:
        body.note(
            f"{body.reader.label('sliding_window')} {str(window)[:20]}: the prompt is kept whole and the answer's "
            "newest tokens alone; counted as if every token were of the prompt"
        )
    return layer_kinds.full(body)


def image_layers(body: Body) -> list[str]:
    """Llama 3.2 Vision's ``cross_attention_layers`` keep an image's keys and values and none of the text's."""
    chosen = body.reader.indices("cross_attention_layers")
    if chosen is None or not chosen <= set(range(body.num_layers)):
        raise body.reader.error("cross_attention_layers", f"allowed are layers 0 to {body.num_layers - 1}")
    if chosen:
        body.note(f"{len(chosen)} layers of cross attention keep the keys and values of images; not counted")
    return ["none" if layer in chosen else "full" for layer in range(body.num_layers)]


def _cross_attention(body: Body) -> int:
    """Llama 3.2 Vision's layers of cross attention, with two gates and norms of queries and keys."""
    attention = Attention(qk_norm="head")
    layers = len(body.reader.indices("cross_attention_layers") or ())
    return layers * (attention.params(body) + 2)


def _gated(mixer: Attention) -> Attention:
    """With an output gate as wide as the heads."""
    return replace(mixer, extra=lambda hidden, heads, kv, dim: hidden * heads * dim)


_MUSE = Family(
    mixers=_slide(_gated(replace(BIASED, head_dim_required=True))),
    window="sliding_window",
    kinds=from_last,
    listed="layer_types",
    norms=4,
    inert=("layer_rope_theta",),
    count_if=lambda body: not body.reader.switch(ATTENTION_BIAS),
)
_ONE_HEAD_A_QUERY = Family(
    mixers=_one(LENIENT),
    experts=replace(_DEEPSEEK_MOE, sparse=listed_or(0)),
    listed="layer_types",
    count_if=_plain_mlps,
    inert=("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank", "use_mla"),
)


MULTIMODAL: dict[str, Family] = {
    "chameleon": Family(
        mixers=_one(replace(LENIENT, qk_norm="full", qk_norm_vectors=2)),
        mlp=Mlp(bias=MLP_BIAS),
        inert=("vocabulary_map",),
    ),
    "cosmos3_edge_text": Family(
        mixers=_one(replace(LENIENT, head_dim_required=True)), mlp=Mlp(gated=False, bias=MLP_BIAS)
    ),
    "deepseek_ocr2_text": _ONE_HEAD_A_QUERY,
    "unlimited_ocr_text": replace(
        _ONE_HEAD_A_QUERY,
        kinds=prompt_kept,
        listed=None,
        inert=(*_ONE_HEAD_A_QUERY.inert, "sliding_window", "layer_types"),
    ),
    "ernie4_5_vl_moe_text": Family(
        mixers=_one(Attention(qkv_bias=("use_bias", False), out_bias=("use_bias", False))),
        tied=True,
        mlp=Mlp(bias=("use_bias", False)),
        rewrite=_ernie_vl,
        experts=Experts(
            "moe_num_experts",
            "moe_intermediate_size",
            "moe_k",
            sparse=_ernie_sparse,
            shared_count="moe_num_shared_experts",
            router_vectors=1,
        ),
        lookup_extra=_ernie_vision_experts,
        count_if=lambda body: not body.reader.switch(("use_bias", False)),
    ),
    "glm_ocr_text": replace(LLAMA["glm4"], mixers=_one(replace(LENIENT, qkv_bias=False, out_bias=False)), norms=4),
    "glm_image_text": replace(
        LLAMA["glm4"],
        mixers=_one(replace(LENIENT, qkv_bias=("attention_bias", True), out_bias=False)),
        head_vocab="vision_vocab_size",
    ),
    "mllama_text_model": Family(
        mixers=_one(Attention(head_dim=None)),
        kinds=image_layers,
        outer_extra=_cross_attention,
        lookup_extra=lambda body: 8 * body.hidden,
        inert=("cross_attention_layers",),
        count_if=lambda body: not body.reader.switch(("tie_word_embeddings", False)),
    ),
    "molmo2_text": Family(
        mixers=_one(
            replace(
                LENIENT,
                head_dim_required=True,
                out_bias=False,
                qk_norm="head",
            )
        ),
        rewrite=lambda reader: {"attention_bias": reader.get("qkv_bias"), **reader.config},
        lookup_extra=lambda body: (
            body.hidden * body.reader.count("extra", "additional_vocab_size", zero=True, fill=True)
        ),
        count_if=lambda body: body.reader.get("qk_norm_type") in (None, "qwen3"),
    ),
    "muse_glimmer_text": _MUSE,
    "muse_spark_text": replace(
        _MUSE,
        norms=3,
        layer_extra=lambda body: 2 * body.hidden,
        experts=LatentExperts(
            "num_local_experts", "moe_intermediate_size", latent="moe_hidden_size", sparse=listed_or(0)
        ),
    ),
    "phi4_multimodal": LLAMA["phi3"],
    "voxtral_realtime_text": replace(
        LLAMA["mistral"],
        mixers=_slide(Attention(head_dim_required=True)),
        kinds=layer_kinds.windowed,
        tied=True,
        layer_extra=lambda body: 64 * body.hidden,
    ),
    "qwen3_omni_moe_talker_text": replace(LLAMA["qwen3_moe"], mixers=_slide(NORMED)),
}
