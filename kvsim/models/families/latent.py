"""Models whose tokens leave one latent: DeepSeek, Kimi, GLM, LongCat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvsim.models import layer_kinds
from kvsim.models.attention import CompressedAttention, Latent
from kvsim.models.config import Body, ConfigReader
from kvsim.models.families.family import (
    LENIENT,
    MLP_BIAS,
    SINKS,
    Family,
    _one,
    _plain_mlps,
)
from kvsim.models.feedforward import (
    Experts,
    Mlp,
    after,
    listed_or,
)
from kvsim.models.recurrent import Kda


def _streams(body: Body) -> int:
    return body.reader.count("hc_mult", "hc_mult", fill=True)


def _v4_layer(body: Body) -> int:
    """DeepSeek-V4's hyper-connections around attention and MLP."""
    many = _streams(body)
    width = many * (many + 2)
    return 2 * (width * many * body.hidden + width + 3)


def _v4_outer(body: Body) -> int:
    many = _streams(body)
    return many * many * body.hidden + many + 1


def _hy_v4_layer(body: Body) -> int:
    """Hunyuan 4's hyper-connections: they read and write the streams, and do not mix them."""
    many = _streams(body)
    return 2 * (2 * many * many * body.hidden + 2 * many + 2)


def _dots3_note(reader: ConfigReader) -> Mapping[str, Any]:
    """The window layers' own sizes as keys of their own: ``swa_*`` of the checkpoints, or a ``per_layer_config``."""
    config = dict(reader.config)
    each = reader.child("per_layer_config")
    first = {} if each is None or not each.config else next(iter(each.config.values()))
    if not isinstance(first, Mapping) or (each is not None and any(one != first for one in each.config.values())):
        raise reader.error("per_layer_config", "allowed is one and the same JSON object for every window layer")
    odd = set(first) - DOTS3_WINDOW.keys() - {"qk_rope_head_dim"}
    if odd:
        raise reader.error("per_layer_config", f"{min(map(str, odd))} is not known of this model type")
    for key, default in DOTS3_WINDOW.items():
        config.setdefault(f"swa_{key}", first.get(key, reader.get(key) if first else default))
    if "swa_qk_rope_head_dim" not in config:
        wide, nope = config["swa_head_dim"], config["swa_qk_nope_head_dim"]
        rope = wide - nope if isinstance(wide, int) and isinstance(nope, int) else None
        config["swa_qk_rope_head_dim"] = first.get(
            "qk_rope_head_dim", reader.get("qk_rope_head_dim") if first else rope
        )
    if config.get("sliding_window") is None:
        config["sliding_window"] = 512 if config.get("sliding_window_size") is None else config["sliding_window_size"]
    config.setdefault("shared_experts_intermediate_size", config.get("moe_shared_expert_intermediate_size", 1536))
    return config


DOTS3_WINDOW = {
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1024,
    "kv_lora_rank": 1024,
    "head_dim": 256,
    "qk_nope_head_dim": 192,
    "v_head_dim": 128,
}
"""What the class gives the window layers of dots3-note where the config does not say."""


def _dots3_layers(body: Body, kinds_of: list[str]) -> None:
    """Full attention has an indexer unless ``use_dsa`` is off, or absent beside a ``per_layer_config``, where the list
    says it; ``per_layer_config`` must speak of the window layers."""
    reader = body.reader
    each, given = reader.child("per_layer_config"), reader.listed("layer_types")
    if given is None and reader.get("use_sliding_window") is False:
        kinds_of[:] = ["full"] * body.num_layers
    sparse = reader.get("use_dsa")
    if sparse is False:
        kinds_of[:] = ["latent" if kind == "full" else kind for kind in kinds_of]
    elif sparse is None and each is not None and given is not None:
        plain = [spelling == "full_attention" for spelling in given[: body.num_layers]]
        kinds_of[:] = ["latent" if full else kind for full, kind in zip(plain, kinds_of, strict=True)]
    if each is not None and each.config:
        named = {int(key) for key in each.config if str(key).isdecimal() and len(str(key)) < 6}
        windows = {at for at, kind in enumerate(kinds_of) if kind == "sliding"}
        if len(named) != len(each.config) or named != windows:
            raise reader.error("per_layer_config", "allowed are the window layers, all of them")


class GatedLatent(Latent):
    """dots3-note's: a norm of the rotary key and a gate of one number a head."""

    def params(self, body: Body) -> int:
        return super().params(body) + self.sizes(body)[1] + body.hidden * self.q_heads(body)


class ScaledLatent(Latent):
    """Mistral Large 4's: queries without a low rank, scaled heads, an indexer with a norm of its input."""

    def params(self, body: Body) -> int:
        total = super().params(body) + 2 * body.num_q_heads
        if self.indexer:
            total += 2 * body.hidden + 2 * body.reader.count("index_heads", "index_n_heads")
        return total


