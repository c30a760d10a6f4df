"""How one ``model_type`` is read: the row that every family fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kvsim.models import layer_kinds
from kvsim.models.attention import Attention
from kvsim.models.config import Body, ConfigReader, Count, Keys, Shapes, Switch
from kvsim.models.feedforward import (
    Experts,
    Mlp,
)


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
    window_of: Callable[[str, int], int] | None = None  # (key, its number) -> the window, counting the token itself
    chunk: str | None = None
    rewrite: Callable[[ConfigReader], Mapping[str, Any]] | None = None  # the keys as the class spells them today
    passes: Callable[[Body], list[int]] | None = None  # of a loop: the layer behind every cache, in order
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
    head_vocab: Keys | None = None  # key of the head's rows, where they are not the embedding's
    experts: Experts | None = None
    layer_extra: Count | None = None
    outer_extra: Count | None = None
    lookup_extra: Count | None = None


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


def _same_heads(body: Body) -> bool:
    """Whether every layer has the model's number of query heads."""
    return all(heads == body.num_q_heads for heads in body.reader.listed("num_attention_heads_per_layer") or [])


def _plain_mlps(body: Body) -> bool:
    """Whether no MLP has a bias (shared experts have one beside the dense layers')."""
    return not body.reader.switch(MLP_BIAS)
