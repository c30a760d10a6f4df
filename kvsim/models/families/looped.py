"""Loops: models that run some of their layers several times, each pass with a cache of its own; and Inkling's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvsim.models import layer_kinds
from kvsim.models.attention import Attention
from kvsim.models.config import Body, ConfigReader, Keys
from kvsim.models.families.family import ATTENTION_BIAS, LENIENT, MLP_BIAS, Family, _slide
from kvsim.models.feedforward import Experts, Mlp, listed_or
from kvsim.models.recurrent import Convolutions


def _number(reader: ConfigReader, key: str, zero: bool = False) -> int:
    return reader.count(key, key, zero=zero, fill=True)


def _dory(reader: ConfigReader) -> Mapping[str, Any]:
    """Released configs list attention and MLP as blocks of their own: each pair of them is one layer."""
    given = reader.get("layer_types")
    if not isinstance(given, list | tuple) or "mlp" not in given:
        return reader.config
    if any(kind != "mlp" for kind in given[1::2]) or len(given) % 2:
        raise reader.error("layer_types", "allowed are pairs of an attention and 'mlp'")
    out = {**reader.config, "layer_types": list(given[::2])}
    for key in ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers"):
        if reader.config.get(key) is not None:
            number = _number(reader, key, zero=True)
            if number % 2:
                raise reader.error(key, "allowed are even numbers, as attention and MLP count apart here")
            out[key] = number // 2
    return out


def _dory_passes(body: Body) -> list[int]:
    """The layers of the loop, between those of the input and of the output, again for every pass."""
    reader = body.reader
    first, last = (_number(reader, key, zero=True) for key in ("n_input_layers", "n_output_layers"))
    middle = reader.count_or_none("loop", "n_recurrent_layers", zero=True)
    middle = body.num_layers - first - last if middle is None else middle
    if middle < 0 or first + middle + last != body.num_layers:
        raise reader.error("n_recurrent_layers", f"input, loop and output must be the {body.num_layers} layers")
    mode = reader.value("recurrent_kv_cache_mode") or "per_loop"
    if mode not in ("per_loop", "last_loop"):
        raise reader.error("recurrent_kv_cache_mode", "allowed are 'per_loop' and 'last_loop'")
    loops = _number(reader, "n_recurrent_loops") if mode == "per_loop" else 1
    if loops > 64:
        raise reader.error("n_recurrent_loops", "allowed are up to 64")
    if loops > 1 and middle:
        body.note(
            f"{middle} of the {body.num_layers} layers run {loops} times, each pass with keys and values of its own"
        )
    return [*range(body.num_layers), *[*range(first, first + middle)] * (loops - 1)]


def _hrm(reader: ConfigReader) -> Mapping[str, Any]:
    """Two stacks of ``num_layers_per_stack`` layers; ``num_hidden_layers`` counts them too, or all their passes."""
    each = reader.count_or_none("layers", "num_layers_per_stack")
    if each is None:
        each = _number(reader, "num_hidden_layers")
    else:
        reader.used.add("num_hidden_layers")
    return {**reader.config, "num_layers_per_stack": each, "num_hidden_layers": 2 * each}


def _hrm_passes(body: Body) -> list[int]:
    """For every high cycle the low stack ``L_cycles`` times, then the high one."""
    high, low = _number(body.reader, "H_cycles"), _number(body.reader, "L_cycles", zero=True)
    if high * (low + 1) > 256:
        raise body.reader.error("H_cycles", "allowed are up to 256 passes of a stack")
    each = body.num_layers // 2
    stacks = range(each), range(each, 2 * each)
    body.note(
        f"two stacks of {each} layers run {low * high} and {high} times, each pass with keys and values of its own"
    )
    return [layer for _ in range(high) for stack in [*[stacks[0]] * low, stacks[1]] for layer in stack]


@dataclass(frozen=True)
class RelativeAttention(Attention):
    """Inkling's attention: a bias by relative position, mixed from profiles as long as ``extent`` says."""

    extent: Keys = "rel_extent"

    def params(self, body: Body) -> int:
        d_rel, extent = (body.reader.count("rel", key, fill=True) for key in ("d_rel", self.extent))
        return super().params(body) + body.hidden * self.q_heads(body) * d_rel + d_rel * extent