def mistral_large4(body: Body) -> list[str]:
    """Layers by whether they have a rotary key (``no_rope_layers``), an indexer of their own (``indexer_types``), and
    latents of their own (``kv_source_layers``)."""
    reader, count = body.reader, body.num_layers
    indexed = layer_kinds.glm_dsa(body)
    rotary = reader.listed("no_rope_layers", count)
    if rotary is None:
        every = reader.count_or_none("rope_interval", "no_rope_layer_interval") or 4
        rotary = [int((layer + 1) % every != 0) for layer in range(count)]
    if not all(isinstance(one, int) and one in (0, 1) for one in rotary):
        raise reader.error("no_rope_layers", f"allowed are {count} entries of 0 and 1")
    sources = reader.listed("kv_source_layers", count)
    sources = list(range(count)) if sources is None else sources
    for layer, source in enumerate(sources):
        if (
            isinstance(source, bool)
            or not isinstance(source, int)
            or not 0 <= source <= layer
            or sources[source] != source
        ):
            raise reader.error("kv_source_layers", f"layer {layer} must name itself or an earlier layer with its own")
    return [
        ("" if sources[layer] == layer else "shared_")
        + ("rope" if rotary[layer] else "nope")
        + ("_indexed" if indexed[layer] == "full" else "")
        for layer in range(count)
    ]


def _unless_heads(body: Body) -> list[str]:
    """DeepSeek-V2's layers; without ``use_mla`` (DeepSeek-OCR, VL2 Tiny) they have keys and values of every head."""
    return ["full" if body.reader.switch(("use_mla", True)) else "heads"] * body.num_layers


def _index_modes(body: Body, kinds_of: list[str]) -> None:
    """``indexer_types``: layers of GLM 5.3's attention that reuse an earlier choice have no indexer."""
    for at, kind in enumerate(layer_kinds.glm_dsa(body)):
        if kinds_of[at] == "full" and kind == "latent":
            kinds_of[at] = "latent"


DSA = Latent(indexer=True)
_DEEPSEEK_MOE = Experts(
    ("n_routed_experts", "num_experts"),
    "moe_intermediate_size",
    shared_count=("n_shared_experts", "num_shared_experts"),
    sparse=after("first_k_dense_replace", 0),
)
_DEEPSEEK = Family(
    mixers=_one(Latent()),
    experts=_DEEPSEEK_MOE,
)


_HY_V4 = Family(
    mixers={
        "full": (replace(DSA, gate=True, extra=SINKS),),
        "latent": (Latent(gate=True, extra=SINKS),),
    },
    kinds=layer_kinds.hy_v4,
    experts=replace(_DEEPSEEK_MOE, sparse=listed_or(1)),
    layer_extra=_hy_v4_layer,
    outer_extra=_v4_outer,
    count_if=_plain_mlps,
    inert=("indexer_types", "layer_types"),
)


