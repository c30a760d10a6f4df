"""The claims: what is predicted, the bound that each is held to, and the verdict that the points give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from validation.report.collection import Point


@dataclass(frozen=True)
class Claim:
    """``bars``: the largest mean and the largest single error, relative; both zero where figures must be equal.

    ``name``: that of its points, where ``of`` names no other claims.  ``keep``: which of the points it is about.
    """

    name: str
    says: str
    unit: str
    bars: tuple[float, float]
    of: tuple[str, ...] = ()
    keep: Callable[[Point], bool] = lambda point: True

    @property
    def points_of(self) -> tuple[str, ...]:
        return self.of or (self.name,)


RUNTIMES = (
    *("engine", "generate", "generate, compiled"),
    *("stock generate", "stock generate, new lengths", "stock generate, compiled"),
)
"""Claims of whole steps, a runtime each."""
CALIBRATED = tuple(f"{name}, calibrated" for name in RUNTIMES)
OF_RUN = "with the card's profile, of the same run"
OF_DAY = "with the card's profile, whose host was another day's"
OF_PACE = "with the card's profile, at the pace that other rows of the run tell of that day's host"
HOSTS = (0.35, 0.50)
"""By how much one host differs from another, or from itself on another day: no bound on the model, which is held at
that day's pace."""
SMALL = 8 << 20
"""Bytes below which a block that is up to 1 MiB larger than asked is a large part of what is held."""
CLAIMS = (
    Claim("bytes", "Bytes that a cache holds, to the byte", "B", (0.0, 0.0)),
    Claim("peaks", "Peak during generate(): cache, activations, logits", "B", (0.005, 0.01)),
    Claim("peaks of a layer", "Peak of one layer alone: append, attend, grow", "B", (0.01, 0.04)),
    Claim(
        "blocks",
        "Blocks that CUDA's allocator hands out for these bytes",
        "B",
        (0.015, 0.11),
        keep=lambda point: point.measured >= SMALL,
    ),
    Claim(
        "blocks, few",
        "The same of less than 8 MiB, of which what one block is too large by is a large part",
        "B",
        (0.03, 0.40),
        of=("blocks",),
        keep=lambda point: point.measured < SMALL,
    ),
    Claim("memory by phase", "What the allocator holds, and at the most, by phase", "B", (0.001, 0.005)),
    Claim("resident memory", "What a filled cache adds to the process on a CPU", "B", (0.03, 0.08)),
    Claim(
        "vLLM's pool",
        "Tokens of vLLM's pool, from the bytes in its log: the plugin's caches, fp8, bf16",
        "tokens",
        (0.0, 0.0),
    ),
    Claim("largest batch", "The largest batch that fits a card", "rows", (0.0, 0.0)),
    Claim("attention", "Decode attention of one layer, this project's kernels", "s", (0.06, 0.25)),
    Claim("attention, coded tokens", "The same of kernels for tokens coded one by one, in sample", "s", (0.04, 0.12)),
    Claim("engine", "A decode step of kvruntime.Engine, as stated", "s", (0.03, 0.10)),
    Claim(
        "engine, bandwidth-bound",
        "The same, steps that weights and cache bound",
        "s",
        (0.02, 0.07),
        of=("engine",),
        keep=lambda point: point.bandwidth_bound,
    ),
    Claim("engine, calibrated", "A decode step of kvruntime.Engine with the card's profile", "s", (0.04, 0.11)),
    Claim(
        "engine, calibrated, bandwidth-bound",
        "The same, steps that weights and cache bound",
        "s",
        (0.03, 0.07),
        of=("engine, calibrated",),
        keep=lambda point: point.bandwidth_bound,
    ),
    Claim("generate", "A step of stock generate() with this project's cache, as stated", "s", (0.05, 0.22)),
    Claim("generate, calibrated", f"The same {OF_RUN}", "s", (0.08, 0.20)),
    Claim("generate, calibrated, another day", f"The same {OF_DAY}", "s", (0.10, 0.30)),
    Claim("generate, compiled", "The same, compiled, as stated", "s", (0.08, 0.20)),
    Claim("generate, compiled, calibrated", f"The same {OF_RUN}", "s", (0.08, 0.20)),
    Claim("generate, compiled, calibrated, another day", f"The same {OF_DAY}", "s", (0.15, 0.25)),
    Claim(  # the host's launches: the constants are those of several hosts, and one is a third faster
        "stock generate", "A step with transformers' dynamic cache at lengths seen before, as stated", "s", (0.10, 0.40)
    ),
    Claim("stock generate, calibrated", f"The same {OF_RUN}", "s", (0.08, 0.25)),
    Claim("stock generate, calibrated, another day", f"The same {OF_DAY}", "s", HOSTS),
    Claim("stock generate, calibrated, at that day's pace", f"The same {OF_PACE}", "s", (0.08, 0.20)),
    Claim("stock generate, new lengths", "The same at lengths that are new to the process", "s", (0.13, 0.30)),
    Claim("stock generate, new lengths, calibrated", f"The same {OF_RUN}", "s", (0.08, 0.25)),
    Claim("stock generate, new lengths, calibrated, another day", f"The same {OF_DAY}", "s", HOSTS),
    Claim("stock generate, new lengths, calibrated, at that day's pace", f"The same {OF_PACE}", "s", (0.13, 0.25)),
    Claim("stock generate, compiled", "A step with transformers' static cache, as stated", "s", (0.08, 0.26)),
    Claim(
        "vLLM",
        "A decode step in vLLM: the plugin's caches, fp8 and bf16; nothing is fitted on these",
        "s",
        (0.10, 0.30),
    ),
    Claim("every runtime", "A decode step under any of the runtimes above, as stated", "s", (0.06, 0.40), of=RUNTIMES),
    Claim(
        "every runtime, calibrated",
        "The same with the card's profile, where it has a part for the runtime and, of the host's, is of the same run",
        "s",
        (0.08, 0.30),
        of=CALIBRATED,
    ),
    Claim(
        "every runtime, calibrated, bandwidth-bound",
        "The same, steps that weights and cache bound",
        "s",
        (0.05, 0.15),
        of=CALIBRATED,
        keep=lambda point: point.bandwidth_bound,
    ),
    Claim("bytes of a rank", "Bytes of a cache on one rank of a split model, to the byte", "B", (0.0, 0.0)),
    Claim("engine, several cards", "A decode step of kvruntime.Engine, the model split over cards", "s", (0.02, 0.04)),
    Claim("engine, several cards, silent", "The same step without its all-reduces", "s", (0.05, 0.08)),
    Claim(  # one takes less in a step than in a row of all-reduces, on which it is fitted
        "all-reduces of a step", "What the all-reduces of such a step take: it less the one without", "s", (0.45, 0.65)
    ),
    Claim("all-reduces", "One all-reduce of 2 KiB to 64 MiB, one after another in a graph", "s", (0.08, 0.35)),
    Claim("first token", "Prompts that the card bounds, of the engine and of generate()", "s", (0.12, 0.30)),
    Claim("short prompts", "Prompts that wait for the host to launch them", "s", (0.25, 0.55)),
)
"""Every claim.  The bounds are held at each commit: a record beyond them fails."""


