"""The number of weights, from the config alone.

    embedding + learned positions + sum over layers of (mixer + MLP or experts + norms) + last norm + head

Every count is exact for the families of :mod:`kvsim.models.families` (as ``sum(p.numel() for p in
model.parameters())`` gives it); where it cannot be, the answer is ``None``.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.models.attention import Attention, CompressedAttention, Latent
from kvsim.models.config import AbsentKeyError, Body
from kvsim.models.families.family import Family
from kvsim.models.quantization import Module
from kvsim.models.recurrent import Kda


@dataclass(frozen=True)
class Weights:
    """Parameter counts by how a decode step reads them.

    ``embedding``: the input table, of which a step reads a row a token; ``head``: an output projection of its own
    (0 where tied: then the embedding is read as the head); ``dense``: read at every step (attention, norms, dense
    MLPs, routers, shared experts); ``routed``: the routed experts of all layers, ``experts_per_token`` of
    ``num_experts`` of which a token uses; ``lookup``: further tables of which a step reads rows (positions,
    per-layer embeddings).
    """

    embedding: int
    head: int
    dense: int
    routed: int
    num_experts: int = 0
    experts_per_token: int = 0
    lookup: int = 0

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.dense + self.routed + self.lookup

    def read(self, num_tokens: int) -> float:
        """Expected parameters that one step over ``num_tokens`` tokens reads; routing is taken as uniform."""
        share = 1.0
        if self.num_experts:
            share -= (1 - min(1.0, self.experts_per_token / self.num_experts)) ** num_tokens
        return (self.head or self.embedding) + self.dense + self.routed * share

    @property
    def active(self) -> float:
        """Parameters that one token multiplies with."""
        return self.read(1)


def count_weights(body: Body, family: Family, plan: list[tuple[str, bool]]) -> Weights | None:
    """Weights of the language model by how a step reads them.

    ``plan``: every layer's mixer (a key of the family's, or ``none``) and whether it has experts.  ``None`` where
    the config lacks a size, or the family's count is not known exactly.
    """
    if not family.countable or (family.count_if is not None and not family.count_if(body)):
        return None
    try:
        return _weights(body, family, plan)
    except AbsentKeyError:
        return None


def more_norms(body: Body, family: Family, plan: list[tuple[str, bool]]) -> int:
    """Norms beyond two a layer: around the mixer's and the MLP's results, and of queries and keys."""
    out = max(0, family.norms - 2) * len(plan)
    for kind, _ in plan:
        for mixer in family.mixers.get(mixer_kind(family, kind), ()):
            if isinstance(mixer, Attention) and mixer.qk_norm:
                out += 2 * bool(body.reader.switch(mixer.qk_norm_if))
    return out


def _weights(body: Body, family: Family, plan: list[tuple[str, bool]]) -> Weights:
    reader, hidden = body.reader, body.hidden
    mixing = {kind: _mixer_params(body, family, kind) for kind in {kind for kind, _ in plan}}
    dense = sum(mixing[kind] for kind, _ in plan)
    shared = reader.count_or_none("num_shared", family.sharing, zero=True, fill=True) if family.sharing else None
    for kind, _ in plan[len(plan) - (shared or 0) :]:
        for mixer in family.mixers[mixer_kind(family, kind)]:
            dense -= mixer.borrowed(body) if isinstance(mixer, Attention) else 0
    routed = 0
    some_sparse, some_dense = any(sparse for _, sparse in plan), any(not sparse for _, sparse in plan)
    router, block = family.experts.block(body) if family.experts and some_sparse else (0, 0)
    plain = [0] * len(plan)
    if family.mlp and (some_dense or (family.experts and family.experts.dense_too)):
        widths = family.mlp.widths(body)
        size = {width: family.mlps * family.mlp.params(body, width) for width in set(widths)}
        plain = [size[width] for width in widths]
    for (kind, sparse), mlp in zip(plan, plain, strict=True):
        if family.single and kind not in ("dense", "sparse"):
            continue
        if sparse:
            dense, routed = dense + router, routed + block
        if not sparse or (family.experts and family.experts.dense_too):
            dense += mlp
    each = family.norms * body.norm_vectors * hidden + (family.layer_extra(body) if family.layer_extra else 0)
    dense += len(plan) * each + (body.norm_vectors * hidden if family.final_norm else 0)
    dense += family.outer_extra(body) if family.outer_extra else 0
    vocab = reader.count("vocab_size", family.vocab)
    dense += vocab if reader.switch(family.head_bias) else 0
    lookup = family.lookup_extra(body) if family.lookup_extra else 0
    if family.learned_positions is not None:
        lookup += (reader.count("max_positions", family.positions) + family.learned_positions) * hidden
    per_token = None
    if family.experts:
        per_token = reader.count_or_none("experts_per_token", family.experts.per_token, zero=not routed)
    tied = reader.switch(("tie_word_embeddings", False)) if reader.has("tie_word_embeddings") else family.tied
    head = reader.count_or_none("head_vocab", family.head_vocab) if family.head_vocab else None
    head = vocab if head is None else head
    return Weights(
        embedding=vocab * hidden,
        head=0 if tied else head * hidden,
        dense=dense,
        routed=routed,
        num_experts=family.experts.num_experts(body) if family.experts and routed else 0,
        experts_per_token=(per_token or 0) if routed else 0,
        lookup=lookup,
    )


LAYERS = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.")
MIXER = {True: ("self_attn.", "attn.", "attention."), False: ("linear_attn.", "mixer.", "mamba.", "conv.")}
ATTENDING = (Attention, Latent, CompressedAttention, Kda)
"""Mixers that lie under the first of them; Kimi's delta attention does too."""
FUSED = {
    **{name: (f"{name}_proj", "qkv_proj", "query_key_value", "c_attn") for name in "qkv"},
    "o": ("o_proj", "out_proj"),
}
"""A projection under the names of families that fuse them."""
MLP: dict[str, tuple[str, ...]] = {
    "gate": ("mlp.gate_proj", "feed_forward.w1", "feed_forward.gate_proj"),
    "up": ("mlp.up_proj", "feed_forward.w3", "feed_forward.up_proj", "mlp.fc1", "mlp.c_fc"),
    "down": ("mlp.down_proj", "feed_forward.w2", "feed_forward.down_proj", "mlp.fc2", "mlp.c_proj"),
}
EXPERT: dict[str, tuple[str, ...]] = {
    "gate": ("mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1", "feed_forward.experts.gate_proj"),
    "up": ("mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w3", "feed_forward.experts.up_proj"),
    "down": ("mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w2", "feed_forward.experts.down_proj"),
}
SHARED = ("mlp.shared_experts.up_proj", "mlp.shared_expert.up_proj", "feed_forward.shared_expert.up_proj")
ROUTER = ("mlp.gate", "block_sparse_moe.gate", "feed_forward.router", "mlp.router")
"""How families spell a layer's matrices."""


