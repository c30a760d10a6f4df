"""Host: over how many programs an attention splits a row's tokens."""

from __future__ import annotations

MAX_SPLITS = 128


def plan_splits(programs: int, num_tokens: int, tile: int, at_once: int, overhead: int = 1) -> int:
    """Splits of a row: those that end first, where ``at_once`` programs run and each costs ``overhead`` tiles more than
    it has.  ``programs``: of all rows, without splits.

    >>> plan_splits(8, 131072, 128, 132), plan_splits(24, 20000, 128, 132), plan_splits(512, 4096, 128, 132)
    (16, 11, 1)
    >>> plan_splits(64, 32768, 32, 2112, overhead=2), plan_splits(8, 32768, 32, 2112, overhead=2)
    (32, 128)
    """
    tiles = -(-num_tokens // tile)

    def end(splits: int) -> int:
        return -(-programs * splits // at_once) * (-(-tiles // splits) + overhead)

    return min(range(1, min(tiles, MAX_SPLITS) + 1), key=end)
