"""What each ``model_type`` of a config.json means: which keys hold the numbers, and what a layer is made of.

One row a family, read from the model's class in transformers 5.17 to 5.24 (or, where it is not there, from the
code published with the model).  :mod:`kvsim.models.model` reads the keys, :mod:`kvsim.models.parameters` counts
the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Protocol

from kvsim.body import Body, Count, Shapes
from kvsim.layout import LayerShape
from kvsim.models import layer_kinds
from kvsim.models.attention import Attention, BlockSparse, Compressed, Latent
from kvsim.models.config import AbsentKeyError, ConfigReader, Keys, Switch
from kvsim.models.feedforward import (
    Experts,
    Mlp,
    after,
    if_any,
    if_enabled,
    interleaved,
    listed_or,
    none,
    periodic,
    ranged,
)
from kvsim.models.feedforward import stepped as stepped_layers
from kvsim.models.recurrent import DeltaNet, Kda, Lightning, Mamba, Mamba2, RgLru, Rwkv, ShortConv


class Mixer(Protocol):
    """What mixes tokens in a layer: attention, or a recurrence."""

    def shapes(self, body: Body, window: int | None = None, kind: str = "") -> Shapes:
        """What it leaves: per token, or per sequence."""

    def params(self, body: Body) -> int:
        """Its weights."""


Mixers = Mapping[str, tuple[Mixer, ...]]


@dataclass(frozen=True)
class Family:
    """How to read one ``model_type``.  The defaults are Llama's."""

    num_layers: Keys = "num_hidden_layers"
    hidden: Keys = "hidden_size"
    num_q_heads: Keys | None = "num_attention_heads"  # None: a family without attention
    positions: Keys = "max_position_embeddings"
    vocab: Keys = "vocab_size"
    mixers: Mixers = field(default_factory=lambda: {"full": (Attention(),)})
    kinds: layer_kinds.Kinds = layer_kinds.full
    listed: Keys | None = None  # a list of layer kinds, which goes before the rule
    window: Keys | None = None  # key of the sliding window; without one no layer slides
    window_plus: int = 0  # the class's window is this much longer than the key says
    chunk: str | None = None
    sharing: str | None = None  # key: number of last layers that use an earlier layer's cache
    streams: int = 1  # caches a layer
    single: bool = False  # a layer is a mixer or an MLP, not both
    nested: tuple[str, ...] = ()  # objects whose keys are read as `object.key`
    forced_last: str | None = None  # kind that the class gives the last layer whatever the config says
    check: Callable[[Body, list[str]], None] | None = None  # refuses what the class's kinds do not allow
    layers: Callable[[Body], list[Shapes]] | None = None  # a rule of its own for what every layer leaves
    quirks: Callable[[Body], tuple[str, ...]] | None = None  # see Model.quirks
    inert: tuple[str, ...] = ()  # keys, beside those read, that look like the cache's and do not change it
    # What follows only serves the parameter count.
    countable: bool = True
    count_if: Callable[[Body], bool] | None = None
    tied: bool = False
    learned_positions: int | None = None  # rows of the position table beside the positions
    norm_vectors: int = 1  # weight; 2: weight and bias; 0: a norm without parameters
    norms: int = 2  # norms a layer
    final_norm: bool = True
    mlp: Mlp | None = field(default_factory=Mlp)
    mlps: int = 1  # plain MLPs a layer
    head_bias: Switch = False
    experts: Experts | None = None
    layer_extra: Count | None = None
    outer_extra: Count | None = None
    lookup_extra: Count | None = None


@cache
def known_keys(model_type: str) -> frozenset[str]:
    """Every key that the family's row names, read or not."""
    return frozenset(_strings(FAMILIES[model_type]))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, Mapping):
        yield from _strings(tuple(value.values()))
    elif is_dataclass(value):
        yield from _strings(tuple(getattr(value, field.name) for field in fields(value)))


ATTENTION_BIAS = ("attention_bias", False)
MLP_BIAS = ("mlp_bias", False)
BIASED = Attention(qkv_bias=ATTENTION_BIAS, out_bias=ATTENTION_BIAS)
LENIENT = replace(BIASED, kv_required=False)
HEADED = replace(BIASED, head_dim_required=True)
NORMED = replace(HEADED, qk_norm="head")
SINKS: Callable[[int, int, int, int], int] = lambda hidden, heads, kv, dim: heads  # noqa: E731
ALL_BIASED = Attention(num_kv_heads=None, head_dim=None, qkv_bias=True, out_bias=True)


