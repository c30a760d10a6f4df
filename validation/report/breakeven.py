"""From which context a method's step is shorter than the uncompressed one's: measured, as stated, by the profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from validation.report.collection import Point

Table = tuple[list[str], list[list[str]]]
Sizes = dict[tuple[str, int], dict[str, Point]]
"""Method and context -> the points of each claim."""
STATED, CALIBRATED = "engine", "engine, calibrated"
MARGIN = 0.01
"""What a method's step must gain before it pays: the default of kvsim breakeven."""
SAYS = f"The first recorded context from which a method's step is {MARGIN:.0%} shorter, as kvsim breakeven asks."
GRID, APART = 3, 1
"""Contexts from which a grid is held to the bound, and grid steps that the profile may be off: between two contexts a
break-even is known to lie at the first, at the second or beyond."""


class Breakeven(NamedTuple):
    """``grid``: the contexts; ``measured``, ``stated``, ``calibrated``: the place in it from which on a step is
    shorter, its length where none is; ``calibrated`` is None without a profile of the card."""

    card: str
    model: str
    method: str
    grid: tuple[int, ...]
    measured: int
    stated: int
    calibrated: int | None

    @property
    def apart(self) -> int:
        """Grid steps between what was measured and what is said of it: by the profile, or without one as stated."""
        return abs((self.stated if self.calibrated is None else self.calibrated) - self.measured)

    @property
    def held(self) -> bool:
        """Whether the bound is about it."""
        return self.calibrated is not None and len(self.grid) >= GRID


def breakevens(points: Sequence[Point]) -> list[Breakeven]:
    """Of each card, model and method in batch 1 that was timed at two contexts and more."""
    groups: dict[tuple[str, str], Sizes] = {}
    for point in points:
        rows, _, tokens = point.factors.get("size", "").partition(" x ")
        if point.claim in (STATED, CALIBRATED) and rows == "1":
            size = point.factors["method"], int(tokens.replace(",", ""))
            group = groups.setdefault((point.factors["card"], point.factors["model"]), {})
            group.setdefault(size, {})[point.claim] = point
    return [each for (card, model), sizes in groups.items() for each in _of(card, model, sizes)]


def _of(card: str, model: str, sizes: Sizes) -> list[Breakeven]:
    plain = {tokens: each for (method, tokens), each in sizes.items() if method in ("fp16", "bf16")}
    out = []
    for method in dict.fromkeys(method for method, _ in sizes if method not in ("fp16", "bf16")):
        grid = sorted(tokens for name, tokens in sizes if name == method and tokens in plain)
        if len(grid) < 2:
            continue
        pairs = [(sizes[method, tokens], plain[tokens]) for tokens in grid]
        told = [[own[STATED].measured < (1 - MARGIN) * base[STATED].measured for own, base in pairs]]
        for claim in (STATED, CALIBRATED):
            if all(claim in own and claim in base for own, base in pairs):
                told.append([own[claim].predicted < (1 - MARGIN) * base[claim].predicted for own, base in pairs])
        places = [shorter(each) for each in told]
        measured, stated, *calibrated = places
        out.append(Breakeven(card, model, method, tuple(grid), measured, stated, next(iter(calibrated), None)))
    return out


def shorter(below: Sequence[bool]) -> int:
    """The first place from which on all are true; their number where the last is not.

    >>> shorter([True, False, True, True])
    2
    """
    return max((index + 1 for index, each in enumerate(below) if not each), default=0)


def table(found: Sequence[Breakeven]) -> Table:
    """A line each, contexts in full."""
    body = []
    for each in found:
        cells = [
            "no profile" if cell is None else f"{each.grid[cell]:,}" if cell < len(each.grid) else "none"
            for cell in (each.measured, each.stated, each.calibrated)
        ]
        verdict = ("holds" if each.apart <= APART else "FAILS") if each.held else "not held"
        body.append([each.card, each.model, each.method, *cells, f"{len(each.grid)}", f"{each.apart}", verdict])
    heads = [
        "card",
        "model",
        "method",
        "measured",
        "as stated",
        "calibrated",
        "contexts",
        "grid steps apart",
        "verdict",
    ]
    return heads, body


def beyond(found: Sequence[Breakeven]) -> list[Breakeven]:
    """Those that are held to a grid step and are further off."""
    return [each for each in found if each.held and each.apart > APART]


def sentence(found: Sequence[Breakeven]) -> str:
    """How many of those that are held are within a grid step, and which are not."""
    held, wrong = [each for each in found if each.held], beyond(found)
    if not held:
        return f"Of {len(found)} break-evens none has a profile and {GRID} contexts: none is held."
    if wrong:
        named = ", ".join(f"{each.method} of {each.model} on {each.card}" for each in wrong)
        return f"{len(wrong)} of {len(held)} break-evens by a profile are more than a grid step off: {named}."
    return f"All {len(held)} break-evens by a profile, of {GRID} contexts and more, are within a grid step."
