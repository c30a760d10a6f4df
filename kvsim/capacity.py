"""What fits beside the weights: the largest batch at a context, the largest context at a batch.

Both are exact inverses of :func:`kvsim.estimate.cache_nbytes`, found by doubling and bisection (a cache never
shrinks as it grows longer or wider), some forty evaluations each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvsim.estimate import cache_nbytes
from kvsim.hardware import Hardware
from kvsim.layout import Method
from kvsim.model import Model

RESERVE = 0.10
"""Share of the memory held back for activations, workspaces and the allocator (vLLM holds back as much)."""

DEFAULT_WEIGHT_BITS = 16
SEARCH_LIMIT = 1 << 50


@dataclass(frozen=True)
class Room:
    """The memory of one card, divided: bytes."""

    hardware: Hardware
    memory_nbytes: int
    reserve_nbytes: int
    weight_nbytes: int
    weight_bits: float
    notes: tuple[str, ...]

    @property
    def cache_nbytes(self) -> int:
        """What is left for the cache; below zero where the weights alone do not fit."""
        return self.memory_nbytes - self.reserve_nbytes - self.weight_nbytes


def room(model: Model, hardware: Hardware, weight_bits: float | None = None, reserve: float = RESERVE) -> Room:
    """The memory that ``model`` leaves on one card.

    ``weight_bits``: bits a parameter (``None``: as the config says, else 16).  ``reserve``: share of the memory
    held back, from 0 to below 1.  Raises ``ValueError`` where the memory or the number of weights is not known.
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
        if model.source("weight_bits"):
            if weight_bits is None:
                raise ValueError(f"model {model.name}: its quantization_config is not known here, give --weight-bits")
            notes.append(f"weights counted at {weight_bits:g} bits each (quantization_config)")
        elif weight_bits is None:
            weight_bits = DEFAULT_WEIGHT_BITS
            notes.append(f"the config gives no dtype: weights counted at {weight_bits:g} bits each")
    elif not 0 < weight_bits <= 64:
        raise ValueError(f"weight-bits {weight_bits:g}: allowed are above 0 to 64")
    reserve_nbytes, weight_nbytes = int(hardware.memory_nbytes * reserve), int(model.num_params * weight_bits / 8)
    if reserve_nbytes + weight_nbytes >= hardware.memory_nbytes:
        notes.append(f"the weights leave no room for a cache on one {hardware.id}")
    return Room(
        hardware=hardware,
        memory_nbytes=hardware.memory_nbytes,
        reserve_nbytes=reserve_nbytes,
        weight_nbytes=weight_nbytes,
        weight_bits=weight_bits,
        notes=tuple(notes),
    )


def max_batch(model: Model, method: Method, num_tokens: int, available: int) -> int | None:
    """The most sequences of ``num_tokens`` tokens within ``available`` bytes; ``None``: no limit found."""
    return _largest(lambda batch_size: cache_nbytes(model, method, batch_size, num_tokens), available)


def max_context(model: Model, method: Method, batch_size: int, available: int) -> int | None:
    """The most tokens a sequence, ``batch_size`` of them, within ``available`` bytes; ``None``: no limit found."""
    return _largest(lambda num_tokens: cache_nbytes(model, method, batch_size, num_tokens), available)


def _largest(weigh: Callable[[int], int], available: int) -> int | None:
    """The largest n >= 0 with ``weigh(n) <= available``, ``weigh`` never falling; n = 0 needs nothing."""
    low, high = 0, 1
    while weigh(high) <= available:
        low, high = high, 2 * high
        if high > SEARCH_LIMIT:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if weigh(middle) <= available else (low, middle)
    return low
