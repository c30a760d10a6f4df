"""What fits beside the weights: the largest batch at a context, the largest context at a batch.

Both are exact inverses of what an engine takes (:meth:`kvsim.memory.sharding.Deployment.rank_nbytes`), found by a
first guess in proportion and a bracket (a cache never shrinks as it grows longer or wider), three evaluations where
bytes are proportional, some twenty where they grow by blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvsim.hardware import Hardware
from kvsim.layout import Method
from kvsim.memory.sharding import SINGLE, Deployment, Sharding, pipeline_layers
from kvsim.models.model import QUANTIZATION_KEYS, Model

RESERVE = 0.10
"""Share of the memory held back for activations, workspaces and the allocator (vLLM holds back as much)."""

DEFAULT_WEIGHT_BITS = 16
HEAD_BITS = 16
EXPERTS_ONLY = ("gpt_oss",)
"""Families whose checkpoints quantize the routed experts alone (``modules_to_not_convert``)."""
SEARCH_LIMIT = 1 << 50


@dataclass(frozen=True)
class Room:
    """The memory of one card (of the fullest, where several share the model), divided: bytes.

    ``overhead``: what the engine holds beside weights and cache, by name: estimates, within ``overhead_band`` (low and
    high over them).
    """

    hardware: Hardware
    memory_nbytes: int
    reserve_nbytes: int
    weight_nbytes: int
    weight_bits: float
    notes: tuple[str, ...]
    overhead: Mapping[str, int] = field(default_factory=dict)
    overhead_band: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def cache_band(self) -> tuple[int, int]:
        """The least and the most that is left for the cache, the overheads at the ends of their bands."""
        bands = [(size, self.overhead_band.get(name, (1.0, 1.0))) for name, size in self.overhead.items()]
        least = sum(int(size * (high - 1)) for size, (_, high) in bands)
        most = sum(int(size * (1 - low)) for size, (low, _) in bands)
        return self.cache_nbytes - least, self.cache_nbytes + most

    @property
    def cache_nbytes(self) -> int:
        """What is left for the cache; below zero where the weights alone do not fit."""
        return self.memory_nbytes - self.reserve_nbytes - self.weight_nbytes - sum(self.overhead.values())


def held_share(engine: object, reserve: float | None = None, utilization: float | None = None) -> float:
    """The share of a card's memory that is held back: ``reserve``, 1 less the ``utilization`` that is asked for, or
    else what ``engine`` does by default, which without such a flag is :data:`RESERVE`.

    To 12 digits, so that ``1 - 0.9`` is ``0.1``.  Raises ``ValueError`` where both are given or one is out of range.
    """
    if reserve is not None and utilization is not None:
        raise ValueError("give --reserve or --gpu-memory-utilization, not both")
    used = getattr(engine, "gpu_memory_utilization", None) if utilization is None else utilization
    if reserve is not None or used is None:
        return RESERVE if reserve is None else reserve
    if not 0 < used <= 1:
        raise ValueError(f"gpu-memory-utilization {used:g}: allowed are above 0 to 1")
    return round(1 - used, 12)


def room(
    model: Model,
    hardware: Hardware,
    weight_bits: float | None = None,
    reserve: float = RESERVE,
    *,
    quantized: bool = False,
    overhead: Mapping[str, int] | None = None,
    overhead_band: Mapping[str, tuple[float, float]] | None = None,
    sharding: Sharding = SINGLE,
) -> Room:
    """The memory that ``model`` leaves on one card.

    ``weight_bits``: bits a parameter (``None``: as the config says, else 16).  ``reserve``: share of the memory
    held back, from 0 to below 1.  ``quantized``: ``weight_bits`` are those of the layers, embedding and head keep
    16.  ``overhead``, ``overhead_band``: bytes of the engine by name, low and high over them.  ``sharding``: the
    fullest rank's share of the weights.
    Raises ``ValueError`` where the memory or the number of weights is not known.
    """
    if hardware.memory_nbytes is None:
        raise ValueError(f"GPU {hardware.id}: its memory is not known")
    if model.num_params is None:
        raise ValueError(f"model {model.name}: its number of parameters cannot be read from the config")
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve {reserve:g}: allowed are 0 to below 1")
    notes: list[str] = []
    if weight_bits is None:
        weight_bits = model.weight_bits
        source = model.source("weight_bits")
        if source in QUANTIZATION_KEYS:  # bits of the layers; what tensors say is a mean over embedding and head too
            if weight_bits is None:
                raise ValueError(f"model {model.name}: its {source} is not known here, give --weight-bits")
            quantized = True
            notes.append(f"quantized weights counted at {weight_bits:g} bits each ({source})")
        elif weight_bits is None:
            weight_bits = DEFAULT_WEIGHT_BITS
            notes.append(f"the config gives no dtype: weights counted at {weight_bits:g} bits each")
    elif not 0 < weight_bits <= 64:
        raise ValueError(f"weight-bits {weight_bits:g}: allowed are above 0 to 64")
    if quantized and weight_bits < HEAD_BITS:
        what = "experts" if model.model_type in EXPERTS_ONLY else "layers"
        notes.append(f"{what} at {weight_bits:g} bits a weight, the others at {HEAD_BITS}")
    reserve_nbytes = int(hardware.memory_nbytes * reserve)
    weight_nbytes = _rank_weights(model, weight_bits, quantized, sharding)
    if reserve_nbytes + weight_nbytes >= hardware.memory_nbytes:
        notes.append(f"the weights leave no room for a cache on one {hardware.id}")
    return Room(
        hardware=hardware,
        memory_nbytes=hardware.memory_nbytes,
        reserve_nbytes=reserve_nbytes,
        weight_nbytes=weight_nbytes,
        weight_bits=weight_bits,
        notes=tuple(notes),
        overhead=dict(overhead or {}),
        overhead_band=dict(overhead_band or {}),
    )


def _rank_weights(model: Model, bits: float, quantized: bool, sharding: Sharding) -> int:
    """Weights of the fullest rank: its stage's layers, and the embedding or head of the first or last stage."""
    weights = model.weights
    assert weights is not None
    wide = max(bits, HEAD_BITS) if quantized else bits
    dense = wide if quantized and model.model_type in EXPERTS_ONLY else bits
    if sharding == SINGLE:
        tables = weights.embedding + weights.head + weights.lookup
        return int((weights.dense * dense + weights.routed * bits + tables * wide) / 8)
    counts = pipeline_layers(len(model.layers), sharding.pipeline_parallel_size)
    heaviest = 0.0
    for stage, count in enumerate(counts):
        size = (weights.dense * dense + weights.routed * bits) * count / len(model.layers)
        if stage == 0:
            size += (weights.embedding + weights.lookup) * wide
        if stage == len(counts) - 1 and (weights.head or len(counts) > 1):
            size += (weights.head or weights.embedding) * wide
        heaviest = max(heaviest, size)
    return int(heaviest / 8 / sharding.tensor_parallel_size)


