"""The largest whole number that holds: by doubling and halving, or by better guesses where they are to be had."""

from __future__ import annotations

from collections.abc import Callable

Look = Callable[[int, int], int]
"""``(low, high)`` -> where to look between them: ``low`` holds, ``high`` does not (or is one beyond the limit)."""


def largest(holds: Callable[[int], bool], limit: int, look: Look | None = None) -> int:
    """The largest n of 0 to ``limit`` with ``holds(n)``; ``holds`` is true of 0 (unasked) and, once false, stays so.

    ``look``: where to look next, held to what is open; by default twice as far while everything holds, then in
    the middle.
    """
    low, high = 0, limit + 1
    while high - low > 1:
        if look is not None:
            at = look(low, high)
        else:
            at = 2 * low or 1 if high > limit else (low + high) // 2
        at = min(max(at, low + 1), high - 1)
        if holds(at):
            low = at
        else:
            high = at
    return low


def middle(low: int, high: int) -> int:
    """Halves from the start, where the answer may be anywhere (:data:`Look`)."""
    return (low + high) // 2
