"""Feed-forward layers: plain MLPs and mixtures of experts, counted by what a decode step reads of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvsim.models.config import LARGEST, Body, Keys, Switch

Sparse = Callable[[Body], list[bool]]
"""Which layers have experts."""


@dataclass(frozen=True)
class Mlp:
    """Two or three matrices.  The defaults are Llama's."""

    inner: Keys = "intermediate_size"
    required: bool = True  # False: an absent key means 4 x hidden size
    gated: Switch = True
    bias: Switch = False
    half: bool = False  # the key counts both halves of the gated width
    extra: Callable[[int, int], int] | None = None  # (hidden, inner) -> further parameters

    def width(self, body: Body) -> int:
        reader = body.reader
        if not self.required and (not self.inner or reader.value(reader.first(self.inner)) is None):
            return 4 * body.hidden
        return reader.count("intermediate_size", self.inner) // (2 if self.half else 1)

    def widths(self, body: Body) -> list[int]:
        """Every layer's width: one number, or a list of one a layer (Gemma 3n)."""
        key = body.reader.first(self.inner) if self.inner else ""
        given = body.reader.get(key)
        if not isinstance(given, list):
            return [self.width(body)] * body.num_layers
        if len(given) != body.num_layers:
            raise body.reader.error(key, f"{len(given)} entries for {body.num_layers} layers")
        if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST for size in given):
            raise body.reader.error(key, f"allowed are whole numbers from 1 to {LARGEST:,}")
        return given

    def params(self, body: Body, inner: int) -> int:
        """Weights of one MLP of the width ``inner``."""
        matrices = 3 if body.reader.switch(self.gated) else 2
        total = matrices * body.hidden * inner
        if body.reader.switch(self.bias):
            total += (matrices - 1) * inner + body.hidden
        return total + (self.extra(body.hidden, inner) if self.extra else 0)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: the keys of its sizes, and which layers have it (``None``: all)."""

    count: Keys = "num_local_experts"
    inner: Keys = "intermediate_size"
    per_token: Keys = ("num_experts_per_tok", "num_experts_per_token")
    sparse: Sparse | None = None
    shared_inner: Keys | None = None  # key: width of the shared expert
    shared_gate: bool = False  # the shared expert has a gate of its own
    shared_count: Keys | None = None  # key: number of shared experts as wide as a routed one
    gated: bool = True
    router_vectors: int = 0  # vectors of one number an expert beside the router's matrix
    bias: bool = False  # expert biases (and the router's)
    dense_too: bool = False  # the plain MLP stands beside the experts
    zero_count: str | None = None  # key: experts that do nothing, which the router knows
    extra: Callable[[int, int], int] | None = None  # (hidden, experts) -> further parameters
    latent: str | None = None  # key: width that the routed experts work in, between two projections
    latent_norm: Switch = False  # a norm of that width before the second

    def num_experts(self, body: Body) -> int:
        return body.reader.count_or_none("num_experts", self.count) or 0

    def block(self, body: Body) -> tuple[int, int]:
        """``(dense, routed)`` weights of one layer: router and shared experts, and the routed experts."""
        reader, hidden = body.reader, body.hidden
        count = reader.count("num_experts", self.count)
        inner = reader.count("expert_size", self.inner)
        matrices = 3 if self.gated else 2
        latent = reader.count_or_none("expert_latent", self.latent) if self.latent else None
        routed = count * matrices * (latent or hidden) * inner
        choices = count + (reader.count("zero_experts", self.zero_count, zero=True) if self.zero_count else 0)
        dense = choices * (hidden + self.router_vectors) + 2 * hidden * (latent or 0)
        if latent and reader.switch(self.latent_norm):
            dense += latent
        if self.bias:
            routed += count * ((matrices - 1) * inner + hidden)
            dense += count
        if self.shared_inner:
            width = reader.count_or_none("shared_size", self.shared_inner, zero=True, fill=True) or 0
            dense += matrices * hidden * width + (hidden if self.shared_gate else 0)
        if self.shared_count:
            shared = reader.count_or_none("num_shared", self.shared_count, zero=True, fill=True) or 0
            dense += matrices * hidden * inner * shared
        return dense + (self.extra(hidden, count) if self.extra else 0), routed


def stepped_but(*dense_layers: int) -> Sparse:
    """Every ``decoder_sparse_step``-th layer, but for ``mlp_only_layers`` (absent: ``dense_layers``)."""

    def sparse(body: Body) -> list[bool]:
        reader = body.reader
        step = reader.count("step", "decoder_sparse_step") if reader.get("decoder_sparse_step") is not None else 1
        dense = reader.indices("mlp_only_layers")
        dense = set(dense_layers) if dense is None else dense
        return [layer not in dense and (layer + 1) % step == 0 for layer in range(body.num_layers)]

    return sparse


stepped = stepped_but()
"""Qwen's, where no layer is dense unless the config says so."""