@dataclass(frozen=True)
class GatedAttention(RelativeAttention):
    """Inkling 2's: an output gate, sinks from the input, scales of every head; in full layers the convolutions' weights
    are made from the input, and queries, keys and values are normalized apart."""

    dynamic: bool = False

    def params(self, body: Body) -> int:
        num_kv_heads, dim, _ = self.heads(body)
        heads, hidden = self.q_heads(body), body.hidden
        d_rel = body.reader.count("rel", "d_rel", fill=True)
        total = super().params(body) + hidden * heads * (dim + 1) + heads * (dim + d_rel)
        if self.dynamic:
            kernel = body.reader.count("conv", ("conv_kernel_size", "sconv_kernel_size"), fill=True)
            total += 2 * hidden * num_kv_heads * kernel
        return total + (2 if self.dynamic else 0) * 2 * hidden  # two more norms and two more queries of residuals


class SinkExperts(Experts):
    """Inkling's: the router scores the shared experts too, and scales all of them."""

    def block(self, body: Body) -> tuple[int, int]:
        dense, routed = super().block(body)
        shared = body.reader.count_or_none("num_shared", self.shared_count or (), zero=True, fill=True) or 0
        return dense + shared * body.hidden + 1, routed


def _inkling(reader: ConfigReader) -> Mapping[str, Any]:
    """``local_layer_ids``, ``dense_mlp_idx`` and ``dense_intermediate_size``, as the checkpoints have them."""
    out = dict(reader.config)
    dense = reader.count_or_none("dense_size", "dense_intermediate_size")
    if dense is not None:
        out |= {"moe_intermediate_size": reader.get("intermediate_size"), "intermediate_size": dense}
    first = reader.count_or_none("dense_layers", "dense_mlp_idx", zero=True)
    if first is not None:
        out["first_k_dense_replace"] = first
    return out


def inkling_kinds(body: Body) -> list[str]:
    """Sliding where ``local_layer_ids`` says so, else all but every sixth layer."""
    given = body.reader.indices("local_layer_ids")
    if given is None:
        return layer_kinds.every(6, last="hybrid", rest="hybrid_sliding")(body)
    return ["hybrid_sliding" if layer in given else "hybrid" for layer in range(body.num_layers)]


def _swa(mixer: Attention) -> Attention:
    """The same with the keys of window layers."""
    return replace(
        mixer,
        num_kv_heads=("swa_num_key_value_heads", "num_key_value_heads"),
        head_dim=("swa_head_dim", "head_dim"),
        num_q_heads=("swa_num_attention_heads", "num_attention_heads"),
    )


WINDOW = ("sliding_window_size", "sliding_window")
SWA_CONVOLUTIONS = Convolutions(("swa_num_key_value_heads", "num_key_value_heads"), ("swa_head_dim", "head_dim"))
RELATIVE = RelativeAttention(head_dim_required=True, qk_norm="head")
GATED = GatedAttention(head_dim_required=True)


def _first_layer(body: Body) -> int:
    """What the first layer of Inkling 2 lacks: the queries by which a layer picks among earlier blocks."""
    kinds = body.reader.listed("layer_types")
    return (3 if (kinds[0] == "hybrid" if kinds else False) else 1) * body.hidden


def _inkling2_outer(body: Body) -> int:
    return 2 * body.hidden - _first_layer(body)


def _loop(body: Body) -> tuple[int, int, int]:
    """``(first layer, layer behind the last, passes)`` of Inkling 2's loop."""
    reader = body.reader
    keys = ("loop_layer_index_start", "loop_layer_index_end", "loop_num_passes")
    first, end, passes = (_number(reader, key) for key in keys)
    if not first < end <= body.num_layers:
        raise reader.error("loop_layer_index_end", f"allowed are {first + 1} to {body.num_layers}")
    if passes > 64:
        raise reader.error("loop_num_passes", "allowed are up to 64")
    return first, end, passes


def _inkling2_passes(body: Body) -> list[int]:
    first, end, passes = _loop(body)
    if passes > 1:
        body.note(f"layers {first} to {end - 1} run {passes} times, each pass with keys, values and states of its own")
    return [*range(body.num_layers), *[*range(first, end)] * (passes - 1)]


