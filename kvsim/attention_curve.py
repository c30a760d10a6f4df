"""How long one layer's decode attention takes: fixed latency, work per sequence and head, and the KV stream.

    seconds = fixed + ((item * max(1, items / SMs))^P + (nbytes * g / (E * bandwidth))^P)^(1/P)

``items`` is batch_size * num_kv_heads, the work that an engine can deal out without splitting a sequence; a card
with more multiprocessors takes them in fewer waves, a card with more bandwidth streams the bytes faster.  Split-KV
lets few long sequences fill the card, so the stream's efficiency ``E`` is one constant.  ``g`` is 1 where the cache
comes from memory (a model's layers evict one another from L2) and falls to ``WARM`` for a cache that stays in L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_SMS = 132
"""Multiprocessors of a card whose count is not known (an H100 SXM's)."""


@dataclass(frozen=True)
class Kernel:
    """One engine's kernel for one type of cache: ``fixed`` seconds a launch, ``item`` seconds a work item of one
    multiprocessor, ``efficiency`` of the card's bandwidth when it streams, and the ``spread`` of its measurements
    around the curve (a factor either way that nine in ten stay within)."""

    fixed: float
    item: float
    efficiency: float
    spread: float
    source: str


@dataclass(frozen=True)
class Curve:
    """The constants that all kernels share: the norm's exponent and what a cache in L2 gains."""

    power: float = 2.0
    warm: float = 0.4
    l2_share: float = 0.8
    steepness: float = 6.0

    def seconds(
        self,
        kernel: Kernel,
        items: Any,
        nbytes: Any,
        bandwidth: float,
        num_sms: int | None,
        maximum: Any = max,
        l2_nbytes: int | None = None,
    ) -> Any:
        """Seconds of one layer's attention; ``items`` and ``nbytes`` are numbers, or arrays with ``numpy.maximum``.

        ``l2_nbytes`` only where the same cache is read again and again (a micro-benchmark); ``None`` means cold.
        """
        waves = maximum(1.0, items / (num_sms or DEFAULT_SMS))
        stream = nbytes / (kernel.efficiency * bandwidth)
        if l2_nbytes:
            stream = stream * self.miss(nbytes / (self.l2_share * l2_nbytes))
        return kernel.fixed + ((kernel.item * waves) ** self.power + stream**self.power) ** (1 / self.power)

    def miss(self, fill: Any) -> Any:
        """Time of a byte against one from memory, for a cache ``fill`` times the L2's usable size."""
        return self.warm + (1 - self.warm) / (1 + (fill + 1e-9) ** -self.steepness)