LATENT: dict[str, Family] = {
    # Latent attention
    "deepseek_v2": replace(
        _DEEPSEEK,
        mixers={"full": (Latent(),), "heads": (replace(LENIENT, head_dim=None),)},
        kinds=_unless_heads,
        experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 0)),
        count_if=_plain_mlps,
        inert=("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
    "deepseek_v3": replace(_DEEPSEEK, experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 3))),
    "kimi_k2": replace(_DEEPSEEK, experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 3))),
    "deepseek_v32": Family(
        mixers=_one(DSA),
        listed="layer_types",
        experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 3)),
        inert=("indexer_rope_interleave",),
    ),
    "glm_moe_dsa": Family(
        mixers={"full": (DSA,), "latent": (Latent(),)},
        kinds=layer_kinds.glm_dsa,
        experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 3)),
        inert=(
            "indexer_rope_interleave",
            "indexer_types",
            "index_topk_pattern",
            "index_topk_freq",
            "index_skip_topk_offset",
        ),
    ),
    "axk2": Family(
        mixers=_one(DSA), listed="layer_types", experts=replace(_DEEPSEEK_MOE, sparse=listed_or(1)), countable=False
    ),
    "hy_v4": _HY_V4,
    "hy_v4_vl_text": _HY_V4,
    "dots3_note_text": Family(
        mixers={
            "full": (GatedLatent(indexer=True),),
            "latent": (GatedLatent(),),
            "sliding": (GatedLatent(prefix="swa_"),),
        },
        window="sliding_window",
        kinds=lambda body: ["full" if layer < 2 or layer % 4 == 1 else "sliding" for layer in range(body.num_layers)],
        listed="layer_types",
        rewrite=_dots3_note,
        check=_dots3_layers,
        experts=replace(
            _DEEPSEEK_MOE, shared_inner="shared_experts_intermediate_size", shared_count=None, sparse=listed_or(1)
        ),
        count_if=lambda body: _plain_mlps(body) and body.reader.get("n_shared_experts") in (None, 1),
        quirks=lambda body: ("float32 index",),
        inert=(
            *(f"swa_{key}" for key in (*DOTS3_WINDOW, "qk_rope_head_dim", "rope_theta")),
            "sliding_window_size",
            "index_topk",
            "index_head_dim",
            "index_n_heads",
            "per_layer_config",
            "use_dsa",
            "use_sliding_window",
            "moe_shared_expert_intermediate_size",
            "n_shared_experts",
            "layer_types",
        ),
    ),
    "glm5_next_text": Family(
        mixers={
            "full": (Latent(indexer=True, packed=True, nope=True),),
            "latent": (Latent(nope=True),),
            "linear": (Kda(),),
        },
        kinds=layer_kinds.every(4, rest="linear"),
        listed="layer_types",
        check=_index_modes,
        experts=replace(_DEEPSEEK_MOE, sparse=listed_or(3)),
        layer_extra=_v4_layer,
        count_if=_plain_mlps,
        inert=(
            "linear_attn_config",
            "indexer_types",
            "index_topk_pattern",
            "index_topk_freq",
            "index_kpool",
            "index_skip_topk_offset",
            "linear_lower_bound",
            "index_kpool_always_select_tail",
        ),
    ),
    "mistral_large4_text": Family(
        mixers={
            f"{shared}{rope}{indexed}": (ScaledLatent(indexer=bool(indexed), rotary=rope == "rope", own=not shared),)
            for shared in ("", "shared_")
            for rope in ("rope", "nope")
            for indexed in ("", "_indexed")
        },
        kinds=mistral_large4,
        experts=replace(_DEEPSEEK_MOE, sparse=listed_or(1)),
        outer_extra=lambda body: body.reader.count("rope", "qk_rope_head_dim") // 2,
        count_if=lambda body: _plain_mlps(body) and not body.reader.switch(("attention_bias", False)),
        inert=(
            "kv_source_layers",
            "no_rope_layers",
            "no_rope_layer_interval",
            "indexer_types",
            "index_topk_pattern",
            "index_topk_freq",
            "index_skip_topk_offset",
            "layer_types",
        ),
    ),
    "glm4_moe_lite": replace(_DEEPSEEK, experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 1))),
    "mistral4": _DEEPSEEK,
    "sarvam_mla": replace(_DEEPSEEK, experts=replace(_DEEPSEEK_MOE, sparse=listed_or(1))),
    "minicpm3": Family(
        mixers=_one(Latent()),
        tied=True,
        mlp=Mlp(bias=MLP_BIAS),
    ),
    "youtu": Family(
        mixers=_one(Latent()),
        tied=True,
    ),
    "axk1": replace(_DEEPSEEK, experts=replace(_DEEPSEEK_MOE, sparse=listed_or(1), extra=lambda hidden, count: hidden)),
    "longcat_flash": Family(
        num_layers=("num_layers", "num_hidden_layers"),
        mixers=_one(Latent(), Latent()),
        norms=4,
        mlp=Mlp("ffn_hidden_size"),
        mlps=2,
        experts=Experts(
            "n_routed_experts", "expert_ffn_hidden_size", "moe_topk", zero_count="zero_expert_num", dense_too=True
        ),
        countable=False,
    ),
    "deepseek_v4": Family(
        mixers={
            "sliding": (CompressedAttention(),),
            "csa": (CompressedAttention(4, indexer=True),),
            "hca": (CompressedAttention(128),),
        },
        window="sliding_window",
        kinds=layer_kinds.deepseek_v4,
        listed="layer_types",
        experts=replace(_DEEPSEEK_MOE, shared_count=None, shared_inner="moe_intermediate_size", sparse=None),
        mlp=None,
        count_if=lambda body: _plain_mlps(body) and body.reader.get("n_shared_experts") in (None, 1),
        layer_extra=_v4_layer,
        quirks=lambda body: ("two tensors", "compressed"),
        outer_extra=_v4_outer,
        inert=(
            "mlp_layer_types",
            "compress_ratios",
            "compress_rope_theta",
            "num_hash_layers",
            "hc_sinkhorn_iters",
            "expert_dtype",
            "o_groups",
            "compress_rates",
        ),
    ),
    "deepseek_v41_text": Family(
        mixers={
            "sliding": (CompressedAttention(),),
            **{f"csa{stride}": (CompressedAttention(stride, indexer=True),) for stride in layer_kinds.V41_STRIDES},
        },
        window="sliding_window",
        rewrite=lambda reader: {key: value for key, value in reader.config.items() if key != "layer_types"},
        kinds=layer_kinds.deepseek_v41,
        experts=replace(_DEEPSEEK_MOE, shared_count=None, shared_inner="moe_intermediate_size", sparse=None),
        mlp=None,
        countable=False,
        quirks=lambda body: ("two tensors", "compressed", "pooled once"),
        inert=(
            "compress_rope_theta",
            "index_source_layer_ids",
            "candidate_source_layer_id",
            "candidate_topk_blocks",
            "candidate_block_size",
            "hc_mult",
            "hc_sinkhorn_iters",
            "engram_layer_ids",
            "engram_vocab_size",
            "engram_num_embeddings",
            "engram_max_ngram_size",
            "engram_n_heads",
            "engram_head_dim",
            "engram_pad_id",
            "engram_compressed_vocab_size",
            "dspark_block_size",
            "dspark_noise_token_id",
            "dspark_target_layer_ids",
            "dspark_markov_rank",
            "dspark_n_routed_experts",
            "dspark_num_experts_per_tok",
        ),
    ),
}
