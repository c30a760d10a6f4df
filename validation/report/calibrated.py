"""What a card's profile changes: the same recorded steps by the stated constants and by the profile, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from validation.report.claims import RUNTIMES
from validation.report.collection import Point
from validation.report.pace import DAY, PACED

Table = tuple[list[str], list[list[str]]]
Pair = tuple[Point, Point]

MARK = ", calibrated"


def pairs(points: Sequence[Point]) -> list[Pair]:
    """Every step that was predicted by a profile, ``(as stated, calibrated)``."""
    stated = {_key(point, point.claim): point for point in points if point.claim in RUNTIMES}
    out = []
    for point in points:
        runtime, calibrated, _ = point.claim.partition(MARK)
        if calibrated and runtime in RUNTIMES and not point.claim.endswith(PACED):
            out.append((stated[_key(point, runtime)], point))
    return out


def _key(point: Point, runtime: str) -> tuple[object, ...]:
    return runtime, point.source, tuple(point.factors.items()), point.measured, point.spread


def beside(points: Sequence[Point]) -> Table:
    """A line a runtime and whose rows they are, and one over all that a profile of the same run predicts."""
    every = pairs(points)
    own = [pair for pair in every if not pair[1].claim.endswith(DAY)]
    groups = {
        (runtime, whose): [pair for pair in every if pair[1].claim == f"{runtime}{MARK}{mark}"]
        for runtime in RUNTIMES
        for whose, mark in (("the profile's run" if runtime != "engine" else "any day", ""), ("another day", DAY))
    }
    groups["every runtime", "the profile's run"] = own
    bound = [pair for pair in own if pair[1].bandwidth_bound]
    groups["every runtime, steps that weights and cache bound", "the profile's run"] = bound
    body = [[*name, f"{len(found)}", *errors(found, 0), *errors(found, 1)] for name, found in groups.items() if found]
    heads = ["runtime", "rows of", "steps", "as stated: mean", "bias", "worst", "by the profile: mean", "bias", "worst"]
    return heads, body


def errors(found: Sequence[Pair], which: int) -> list[str]:
    """Mean size of the error, mean error and largest size."""
    own = [pair[which].error for pair in found]
    return [f"{mean(map(abs, own)):.1%}", f"{mean(own):+.1%}", f"{max(map(abs, own)):.1%}"]
