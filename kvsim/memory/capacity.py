"""What fits beside the weights: the largest batch at a context, the largest context at a batch.

Both are exact inverses of what an engine takes (:meth:`kvsim.memory.sharding.Deployment.rank_nbytes`), found by a
first guess in proportion and a bracket (a cache never shrinks as it grows longer or wider), three evaluations where
bytes are proportional, some twenty where they grow by blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvsim.engines import Engine
from kvsim.hardware import Hardware
from kvsim.layout import Method
from kvsim.memory.sharding import SINGLE, Deployment, Sharding, pipeline_layers
from kvsim.models.model import QUANTIZATION_KEYS, Model
from kvsim.models.weight_storage import (
    DEFAULT_BITS,
    EXPERTS_ONLY,
    HEAD_BITS,
    WeightBits,
    check_weight_bits,
    weight_storage,
)
from kvsim.search import largest

RESERVE = 0.10
"""Share of the memory held back for activations, workspaces and the allocator (vLLM holds back as much)."""

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


def held_share(engine: Engine | None, reserve: float | None = None, utilization: float | None = None) -> float:
    """The share of a card's memory that is held back: ``reserve``, 1 less the ``utilization`` that is asked for, or
    else what ``engine`` does by default, which without such a flag is :data:`RESERVE`.

    To 12 digits, so that ``1 - 0.9`` is ``0.1``.  Raises ``ValueError`` where both are given or one is out of range.
    """
    if reserve is not None and utilization is not None:
        raise ValueError("give --reserve or --gpu-memory-utilization, not both")
    used = utilization if utilization is not None or engine is None else engine.gpu_memory_utilization
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
    kept_free: float = 0.0,
) -> Room:
    """The memory that ``model`` leaves on one card.

    ``weight_bits``: bits a parameter (``None``: as the config says, else 16).  ``reserve``: share of the memory
    held back, from 0 to below 1.  ``quantized``: ``weight_bits`` are those of the layers, embedding and head keep
    16.  ``overhead``, ``overhead_band``: bytes of the engine by name, low and high over them.  ``sharding``: the
    fullest rank's share of the weights.  ``kept_free``: the share that the engine leaves of what is left.
    Raises ``ValueError`` where the memory or the number of weights is not known.
    """
    if hardware.memory_nbytes is None:
        raise ValueError(f"GPU {hardware.id}: its memory is not known")
    if model.num_params is None:
        raise ValueError(f"model {model.name}: its number of parameters cannot be read from the config")
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve {reserve:g}: allowed are 0 to below 1")
    check_weight_bits(weight_bits)
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
            weight_bits = DEFAULT_BITS
            notes.append(f"the config gives no dtype: weights counted at {weight_bits:g} bits each")
    if quantized and weight_bits < HEAD_BITS:
        what = "experts" if model.model_type in EXPERTS_ONLY else "layers"
        notes.append(f"{what} at {weight_bits:g} bits a weight, the others at {HEAD_BITS:g}")
    reserve_nbytes = int(hardware.memory_nbytes * reserve)
    weight_nbytes = _rank_weights(model, weight_storage(model, weight_bits, quantized), sharding)
    if reserve_nbytes + weight_nbytes >= hardware.memory_nbytes:
        notes.append(f"the weights leave no room for a cache on one {hardware.id}")
    overhead = dict(overhead or {})
    if kept_free:
        left = hardware.memory_nbytes - reserve_nbytes - weight_nbytes - sum(overhead.values())
        overhead["kept_free"] = max(0, int(kept_free * left))
    return Room(
        hardware=hardware,
        memory_nbytes=hardware.memory_nbytes,
        reserve_nbytes=reserve_nbytes,
        weight_nbytes=weight_nbytes,
        weight_bits=weight_bits,
        notes=tuple(notes),
        overhead=overhead,
        overhead_band=dict(overhead_band or {}),
    )


def _rank_weights(model: Model, bits: WeightBits, sharding: Sharding) -> int:
    """Weights of the fullest rank: its stage's layers, and the embedding or head of the first or last stage.

    Routed experts are shared by the ranks of all replicas.  Raises ``ValueError`` for fewer experts than ranks that
    are to hold whole ones.
    """
    weights = model.weights
    assert weights is not None
    if sharding == SINGLE:
        return int(bits.nbytes(weights))
    counts = pipeline_layers(len(model.layers), sharding.pipeline_parallel_size)
    ranks = sharding.tensor_parallel_size
    heaviest = 0.0
    for stage, count in enumerate(counts):
        size = weights.dense * bits.dense / 8 * count / len(model.layers) / ranks
        size += weights.routed * bits.routed / 8 * count / len(model.layers) * expert_share(model, sharding)
        if stage == 0:
            size += (weights.embedding + weights.lookup) * bits.head / 8 / ranks
        if stage == len(counts) - 1 and (weights.head or len(counts) > 1):
            size += (weights.head or weights.embedding) * bits.head / 8 / ranks
        heaviest = max(heaviest, size)
    return int(heaviest)


def expert_share(model: Model, sharding: Sharding) -> float:
    """The share of a stage's routed experts that the fullest rank holds.

    Raises ``ValueError`` for fewer experts than ranks that are to hold whole ones.
    """
    ranks, experts = sharding.expert_ranks, model.weights.num_experts if model.weights is not None else 0
    if not sharding.enable_expert_parallel:
        return 1 / ranks
    if not experts:
        raise ValueError(f"enable-expert-parallel: {model.name} has no routed experts")
    if experts < ranks:
        raise ValueError(f"enable-expert-parallel: {ranks} ranks for {experts} experts of {model.name}")
    return -(-experts // ranks) / experts


def max_batch(model: Model, method: Method, num_tokens: int, available: int) -> int | None:
    """The most sequences of ``num_tokens`` tokens within ``available`` bytes; ``None``: no limit found."""
    return largest_batch(Deployment(model, method), num_tokens, available)


def max_context(model: Model, method: Method, batch_size: int, available: int) -> int | None:
    """The most tokens a sequence, ``batch_size`` of them, within ``available`` bytes; ``None``: no limit found."""
    return largest_context(Deployment(model, method), batch_size, available)


def largest_batch(deployment: Deployment, num_tokens: int, available: int) -> int | None:
    """The most sequences of ``num_tokens`` tokens of which every rank's share fits ``available`` bytes."""
    return largest_within(lambda batch_size: deployment.rank_nbytes(batch_size, num_tokens), available)


