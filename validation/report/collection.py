"""What a report is made of: points, the rows that they come from, and the rows that have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

DOMINANT = 0.75
"""Share of a step that weights and cache take in one that the memory's bandwidth bounds."""


@dataclass(frozen=True)
class Point:
    """One figure: ``predicted`` and ``measured`` in the claim's unit, and what it depends on (``factors``).

    ``parts``: what the prediction is made of, where it is a sum.  ``spread``: the least and greatest measured.
    ``run``: the hash of the code that measured a step, which tells one day's rows from another's.
    """

    claim: str
    predicted: float
    measured: float
    factors: dict[str, str]
    source: str
    parts: dict[str, float] = field(default_factory=dict)
    spread: tuple[float, float] | None = None
    run: str = ""

    @property
    def error(self) -> float:
        """``predicted / measured - 1``; infinite where nothing was measured and something predicted."""
        if self.measured:
            return self.predicted / self.measured - 1
        return 0.0 if not self.predicted else float("inf")

    @property
    def bandwidth_bound(self) -> bool:
        """Whether weights and cache are most of the prediction."""
        total = sum(self.parts.values())
        return total > 0 and (self.parts.get("weights", 0.0) + self.parts.get("kv", 0.0)) > DOMINANT * total

    @property
    def title(self) -> str:
        return ", ".join(value for value in self.factors.values() if value)


class Left(NamedTuple):
    """Rows that have no point, and why."""

    what: str
    reason: str
    rows: int


@dataclass
class Collection:
    """Points, how many rows they were made of, and what was left out of the files read."""

    points: list[Point] = field(default_factory=list)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    parts_left: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What else rows timed that has no point, of rows that have one."""
    rows: int = 0

    def take(self, made: Iterable[Point]) -> None:
        """The points of one row, which is no row of theirs where it gave none."""
        own = list(made)
        self.points += own
        self.rows += bool(own)

    def leave(self, what: str, reason: str) -> None:
        self.left[what, reason] += 1

    @property
    def uncovered(self) -> list[Left]:
        return [Left(*key, rows) for key, rows in sorted(self.left.items())]