def _one(*mixers: Mixer) -> Mixers:
    return {"full": mixers}


def _slide(mixer: Mixer, sliding: Mixer | None = None) -> Mixers:
    return {"full": (mixer,), "sliding": (sliding or mixer,)}


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


class DoubledAttention(Attention):
    """MiMo-V2's sliding layers: ``swa_num_key_value_heads``, or twice the full layers'."""

    def _kv_heads(self, body: Body) -> int:
        given = body.reader.count_or_none("num_kv_heads", "swa_num_key_value_heads")
        return given or 2 * body.reader.count("num_kv_heads", "num_key_value_heads")


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


class DoubleMlp(Mlp):
    """Gemma 4's: with ``use_double_wide_mlp`` the layers that share a cache have twice the width."""

    def widths(self, body: Body) -> list[int]:
        out = super().widths(body)
        shared = body.reader.count_or_none("num_shared", "num_kv_shared_layers", zero=True) or 0
        if body.reader.switch(("use_double_wide_mlp", False)) and shared:
            out[-shared:] = [2 * width for width in out[-shared:]]
        return out


class GroupedAttention(Attention):
    """ChatGLM's: ``multi_query_group_num`` heads where ``multi_query_attention`` is on."""

    def _kv_heads(self, body: Body) -> int:
        if body.reader.switch(("multi_query_attention", False)):
            return body.reader.count("num_kv_heads", "multi_query_group_num")
        body.reader.sources["num_kv_heads"] = body.reader.label("num_attention_heads")
        return body.num_q_heads


def _falcon_norms(body: Body) -> int:
    """Parameters of a Falcon layer's norms."""
    reader = body.reader
    norms = 2
    if reader.switch(("parallel_attn", True)):
        given = reader.count_or_none("norms", "num_ln_in_parallel_attn")
        norms = given or (2 if reader.switch(("new_decoder_architecture", False)) else 1)
    return norms * body.norm_vectors * body.hidden


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


def _opt_outer(body: Body) -> int:
    """OPT's projections between the width of words and the hidden width, less the embedding's difference, and its
    last norm, which a model that normalizes behind its layers lacks."""
    reader = body.reader
    width = reader.count_or_none("word_embed_proj_dim", "word_embed_proj_dim") or body.hidden
    vocab = reader.count("vocab_size", "vocab_size")
    last = reader.switch(("do_layer_norm_before", True)) and not reader.switch(("_remove_final_layer_norm", False))
    projected = 0 if width == body.hidden else 2 * width * body.hidden + vocab * (width - body.hidden)
    return projected + (body.norm_vectors * body.hidden if last else 0)


def _same_heads(body: Body) -> bool:
    """Whether every layer has the model's number of query heads."""
    return all(heads == body.num_q_heads for heads in body.reader.listed("num_attention_heads_per_layer") or [])


def _plain_mlps(body: Body) -> bool:
    """Whether no MLP has a bias (shared experts have one beside the dense layers')."""
    return not body.reader.switch(MLP_BIAS)