@dataclass(frozen=True)
class Verdict:
    """A claim over its points: the errors are ``predicted / measured - 1``."""

    claim: Claim
    points: tuple[Point, ...]

    @property
    def mean(self) -> float:
        return mean(abs(point.error) for point in self.points)

    @property
    def median(self) -> float:
        return median(abs(point.error) for point in self.points)

    @property
    def bias(self) -> float:
        return mean(point.error for point in self.points)

    @property
    def worst(self) -> float:
        return max(abs(point.error) for point in self.points)

    @property
    def band(self) -> tuple[float, float]:
        """Least and greatest predicted / measured that the bound on a single error allows."""
        most = self.claim.bars[1]
        return max(1 - most, 0.01), 1 + most

    @property
    def holds(self) -> bool:
        return self.mean <= self.claim.bars[0] + 1e-12 and self.worst <= self.claim.bars[1] + 1e-12

    @property
    def sentence(self) -> str:
        """``holds`` or what is beyond which bound."""
        if not any(self.claim.bars):
            return "holds: no difference" if self.holds else f"FAILS: {self.worst:.2%} off, where nothing may be"
        most = f"{self.claim.bars[1]:.{0 if self.claim.bars[1] >= 0.01 else 1}%}"
        kept = f"mean {self.mean:.1%} of {self.claim.bars[0]:.1%}, worst {self.worst:.1%} of {most}"
        return f"{'holds' if self.holds else 'FAILS'}: {kept}"


def verdicts(points: Sequence[Point]) -> list[Verdict]:
    """One a claim that has points."""
    out = []
    for claim in CLAIMS:
        own = tuple(point for point in points if point.claim in claim.points_of and claim.keep(point))
        if own:
            out.append(Verdict(claim, own))
    return out


def failures(points: Sequence[Point]) -> list[str]:
    """One line for each claim that does not hold."""
    return [f"{each.claim.name}: {each.sentence}" for each in verdicts(points) if not each.holds]


FACTORS = ("card", "model", "method", "rows", "bound by")


def factors_of(point: Point) -> dict[str, str]:
    """What residuals are grouped by."""
    largest = max(point.parts, key=lambda name: point.parts[name]) if point.parts else ""
    return {**point.factors, "bound by": largest}


def by_factor(points: Iterable[Point]) -> list[tuple[str, str, int, float, float]]:
    """Factor, its value, points, mean error and mean size of the error, where a factor takes two values or more."""
    every = list(points)
    out = []
    for factor in FACTORS:
        groups: dict[str, list[float]] = {}
        for point in every:
            groups.setdefault(factors_of(point).get(factor, ""), []).append(point.error)
        groups.pop("", None)
        if len(groups) > 1:
            for value, errors in sorted(groups.items()):
                out.append((factor, value, len(errors), mean(errors), mean(map(abs, errors))))
    return out


def explained(point: Point, points: Sequence[Point]) -> str:
    """What of a point's residual others share: the factor whose other points err alike most, and the largest part.

    A factor shares at most the whole residual, and nothing where its other points err the other way.
    """
    others = [other for other in points if other.claim == point.claim and other is not point]
    own = factors_of(point)
    shares = []
    for factor in FACTORS:
        alike = [other.error for other in others if own.get(factor) and factors_of(other).get(factor) == own[factor]]
        if len(alike) >= 2 and len(alike) < len(others):
            shares.append((min(1.0, max(0.0, mean(alike) / point.error)), factor, alike))
    said = []
    if shares:
        share, factor, alike = max(shares, key=lambda each: each[0])
        if share >= 0.25:
            said.append(f"{own[factor]}: the other {len(alike)} err by {mean(alike):+.1%} in the mean")
        else:
            said.append("nothing that it shares with other points: their errors are small or the other way")
    total = sum(point.parts.values())
    if total:
        name = max(point.parts, key=lambda part: point.parts[part])
        said.append(f"{point.parts[name] / total:.0%} of the prediction is {name}")
    if point.spread and point.measured:
        wide = (point.spread[1] - point.spread[0]) / point.measured
        if wide > 0.5 * abs(point.error):
            said.append(f"its own runs spread by {wide:.0%}")
    return "; ".join(said) or "a count in whole units"
