"""Rows of another day than a profile's: by what factor that day's host took longer, and what is left without it.

Steps whose kernels the host launches take as long as the host does, and hosts differ by a factor: one profile is off by
nearly the same share in all rows of a run.  The factor of a row is taken from the other rows of its run, so that none
is predicted by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from validation.report.collection import Point

DAY, PACED = ", another day", ", at that day's pace"
HOSTS_OWN = tuple(f"{name}, calibrated{DAY}" for name in ("stock generate", "stock generate, new lengths"))
"""Claims of steps that take as long as the host does."""
FEWEST = 4
"""Rows of a run below which its host's pace is not known: a row is left out, and one may be odd."""


def groups(points: Sequence[Point]) -> dict[tuple[str, str, str], list[Point]]:
    """By claim, card and run, the points of the runs that have enough."""
    out: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        if point.claim in HOSTS_OWN and point.run:
            out.setdefault((point.claim, point.factors["card"], point.run), []).append(point)
    return {key: own for key, own in out.items() if len(own) >= FEWEST}


def paced(points: Sequence[Point]) -> Iterator[Point]:
    """The points of these runs, each predicted at the pace that the others of its run tell."""
    for own in groups(points).values():
        for index, point in enumerate(own):
            others = [each.measured / each.predicted for each in (*own[:index], *own[index + 1 :])]
            claim = point.claim.removesuffix(DAY) + PACED
            yield replace(point, claim=claim, predicted=point.predicted * median(others))


def table(points: Sequence[Point]) -> tuple[list[str], list[list[str]]] | None:
    """A line a run: how many times as long as by the profile its steps took; None where no run has enough rows."""
    body = [
        [*key, f"{len(own)}", f"{median(each.measured / each.predicted for each in own):.2f}"]
        for key, own in groups(points).items()
    ]
    rows = [[claim.removesuffix(DAY), card, run[:12], *cells] for claim, card, run, *cells in body]
    return (["steps", "card", "run (code)", "rows", "times the profile's"], rows) if rows else None