def max_batch(model: Model, method: Method, num_tokens: int, available: int) -> int | None:
    """The most sequences of ``num_tokens`` tokens within ``available`` bytes; ``None``: no limit found."""
    return largest_batch(Deployment(model, method), num_tokens, available)


def max_context(model: Model, method: Method, batch_size: int, available: int) -> int | None:
    """The most tokens a sequence, ``batch_size`` of them, within ``available`` bytes; ``None``: no limit found."""
    return largest_context(Deployment(model, method), batch_size, available)


def largest_batch(deployment: Deployment, num_tokens: int, available: int) -> int | None:
    """The most sequences of ``num_tokens`` tokens of which every rank's share fits ``available`` bytes."""
    return _largest(lambda batch_size: deployment.rank_nbytes(batch_size, num_tokens), available)


def largest_context(deployment: Deployment, batch_size: int, available: int) -> int | None:
    """The most tokens a sequence, ``batch_size`` of them, of which every rank's share fits ``available`` bytes.

    With a shared prefix no fewer than its tokens; 0 where not even those fit.  An engine that allocates for
    ``max_seq_len`` tokens at once has all of them or none.
    """
    least = max(1, deployment.shared_prefix)
    if deployment.rank_nbytes(batch_size, least) > available:
        return 0
    most = getattr(deployment.engine, "max_seq_len", 0)
    if most:
        return most * deployment.sharding.context_ranks
    found = _largest(lambda more: deployment.rank_nbytes(batch_size, least + more), available)
    return None if found is None else least + found


def _largest(weigh: Callable[[int], int], available: int) -> int | None:
    """The largest n >= 0 with ``weigh(n) <= available``, ``weigh`` never falling; n = 0 needs nothing.

    ``None`` where :data:`SEARCH_LIMIT` fits.  The line through the last two points says where to look next, since
    bytes grow in proportion to the batch, and nearly so to the context; where a look leaves more than half of the
    bracket (blocks and records are steps) the next is at the middle.
    """
    low, light, high, heavy = 0, 0, 1, weigh(1)
    stretch = 1
    while heavy <= available:
        if high == SEARCH_LIMIT:
            return None
        width, grown = high - low, heavy - light
        low, light = high, heavy
        further = (available - light) * width // grown * stretch + 1 if grown else SEARCH_LIMIT
        high = min(low + further, SEARCH_LIMIT)
        heavy, stretch = weigh(high), 2 * stretch
    halve = False
    while high - low > 1:
        width = high - low
        middle = low + (width // 2 if halve else (available - light) * width // (heavy - light))
        middle = min(max(middle, low + 1), high - 1)
        size = weigh(middle)
        if size <= available:
            low, light = middle, size
        else:
            high, heavy = middle, size
        halve = not halve and 2 * (high - low) > width
    return low
