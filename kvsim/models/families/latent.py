"""Models whose tokens leave one latent: DeepSeek, Kimi, GLM, LongCat."""

from __future__ import annotations

from dataclasses import replace

from kvsim.models import layer_kinds
from kvsim.models.attention import Compressed, Latent
from kvsim.models.config import Body
from kvsim.models.families.family import (
    MLP_BIAS,
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


LATENT: dict[str, Family] = {
    # Latent attention
    "deepseek_v2": replace(
        _DEEPSEEK, experts=replace(_DEEPSEEK_MOE, sparse=after("first_k_dense_replace", 0)), count_if=_plain_mlps
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
    "hy_v4": Family(
        mixers={"full": (DSA,), "latent": (Latent(),)},
        kinds=layer_kinds.hy_v4,
        experts=replace(_DEEPSEEK_MOE, sparse=listed_or(1)),
        countable=False,
        inert=("indexer_types",),
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
            "sliding": (Compressed(),),
            "csa": (Compressed(4, indexer=True),),
            "hca": (Compressed(128),),
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
}