def after(key: str, default: int | None = None) -> Sparse:
    """DeepSeek's: all layers but the first ``key``; ``mlp_layer_types`` says it layer by layer where given."""

    def sparse(body: Body) -> list[bool]:
        reader = body.reader
        each = reader.listed("mlp_layer_types")
        if each is not None:
            if not set(map(str, each)) <= {"dense", "sparse", "moe", "hash_moe"}:
                raise reader.error("mlp_layer_types", "allowed are 'dense' and 'sparse'")
            if len(each) < body.num_layers:
                raise reader.error("mlp_layer_types", f"{len(each)} entries for {body.num_layers} layers")
            return [kind != "dense" for kind in each[: body.num_layers]]
        every = reader.get("moe_layer_freq")
        if isinstance(every, list):
            if len(every) != body.num_layers or not set(map(str, every)) <= {"0", "1"}:
                raise reader.error("moe_layer_freq", f"allowed are {body.num_layers} entries of 0 and 1")
            return [bool(entry) for entry in every]
        if every not in (None, 1):
            raise reader.error("moe_layer_freq", "allowed is 1")
        first = reader.count_or_none("first_dense", key, zero=True)
        if first is None:
            first = default if default is not None else reader.count("first_dense", key, zero=True)
        return [layer >= first for layer in range(body.num_layers)]

    return sparse


def listed_or(first_dense: int) -> Sparse:
    """``mlp_layer_types``, else all layers but the first ``first_dense``."""
    return after("first_k_dense_replace", first_dense)


def interleaved(body: Body) -> list[bool]:
    """Llama 4's: ``moe_layers``, else every ``interleave_moe_layer_step``-th."""
    given = body.reader.indices("moe_layers")
    if given is not None:
        return [layer in given for layer in range(body.num_layers)]
    step = body.reader.count("moe_step", "interleave_moe_layer_step", fill=True)
    return [(layer + 1) % step == 0 for layer in range(body.num_layers)]


def periodic(body: Body) -> list[bool]:
    """Jamba's: every ``expert_layer_period``-th layer from ``expert_layer_offset``, where there is a choice."""
    reader = body.reader
    period = reader.count("expert_period", "expert_layer_period", fill=True)
    offset = reader.count("expert_offset", "expert_layer_offset", zero=True, fill=True)
    several = reader.count("num_experts", "num_experts", fill=True) > 1
    return [several and layer % period == offset for layer in range(body.num_layers)]


def ranged(body: Body) -> list[bool]:
    """ERNIE's: every ``moe_layer_interval``-th from ``moe_layer_start_index`` to ``moe_layer_end_index``."""
    reader = body.reader
    first = reader.count("moe_first", "moe_layer_start_index", zero=True, fill=True)
    every = reader.count("moe_every", "moe_layer_interval", fill=True)
    end = reader.value("moe_layer_end_index")
    end = body.num_layers - 1 if end in (None, -1) else reader.count("moe_last", "moe_layer_end_index", zero=True)
    return [(layer + 1) % every == 0 and first <= layer <= end for layer in range(body.num_layers)]


def none(body: Body) -> list[bool]:
    return [False] * body.num_layers


def if_enabled(key: str) -> Sparse:
    """Every layer where the switch ``key`` is on, else none."""
    return lambda body: [body.reader.switch((key, False))] * body.num_layers


def if_any(keys: Keys) -> Sparse:
    """Every layer where there are experts at all."""
    return lambda body: [bool(body.reader.count_or_none("num_experts", keys, zero=True, fill=True))] * body.num_layers
