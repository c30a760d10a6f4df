"""The number of weights, from the config alone.

    embedding + learned positions + sum over layers of (attention + MLP or experts + norms) + last norm + head

Every count is exact for the families of :mod:`kvsim.families` (as ``sum(p.numel() for p in
model.parameters())`` gives it); where it cannot be, the answer is ``None``.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.config import AbsentKeyError, ConfigReader
from kvsim.families import Experts, Family
from kvsim.layout import LayerShape


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


def count_parameters(
    reader: ConfigReader,
    family: Family,
    num_layers: int,
    num_q_heads: int,
    shape: LayerShape,
    hidden: int,
    norms: int,
) -> Weights | None:
    """Weights of the language model, head and embedding counted once where they are tied.

    ``norms`` is the number of norms a layer.  ``None`` where the config lacks a size, or the family's count is
    not known exactly.
    """
    if not family.countable:
        return None
    try:
        layer = _attention(reader, family, num_q_heads, shape, hidden) + norms * family.norm_vectors * hidden
        vocab = reader.count("vocab_size", "vocab_size")
        tied = reader.switch(("tie_word_embeddings", family.tied))
        lookup = reader.count("max_positions", family.positions) * hidden if family.learned_positions else 0
        routed = _routed(reader, family, num_layers, hidden)
        bias = vocab if reader.switch(family.head_bias) else 0
        mlps = _mlps(reader, family, num_layers, hidden) - routed
        experts = family.experts
        return Weights(
            embedding=vocab * hidden,
            head=0 if tied else vocab * hidden,
            dense=num_layers * layer + mlps + family.norm_vectors * hidden + bias,
            routed=routed,
            num_experts=reader.count("num_experts", experts.count) if experts and routed else 0,
            experts_per_token=(reader.count_or_none("experts_per_token", "num_experts_per_tok") or 0) if routed else 0,
            lookup=lookup,
        )
    except AbsentKeyError:
        return None


def _routed(reader: ConfigReader, family: Family, num_layers: int, hidden: int) -> int:
    """Weights of the routed experts alone."""
    experts = family.experts
    sparse = _sparse_layers(reader, experts, num_layers) if experts else 0
    if not experts or not sparse:
        return 0
    inner = reader.count("expert_size", experts.inner)
    return sparse * reader.count("num_experts", experts.count) * 3 * hidden * inner


def _attention(reader: ConfigReader, family: Family, num_q_heads: int, shape: LayerShape, hidden: int) -> int:
    """Projections, their biases, and the norms of queries and keys."""
    query, cached = num_q_heads * shape.key_dim, shape.num_kv_heads * shape.key_dim
    total = hidden * (query + 2 * cached) + query * hidden
    if reader.switch(family.qkv_bias):
        total += query + 2 * cached
    if reader.switch(family.out_bias):
        total += hidden
    if family.qk_norm and reader.switch(family.qk_norm_if):
        total += family.norm_vectors * (2 * shape.key_dim if family.qk_norm == "head" else query + cached)
    return total


def _mlp(hidden: int, inner: int, gated: bool, bias: bool) -> int:
    matrices = 3 if gated else 2
    return matrices * hidden * inner + ((matrices - 1) * inner + hidden if bias else 0)


def _mlps(reader: ConfigReader, family: Family, num_layers: int, hidden: int) -> int:
    """Weights of every layer's MLP or experts."""
    bias, experts = reader.switch(family.mlp_bias), family.experts
    sparse = _sparse_layers(reader, experts, num_layers) if experts else 0
    total = 0
    if sparse < num_layers:
        if family.inner_required or reader.get(family.inner) is not None:
            inner = reader.count("intermediate_size", family.inner)
        else:
            inner = 4 * hidden
        total += (num_layers - sparse) * _mlp(hidden, inner, family.gated, bias)
    if experts and sparse:
        total += sparse * _expert_block(reader, experts, hidden)
    return total


def _sparse_layers(reader: ConfigReader, experts: Experts, num_layers: int) -> int:
    """Layers that have experts."""
    if experts.first_dense:
        return max(0, num_layers - reader.count("first_dense", experts.first_dense, zero=True))
    if not experts.stepped:
        return num_layers
    step = reader.count("step", "decoder_sparse_step") if reader.get("decoder_sparse_step") is not None else 1
    dense = reader.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise reader.error("mlp_only_layers", "allowed are lists of layer numbers")
    return sum(1 for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)


def _expert_block(reader: ConfigReader, experts: Experts, hidden: int) -> int:
    count = reader.count("num_experts", experts.count)
    inner = reader.count("expert_size", experts.inner)
    total = count * 3 * hidden * inner + count * hidden  # experts, router
    if experts.shared_inner:
        total += 3 * hidden * reader.count("shared_size", experts.shared_inner) + hidden  # and its gate
    if experts.shared_count:
        total += 3 * hidden * inner * reader.count("num_shared", experts.shared_count)
    return total