def _inkling2_loop(reader: ConfigReader) -> Mapping[str, Any]:
    """``loop_config``, as the checkpoints have it."""
    nested = reader.child("loop_config")
    if nested is None:
        return reader.config
    names = {
        "core_start": "loop_layer_index_start",
        "core_end": "loop_layer_index_end",
        "num_passes": "loop_num_passes",
    }
    names["gate_rank"] = "loop_gate_rank"
    return {**reader.config, **{name: nested.config[key] for key, name in names.items() if key in nested.config}}


def _inkling2_gates(body: Body) -> int:
    """The gates of the messages between passes, of the loop's layers alone, and the queries that pick them."""
    first, end, _ = _loop(body)
    rank = _number(body.reader, "loop_gate_rank")
    return _inkling2_outer(body) + (end - first) * (16 * rank + 4) * body.hidden


_INKLING = Family(
    positions=("max_position_embeddings", "model_max_length"),
    mixers={
        "hybrid": (RELATIVE, Convolutions()),
        "hybrid_sliding": (_swa(replace(RELATIVE, extent=WINDOW)), SWA_CONVOLUTIONS),
    },
    window=WINDOW,
    kinds=inkling_kinds,
    listed="layer_types",
    rewrite=_inkling,
    experts=SinkExperts(
        ("n_routed_experts", "num_local_experts"),
        "moe_intermediate_size",
        shared_count="n_shared_experts",
        sparse=listed_or(0),
    ),
    mlp=Mlp(extra=lambda hidden, inner: 1),
    outer_extra=lambda body: body.hidden,
    inert=("sliding_window_size", "conv_kernel_size", "sconv_kernel_size", "number_of_conv_states", "dense_mlp_idx",
           "dense_intermediate_size", "local_layer_ids", "mtp_local_layer_ids", "route_scale",
           "n_layers_per_attn_res_block", "rms_norm_eps_moe_gate", "shared_expert_sink", "rel_extent",
           "unpadded_vocab_size"),
)  # fmt: skip
_INKLING2 = replace(
    _INKLING,
    mixers={
        "hybrid": (replace(GATED, dynamic=True), Convolutions()),
        "hybrid_sliding": (_swa(replace(GATED, extent=WINDOW)), SWA_CONVOLUTIONS),
    },
    kinds=layer_kinds.every(6, last="hybrid", rest="hybrid_sliding"),
    rewrite=None,
    mlp=None,
    experts=Experts(("n_routed_experts", "num_local_experts"), ("moe_intermediate_size", "intermediate_size")),
    head_vocab="unpadded_vocab_size",
    layer_extra=lambda body: 2 * body.hidden,
    outer_extra=_inkling2_outer,
)


LOOPED: dict[str, Family] = {
    "dory": Family(
        mixers=_slide(
            replace(
                LENIENT,
                qkv_bias=ATTENTION_BIAS,
                extra=lambda hidden, heads, kv, dim: (hidden + 2) * heads * dim,
            )
        ),
        window="sliding_window",
        kinds=layer_kinds.every(4),
        listed="layer_types",
        rewrite=_dory,
        passes=_dory_passes,
        norms=0,
        final_norm=False,
        mlp=Mlp(bias=MLP_BIAS, extra=lambda hidden, inner: 2 * inner),
        layer_extra=lambda body: 2 * body.hidden,
        outer_extra=lambda body: body.reader.count("vocab_size", "vocab_size"),
        inert=("n_recurrent_layers", "n_recurrent_loops", "recurrent_kv_cache_mode"),
    ),
    "hrm_text": Family(
        mixers={
            "full": (
                Attention(
                    None,
                    qkv_bias=ATTENTION_BIAS,
                    out_bias=ATTENTION_BIAS,
                    extra=lambda hidden, heads, kv, dim: hidden * heads * dim,
                ),
            )
        },
        rewrite=_hrm,
        passes=_hrm_passes,
        norms=0,
        final_norm=False,
        mlp=Mlp(bias=MLP_BIAS),
        outer_extra=lambda body: body.hidden,
        count_if=lambda body: not body.reader.switch(ATTENTION_BIAS),
        inert=("H_cycles", "L_cycles", "L_bp_cycles", "num_layers_per_stack", "prefix_lm"),
    ),
    "inkling_text": _INKLING,
    "inkling2_text": _INKLING2,
    "inkling2_loop_text": replace(
        _INKLING2,
        rewrite=_inkling2_loop,
        passes=_inkling2_passes,
        outer_extra=_inkling2_gates,
        inert=(*_INKLING.inert, "loop_config", "loop_gate_rank"),
    ),
}