def largest_context(deployment: Deployment, batch_size: int, available: int) -> int | None:
    """The most tokens a sequence, ``batch_size`` of them, of which every rank's share fits ``available`` bytes.

    With a shared prefix no fewer than its tokens; 0 where not even those fit.  An engine that allocates for
    ``max_seq_len`` tokens at once has all of them or none.
    """
    least = max(1, deployment.shared_prefix)
    if deployment.rank_nbytes(batch_size, least) > available:
        return 0
    most = deployment.engine.max_seq_len
    if most:
        return most * deployment.sharding.context_ranks
    found = largest_within(lambda more: deployment.rank_nbytes(batch_size, least + more), available)
    return None if found is None else least + found


def largest_within(weigh: Callable[[int], int], available: int) -> int | None:
    """The largest n >= 0 with ``weigh(n) <= available``, ``weigh`` never falling; n = 0 needs nothing.

    ``None`` where :data:`SEARCH_LIMIT` fits.
    """
    line = _Line(weigh, available)
    found = largest(line.fits, SEARCH_LIMIT, line.look)
    return None if found == SEARCH_LIMIT else found


class _Line:
    """The line through the last two points says where to look next, since bytes grow in proportion to the batch, and
    nearly so to the context; where a look leaves more than half of the bracket (blocks and records are steps) the
    next is at the middle."""

    def __init__(self, weigh: Callable[[int], int], available: int) -> None:
        self.weigh, self.available = weigh, available
        self.before = self.light = (0, 0)
        """The last two that fit: number and bytes."""
        self.heavy: tuple[int, int] | None = None
        """The smallest that does not."""
        self.stretch, self.halve, self.width = 1, False, 0

    def fits(self, number: int) -> bool:
        """Whether ``number`` fits; its bytes are kept."""
        size = self.weigh(number)
        if size > self.available:
            self.heavy = number, size
            return False
        self.before, self.light = self.light, (number, size)
        return True

    def look(self, low: int, high: int) -> int:
        """Where to look next (:data:`kvsim.search.Look`)."""
        return self._further() if self.heavy is None else self._between(self.heavy)

    def _further(self) -> int:
        (number, size), (low, light) = self.before, self.light
        if not low:
            return 1
        if size == light:
            return SEARCH_LIMIT
        further = (self.available - light) * (low - number) // (light - size) * self.stretch + 1
        self.stretch *= 2
        return low + further

    def _between(self, heavy: tuple[int, int]) -> int:
        (low, light), (high, size) = self.light, heavy
        width = high - low
        self.halve = bool(self.width) and not self.halve and 2 * width > self.width
        self.width = width
        return low + (width // 2 if self.halve else (self.available - light) * width // (size - light))
