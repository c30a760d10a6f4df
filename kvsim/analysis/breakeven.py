"""From which context, and from which batch, one method pays against another: in tokens a second, and in money.

At one batch and context a method pays where its decode step reads fewer bytes of the cache and is shorter, by a margin
that is worth having (the time model does not tell steps apart that differ by less, nor the launches of two kernels over
a cache that is not compressed yet).  In money each method is at its own best: the largest
batch that memory allows on the same card, so dollars a token compare as tokens a second do.

Boundaries are solved by bisection to the exact token or sequence, inside brackets found at a few points an octave
(steps change smoothly in between, bytes but for saw teeth of one record): ``pays(n)`` and not ``pays(n - 1)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from kvsim.analysis.plan import MAX_BATCH, site
from kvsim.engines import IDEAL, Engine
from kvsim.hardware import Hardware
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import Band, Step, decode_step
from kvsim.layout import Method
from kvsim.memory.capacity import largest_batch, largest_context
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import placed
from kvsim.models.model import Model
from kvsim.search import largest, middle

POINTS_PER_OCTAVE = 4
MARGIN = 0.01
"""Share by which a method must be faster, or cheaper, to pay."""
MAX_CONTEXT = 1 << 30

Interval = tuple[int, int]


def intervals(pays: Callable[[int], bool], first: int, last: int) -> tuple[Interval, ...]:
    """The runs of whole numbers from ``first`` to ``last`` where ``pays`` holds, ends included and exact."""
    if last < first:
        return ()
    points = sorted({*_ladder(first, last), last})
    state = pays(first)
    starts, ends = ([first], []) if state else ([], [])
    for low, high in pairwise(points):
        if pays(high) == state:
            continue
        boundary = _boundary(pays, low, high)
        state = not state
        if state:
            starts.append(boundary)
        else:
            ends.append(boundary - 1)
    if state:
        ends.append(last)
    return tuple(zip(starts, ends, strict=True))


def _ladder(first: int, last: int) -> list[int]:
    out, value = [first], float(first)
    while out[-1] < last:
        value *= 2 ** (1 / POINTS_PER_OCTAVE)
        out.append(min(last, max(out[-1] + 1, int(value))))
    return out


def _boundary(pays: Callable[[int], bool], low: int, high: int) -> int:
    """The first n of a bracket with another answer than at its start."""
    before = pays(low)
    return low + largest(lambda more: pays(low + more) == before, high - low - 1, middle) + 1


class Runner:
    """One method on one card (or several that share the model): what fits, and how fast."""

    def __init__(
        self,
        model: Model,
        method: Method,
        card: Hardware,
        num_cards: int = 1,
        weight_bits: float | None = None,
        reserve: float | None = None,
        engine: Engine = IDEAL,
    ) -> None:
        """Raises ``ValueError`` where the weights do not fit, where memory, bandwidth or weights are not known, and
        where the engine does not store the method."""
        self.model, self.method, self.card, self.num_cards, self.engine = model, method, card, num_cards, engine
        self.place = site(model, card, num_cards, weight_bits, reserve, engine)
        self.serving = Serving(self.place.weight_bits, num_cards, engine)
        self.cache = Deployment(model, method, engine, Sharding(tensor_parallel_size=num_cards))
        self.step = lru_cache(maxsize=None)(self._step)
        self.max_batch = lru_cache(maxsize=None)(self._max_batch)
        self.max_context = lru_cache(maxsize=None)(self._max_context)
        self.reads = lru_cache(maxsize=None)(self._reads)
        self.seconds(1, 1)
        self.max_batch(1)  # an engine that does not store the method says so here

    def _step(self, batch_size: int, num_tokens: int) -> Step:
        return decode_step(self.model, self.method, self.card, batch_size, num_tokens, self.serving)

    def seconds(self, batch_size: int, num_tokens: int) -> Band:
        """Of one decode step."""
        return self.step(batch_size, num_tokens).seconds

    def _reads(self, num_tokens: int) -> int:
        """Bytes of one sequence's cache that a decode step reads."""
        stored = self.engine.stored(self.model, self.method)
        return sum(
            count * sum(chosen.read_parts(layer, 1, num_tokens).values())
            for (layer, chosen), count in placed(stored, self.engine.held(self.model).cache_layers).items()
        )

    def _max_batch(self, num_tokens: int) -> int:
        """The most sequences of ``num_tokens`` tokens that fit."""
        if self.max_context(1) < min(num_tokens, MAX_CONTEXT):
            return 0
        found = largest_batch(self.cache, num_tokens, self.place.cache_nbytes)
        return MAX_BATCH if found is None else min(found, MAX_BATCH)

    def _max_context(self, batch_size: int) -> int:
        """The most tokens that ``batch_size`` sequences can have."""
        found = largest_context(self.cache, batch_size, self.place.cache_nbytes)
        return MAX_CONTEXT if found is None else min(found, MAX_CONTEXT)

    def rate(self, batch_size: int, num_tokens: int) -> float:
        """Tokens a second."""
        return batch_size / self.seconds(batch_size, num_tokens).value

    def best_rate(self, num_tokens: int) -> float:
        """Tokens a second with all that fits; 0 where nothing does."""
        batch = self.max_batch(num_tokens)
        return self.rate(batch, num_tokens) if batch else 0.0


