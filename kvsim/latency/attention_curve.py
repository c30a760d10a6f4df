"""How long one layer's decode attention takes: a launch, work dealt out to multiprocessors, and the stream of bytes.

    seconds = fixed + value * values + max(split, ((item * waves)^P + stream^P)^(1/P))
    waves   = max(1, items / SMs)
    stream  = nbytes * miss / (efficiency * bandwidth), or the arithmetic where that takes longer
    split   = merge * tokens / (tokens + half) + (item^P + (stream / waves)^P)^(1/P)

``items`` are the pieces that a kernel deals out before it splits sequences: one a sequence and kv head, or one a
query head.  A card with more multiprocessors takes them in fewer waves, one with more bandwidth streams the bytes
faster.  Few long sequences are split, and what the split computes is merged; from one piece a multiprocessor on
nothing is split, and no more pieces take less time than those that just were.  ``miss`` is 1 where the cache comes
from memory, as in a model, whose layers evict one another; a benchmark that reads one cache again and again
finds it in L2 while it fits.  ``values`` are a piece's outputs, which every part of it leaves and the merge reads.
A kernel of packed codes that says what its lanes do with a code and a scale has a ``stream`` of both, nearly the longer
of the two (:func:`streamed`): a card with more bandwidth and as many multiprocessors does not unpack faster.
``fixed``, ``item`` and ``efficiency`` are an engine's kernel's, and ``value``, ``merge`` and ``half`` too
where a kernel is fitted alone (this project's); the rest is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_SMS = 132
"""Multiprocessors of a card whose count is not known (an H100 SXM's)."""

STEEPNESS = 4.0
"""How suddenly a cache that outgrows L2 misses it."""

HIDDEN = 8.0
"""How well unpacking and reading hide behind one another: the exponent of their power mean (1: they add up)."""


@dataclass(frozen=True)
class Kernel:
    """One engine's kernel for one width of cache.

    ``fixed``: seconds a launch.  ``item``: seconds a multiprocessor takes for a piece however short.
    ``efficiency``: share of the card's bandwidth when it streams.  ``item_is``: what a piece is, ``kv_head`` or
    ``query_head`` of a sequence.  ``merges``: whether a split costs more than ``fixed`` holds (a kernel that always
    splits has it there).  ``low``, ``high``: factors that nine in ten measurements stay within.  ``value``: seconds for
    each value of a piece's output.  ``merge``, ``half``: seconds and tokens of a split, the curve's where None.
    ``code_ops``, ``scale_ops``: operations of a lane to unpack a code and to apply a scale or a zero; 0 where the
    stream of the bytes says it all.
    """

    fixed: float
    item: float
    efficiency: float
    source: str
    item_is: str = "kv_head"
    merges: bool = True
    low: float = 0.7
    high: float = 1.4
    value: float = 0.0
    merge: float | None = None
    half: float | None = None
    code_ops: float = 0.0
    scale_ops: float = 0.0


def streamed(read: Any, unpacked: Any) -> Any:
    """Seconds of bytes that are read while what was read is unpacked: nearly the longer of the two."""
    return (read**HIDDEN + unpacked**HIDDEN) ** (1 / HIDDEN)


@dataclass(frozen=True)
class Curve:
    """The constants that all kernels share: exponent, seconds and tokens of a split, and what L2 saves."""

    power: float
    merge: float
    half: float
    warm: float
    l2_share: float

    def seconds(
        self,
        kernel: Kernel,
        items: Any,
        tokens: Any,
        stream: Any,
        num_sms: int | None,
        maximum: Any = max,
        values: Any = 0.0,
    ) -> Any:
        """Seconds of one layer's attention over ``tokens`` tokens a sequence: numbers, or arrays that broadcast
        together with ``maximum`` as ``numpy.maximum``.  ``stream``: seconds of the bytes alone; ``values``: outputs of
        a piece, which count where the kernel has a ``value``."""
        fixed = kernel.fixed + kernel.value * values
        waves = maximum(1.0, items / (num_sms or DEFAULT_SMS))
        whole = self._joined(kernel.item * waves, stream)
        if not kernel.merges:
            return fixed + whole
        merge = self.merge if kernel.merge is None else kernel.merge
        half = self.half if kernel.half is None else kernel.half
        split = merge * (tokens / (tokens + half)) + self._joined(kernel.item, stream / waves)
        return fixed + maximum(split, whole)

    def _joined(self, dealt: Any, stream: Any) -> Any:
        return (dealt**self.power + stream**self.power) ** (1 / self.power)

    def miss(self, nbytes: Any, l2_nbytes: int | None) -> Any:
        """Time of a byte, against one from memory, of ``nbytes`` bytes that are read again and again."""
        if not l2_nbytes:
            return 1.0
        return self.warm + (1 - self.warm) / (1 + (nbytes / (self.l2_share * l2_nbytes) + 1e-9) ** -STEEPNESS)