DSA = Latent(indexer=True)
_DEEPSEEK_MOE = Experts(
    ("n_routed_experts", "num_experts"),
    "moe_intermediate_size",
    shared_count=("n_shared_experts", "num_shared_experts"),
    sparse=after("first_k_dense_replace", 0),
)
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
_DEEPSEEK = Family(
    mixers=_one(Latent()),
    experts=_DEEPSEEK_MOE,
)
_OPT = Family(
    mixers=_one(replace(ALL_BIASED, qkv_bias=("enable_bias", True), out_bias=("enable_bias", True))),
    mlp=Mlp("ffn_dim", gated=False, bias=("enable_bias", True)),
    tied=True,
    learned_positions=2,
    norm_vectors=2,
)
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
_SHARED_GATED = Experts(
    ("num_experts", "num_local_experts"),
    "moe_intermediate_size",
    shared_inner="shared_expert_intermediate_size",
    shared_gate=True,
    sparse=stepped_layers,
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
_KIMI_LINEAR = Family(
    positions=("model_max_length", "max_position_embeddings"),
    mixers={"full": (Latent(),), "linear": (Kda(),)},
    kinds=layer_kinds.kimi,
    listed="layer_types",
    inert=("linear_attn_config",),
    experts=Experts(
        "num_experts",
        "moe_intermediate_size",
        ("num_experts_per_token", "num_experts_per_tok"),
        shared_count="num_shared_experts",
        sparse=listed_or(1),
    ),
)
_GRANITE_MOE = Experts("num_local_experts", "intermediate_size", shared_inner="shared_intermediate_size")
_EXAONE4 = Family(
    mixers=_slide(replace(LENIENT, qkv_bias=False, out_bias=False, qk_norm="head")),
    window="sliding_window",
    kinds=layer_kinds.exaone4,
    listed="layer_types",
    inert=("sliding_window_pattern",),
)
_MAMBA = Family(
    num_q_heads=None,
    kinds=layer_kinds.linear,
    mixers={"linear": (Mamba("intermediate_size"),)},
    tied=True,
    norms=1,
    mlp=None,
)

FAMILIES: dict[str, Family] = {
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
            Attention(("num_attention_groups", "num_key_value_heads"), head_dim_required=True),
            Attention(
                ("attention_other_setting.num_attention_groups", "num_attention_groups", "num_key_value_heads"),
                head_dim=("attention_other_setting.head_dim", "head_dim"),
                head_dim_required=True,
            ),
        ),
        window="sliding_window",
        listed="layer_types",
        nested=("attention_other_setting",),
        experts=_STEPPED,
        countable=False,
        inert=("attention_other_setting", "attention_other_setting.attention_type"),
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
        window_plus=1,
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
    # Recurrences and hybrids
    "qwen3_next": replace(_QWEN_HYBRID, experts=_SHARED_GATED),
    "qwen3_5_text": _QWEN_HYBRID,
    "qwen3_5_moe_text": replace(_QWEN_HYBRID, mlp=None, experts=replace(_SHARED_GATED, sparse=None)),
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
        kinds=layer_kinds.every("layer_group_size", rest="linear", default=6),
        inert=("layer_group_size", "short_conv_kernel_size", "kda_safe_gate", "kda_lower_bound"),
        countable=False,
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
    # Published with code of their own
    "nemotron-nas": Family(
        mixers={}, layers=nas_blocks, norms=0, mlp=None, outer_extra=_nas_weights, inert=("block_configs",)
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

FAMILIES["gemma4_unified_text"] = replace(
    FAMILIES["gemma4_text"], experts=None, layer_extra=None, outer_extra=None, lookup_extra=None
)
FAMILIES["apertus1p5_text"] = replace(
    FAMILIES["apertus"],
    count_if=lambda body: body.reader.get("output_vocab_size") in (None, body.reader.get("vocab_size")),
)
for alias, known in {
    "kimi_k25_text": "kimi_k2",
    "minimax_text_01": "minimax",
    "minimax_m1": "minimax",
    "gpt-sw3": "gpt2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "minimax_m3_vl_text": "minimax_m3",
}.items():
    FAMILIES[alias] = FAMILIES[known]

WRAPPERS = (
    "mistral3", "ministral3", "llama4", "gemma3", "gemma3n", "gemma4", "qwen3_5", "qwen3_5_moe", "kimi_k25",
    "llava", "llava_next", "vipllava", "paligemma", "internvl", "aya_vision", "cohere2_vision", "idefics3", "smolvlm",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "got_ocr2", "lfm2_vl", "minimax_m3_vl", "kimi_vl",
    "glm4v", "glm4v_moe", "glm46v", "qwen2_5_omni", "qwen3_omni_moe", "step3p7", "kimi_k3", "internvl_chat",
    "llava_next_video", "llava_onevision", "video_llava", "video_llama_3", "idefics2",
    "aria", "ovis2", "perception_lm", "fast_vlm", "deepseek_vl", "deepseek_vl_hybrid", "janus", "lighton_ocr",
    "qianfan_ocr", "exaone4_5", "minicpmv4_6", "shieldgemma2", "gemma4_unified", "apertus1p5", "nemotron_h_omni",
    "hyperclovax_vision_v2", "qwen2_audio", "voxtral", "granite_speech", "granite_speech_plus", "audioflamingo3",
    "glmasr", "vibevoice_asr",
)  # fmt: skip
"""Outer model types whose ``text_config`` is a decoder of the table above."""

__all__ = ["FAMILIES", "WRAPPERS", "Family", "Mixer", "if_any", "none"]