@dataclass(frozen=True)
class BreakEven:
    """Where ``method`` pays against ``against``.

    ``kind``: ``context`` (faster, at ``batch_size``, by context), ``batch`` (faster, at ``num_tokens``, by batch), or
    ``money`` (cheaper, each with all that fits, by context).  ``pays``: exact intervals, ends included; ``last`` is
    the end of what was asked (the largest that the method fits).  ``against_last``: the largest that the other fits.
    """

    method: Method
    against: Method
    kind: str
    batch_size: int | None
    num_tokens: int | None
    pays: tuple[Interval, ...]
    last: int
    against_last: int

    @property
    def first(self) -> int | None:
        """Where it begins to pay for good, that is up to ``last``; ``None`` where it does not."""
        return self.pays[-1][0] if self.pays and self.pays[-1][1] == self.last else None


def by_context(method: Runner, against: Runner, batch_size: int, margin: float = MARGIN) -> BreakEven:
    """From which context on a step of ``batch_size`` sequences reads less and is shorter."""
    last = method.max_context(batch_size)
    found = intervals(lambda tokens: _faster(method, against, batch_size, tokens, margin), 1, last)
    other = against.max_context(batch_size)
    return BreakEven(method.method, against.method, "context", batch_size, None, found, last, other)


def by_batch(method: Runner, against: Runner, num_tokens: int, margin: float = MARGIN) -> BreakEven:
    """From which batch on a step over ``num_tokens`` tokens a sequence, of which it reads less, is shorter."""
    last = method.max_batch(num_tokens)
    found = intervals(lambda batch: _faster(method, against, batch, num_tokens, margin), 1, last)
    other = against.max_batch(num_tokens)
    return BreakEven(method.method, against.method, "batch", None, num_tokens, found, last, other)


def by_money(method: Runner, against: Runner, margin: float = MARGIN) -> BreakEven:
    """From which context on a token is cheaper, each method with the largest batch that fits."""
    last = method.max_context(1)
    found = intervals(lambda tokens: method.best_rate(tokens) > (1 + margin) * against.best_rate(tokens), 1, last)
    return BreakEven(method.method, against.method, "money", None, None, found, last, against.max_context(1))


def _faster(method: Runner, against: Runner, batch_size: int, num_tokens: int, margin: float) -> bool:
    if method.reads(num_tokens) >= against.reads(num_tokens):
        return False
    mine, other = method.seconds(batch_size, num_tokens).value, against.seconds(batch_size, num_tokens).value
    return mine * (1 + margin) < other