def weight_modules(body: Body, family: Family, plan: list[tuple[str, bool]]) -> list[Module]:
    """The matrices of all layers, by the names that a quantization knows them by; empty where they cannot be counted.

    ``plan`` as in :func:`count_weights`.  A mixer's matrices share its weights as those of attention do.
    """
    if not family.countable or (family.count_if is not None and not family.count_if(body)):
        return []
    try:
        return _modules(body, family, plan)
    except AbsentKeyError:
        return []


def _modules(body: Body, family: Family, plan: list[tuple[str, bool]]) -> list[Module]:
    mixing = {kind: _mixer_params(body, family, kind) for kind in {kind for kind, _ in plan}}
    some_sparse, some_dense = any(sparse for _, sparse in plan), any(not sparse for _, sparse in plan)
    router, block = family.experts.block(body) if family.experts and some_sparse else (0, 0)
    shared = bool(family.experts and (family.experts.shared_inner or family.experts.shared_count))
    plain = [0] * len(plan)
    if family.mlp and (some_dense or (family.experts and family.experts.dense_too)):
        widths = family.mlp.widths(body)
        size = {width: family.mlps * family.mlp.params(body, width) for width in set(widths)}
        plain = [size[width] for width in widths]
    out: list[Module] = []

    def add(at: int, names: tuple[str, ...], count: float) -> None:
        if count:
            out.append((tuple(f"{layers}{at}.{name}" for layers in LAYERS for name in names), count))

    for at, ((kind, sparse), mlp) in enumerate(zip(plan, plain, strict=True)):
        attends = any(isinstance(mixer, ATTENDING) for mixer in family.mixers.get(mixer_kind(family, kind), ()))
        for name, share in _mixer_shares(body, family, kind):
            parts = FUSED.get(name, (name,))
            add(at, tuple(mixer + part for mixer in MIXER[attends] for part in parts), share * mixing[kind])
        if family.single and kind not in ("dense", "sparse"):
            continue
        if sparse:
            add(at, SHARED if shared else ROUTER, router)
            for names in EXPERT.values():
                add(at, names, block / len(EXPERT))
        if not sparse or (family.experts and family.experts.dense_too):
            for names in MLP.values():
                add(at, names, mlp / len(MLP))
    return out


def _mixer_shares(body: Body, family: Family, kind: str) -> list[tuple[str, float]]:
    """The projections of a mixer and their shares of its weights."""
    for mixer in family.mixers.get(mixer_kind(family, kind), ()):
        if isinstance(mixer, Attention):
            num_kv_heads, key_dim, value_dim = mixer.heads(body)
            query, heads = mixer.q_width * body.num_q_heads * key_dim, body.num_q_heads
            each = {"q": query, "k": num_kv_heads * key_dim, "v": num_kv_heads * value_dim, "o": heads * value_dim}
            return [(name, width / sum(each.values())) for name, width in each.items()]
        if isinstance(mixer, Latent):
            latent = mixer.matrices(body)
            return [(name, width / sum(latent.values())) for name, width in latent.items()]
    return [(name, 0.25) for name in "qkvo"]


def _mixer_params(body: Body, family: Family, kind: str) -> int:
    return sum(mixer.params(body) for mixer in family.mixers.get(mixer_kind(family, kind), ()))


def mixer_kind(family: Family, kind: str) -> str:
    """The key of the family's mixers that makes a layer of ``kind``: windows and chunks are the full layer's."""
    return kind if kind in family.mixers else "full" if kind in ("sliding", "chunked") else kind
