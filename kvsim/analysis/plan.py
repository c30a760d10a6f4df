"""How to serve so many users within these latencies: cards, method, batch, tokens a second, and dollars a million.

A *replica* is the model on one card or on several, in one of the :func:`layouts` that suit it.  Its batch is limited
by memory (at a stated risk that requests outgrow it) and by the time per output token; replicas are added until all
users are in flight.

The times are those of :mod:`kvsim.latency.steps`, for requests in a steady state where each that ends is followed by a
new one: a token waits for the prompts of the others, a first token for its own prompt (one that 95 of 100 do not
exceed) and for those in front of it.  Largest batches and contexts are bisections on functions that never fall:
exact inverses, not scans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, floor, log10
from typing import Any

from kvsim.analysis.memory_risk import MemoryRisk
from kvsim.analysis.request_lengths import Lengths
from kvsim.analysis.shortcuts import NONE, PrefixShare, Shortcuts
from kvsim.engines import IDEAL, Engine
from kvsim.hardware import Hardware, Price
from kvsim.latency.roofline import Serving
from kvsim.latency.speculation import busy, speculative_step
from kvsim.latency.steps import Band, Step, first_token, prefill, token_step
from kvsim.layout import Method
from kvsim.memory.capacity import held_share, largest_context, room
from kvsim.memory.sharding import SINGLE, Deployment, Sharding, copies
from kvsim.models.model import Model
from kvsim.search import largest

RISK = 1e-3
INPUT_SHARE = 0.95
RANKS = (1, 2, 4, 8)
MORE_RANKS = (16, 32, 64)
"""Tried where the weights leave no room on fewer."""
MAX_BATCH = 1 << 16
MAX_CONTEXT = 1 << 40


@dataclass(frozen=True)
class Demand:
    """What is asked for: ``users`` requests in flight, their ``lengths``, and limits in seconds (``None``: none).

    ``risk``: accepted probability that a replica's requests do not fit at once.  ``occupancy``: see
    :class:`kvsim.analysis.memory_risk.MemoryRisk`.
    """

    users: int
    lengths: Lengths
    slo_tpot: float | None = None
    slo_ttft: float | None = None
    risk: float = RISK
    occupancy: str = "full"

    def __post_init__(self) -> None:
        if self.users < 1:
            raise ValueError(f"users {self.users}: allowed are 1 and above")
        for name, limit in (("slo-tpot", self.slo_tpot), ("slo-ttft", self.slo_ttft)):
            if limit is not None and not 0 < limit < 1e6:
                raise ValueError(f"{name} {limit:g} s: allowed are times above 0")
        if not 0 <= self.risk < 1:
            raise ValueError(f"risk {self.risk:g}: allowed are 0 to below 1")


@dataclass(frozen=True)
class Site:
    """A replica's place: ``num_cards`` of one card, how they share the model, and the bytes that each leaves for its
    share of the cache."""

    card: Hardware
    num_cards: int
    weight_bits: float
    cache_nbytes: int
    sharding: Sharding = SINGLE


@dataclass(frozen=True)
class Plan:
    """One way to serve the demand; ``refusal`` says why where it cannot (and what follows is then ``None`` or 0).

    ``batch_size``: requests in flight a replica; ``max_batch``: the most that memory and the time limit allow;
    ``batch_bound``: which of them (``memory``, ``latency``), or ``users`` where one replica has them all.
    ``max_context``: tokens a request could have at this batch.  ``cached_tokens``: of the mean prompt, found in the
    cache.  Seconds are bands.  ``usd_per_mtok``: a million output tokens.  ``needs``: where a time limit is what
    refuses, its name in :class:`Demand` and the seconds that a request alone takes.
    """

    method: Method
    card: Hardware
    cards_per_replica: int
    sharding: Sharding = SINGLE
    refusal: str | None = None
    num_replicas: int = 0
    batch_size: int = 0
    max_batch: int = 0
    batch_bound: str = ""
    max_context: int = 0
    tpot: Band | None = None
    ttft: Band | None = None
    bound: str = ""
    copies: int = 1
    cached_tokens: int = 0
    tokens_per_second: float = 0.0
    runs_out: float | None = None
    usd_per_mtok: float | None = None
    price: Price | None = None
    needs: tuple[str, float] | None = None

    @property
    def num_cards(self) -> int:
        return self.num_replicas * self.cards_per_replica


class NoRoomError(ValueError):
    """The weights leave nothing for a cache."""


class TooSlowError(ValueError):
    """A request alone takes ``seconds``, longer than the ``limit`` of :class:`Demand` allows."""

    def __init__(self, message: str, limit: str, seconds: float) -> None:
        super().__init__(message)
        self.limit, self.seconds = limit, seconds


def site(
    model: Model,
    card: Hardware,
    num_cards: int,
    weight_bits: float | None = None,
    reserve: float | None = None,
    engine: Engine = IDEAL,
    quantized: bool = False,
    sharding: Sharding | None = None,
    shortcuts: Shortcuts = NONE,
) -> Site:
    """The room for the cache on each of ``num_cards`` cards that share the model, beside what ``engine`` takes.

    ``reserve``: share of the memory held back (``None``: as the engine does by default).  ``quantized``:
    ``weight_bits`` are those of the layers, embedding and head keep 16.  ``sharding``: how the cards share it
    (``None``: every layer).  ``shortcuts``: a draft's weights lie there too.

    Raises ``ValueError`` where memory or weights are not known, :class:`NoRoomError` where the weights do not fit.
    """
    sharding = sharding or Sharding(tensor_parallel_size=num_cards)
    space = room(
        model,
        card,
        weight_bits,
        held_share(engine, reserve),
        quantized=quantized,
        overhead=engine.overhead(model, card) | shortcuts.overhead(model, card, weight_bits, quantized, sharding),
        sharding=sharding,
        kept_free=engine.kept_free,
    )
    if space.cache_nbytes <= 0:
        cards = f"{num_cards} cards" if num_cards > 1 else "one card"
        lacking = f"{-space.cache_nbytes / (1 << 30):,.2f} GiB are missing for them alone"
        raise NoRoomError(f"the weights leave no room for a cache on {cards}: {lacking}")
    return Site(card, num_cards, space.weight_bits, space.cache_nbytes, sharding)


def layouts(model: Model, num_cards: int, host_cards: int = 8) -> tuple[Sharding, ...]:
    """The ways that ``num_cards`` cards share a model in practice.

    Tensor parallel within a host, and pipeline stages of whole hosts; for a mixture of experts also data-parallel
    attention, its experts over all cards, with as much tensor parallel as copies nothing; where a head or latent would
    be copied by tensor parallel alone, decode context parallel as well, which spreads the tokens instead.
    """
    most = min(num_cards, host_cards)
    if num_cards % most:
        return (Sharding(tensor_parallel_size=num_cards),)
    out = [Sharding(tensor_parallel_size=most, pipeline_parallel_size=num_cards // most)]
    alike, experts = copies(model, out[0]), model.weights.num_experts if model.weights is not None else 0
    if alike > 1 and all(layer.window is None for layer in model.cache_layers):
        out.append(replace(out[0], decode_context_parallel_size=alike))
    if experts >= num_cards > 1:
        for ranks in (size for size in range(most, 0, -1) if num_cards % size == 0 and size & (size - 1) == 0):
            way = Sharding(ranks, data_parallel_size=num_cards // ranks, enable_expert_parallel=True)
            if ranks < num_cards and copies(model, way) == 1:
                out.append(way)
    return tuple(out)


def plan(
    model: Model,
    methods: Sequence[Method],
    cards: Sequence[tuple[Hardware, int | Sharding | None]],
    demand: Demand,
    price: Callable[[Hardware, int], Price | None],
    *,
    weight_bits: float | None = None,
    reserve: float | None = None,
    quantized: bool = False,
    engine: Callable[[Hardware, int], Engine] = lambda card, num_cards: IDEAL,
    shortcuts: Shortcuts = NONE,
    max_cards: int | None = None,
    max_num_seqs: int = MAX_BATCH,
) -> list[Plan]:
    """Every way that was weighed, the cheapest first (by price, else by cards), refusals last.

    ``cards``: a card with how a replica shares the model, or the number it takes (its :func:`layouts` are tried), or
    ``None`` to try :data:`RANKS`, and :data:`MORE_RANKS` where the weights do not fit those.
    ``price(card, num_cards)``: what a card-hour costs; ``engine(card, num_cards)``: what serves there.
    ``max_num_seqs``: the largest batch of a replica (of each, where several share experts).  ``weight_bits``,
    ``reserve``, ``quantized``: see :func:`site`.  ``shortcuts``: drafts, and prompts found in the cache.  A way that
    cannot be (its reason in ``refusal``) is listed, not raised.
    """
    found: list[Plan] = []

    def weigh(card: Hardware, sharding: Sharding) -> bool:
        """Weighs all methods there; whether the weights leave room."""
        server, roomy = engine(card, sharding.ranks), True
        for method in methods:
            way = Plan(method, card, sharding.ranks, sharding, copies=copies(model, sharding))
            try:
                place = site(model, card, sharding.ranks, weight_bits, reserve, server, quantized, sharding, shortcuts)
                way = _serve(model, method, place, demand, server, max_num_seqs, shortcuts)
                way = _priced(way, price(card, way.num_cards))
            except NoRoomError as error:
                roomy, way = False, replace(way, refusal=str(error))
            except TooSlowError as error:
                way = replace(way, refusal=str(error), needs=(error.limit, error.seconds))
            except ValueError as error:
                way = replace(way, refusal=str(error))
            if way.refusal is None and max_cards is not None and way.num_cards > max_cards:
                way = replace(way, refusal=f"takes {way.num_cards} cards, more than {max_cards}")
            found.append(way)
        return roomy

    for card, given in dict.fromkeys(cards):
        if isinstance(given, Sharding):
            weigh(card, given)
            continue
        roomy = False
        for ranks in (given,) if given else (*RANKS, *MORE_RANKS):
            if ranks in MORE_RANKS and roomy and not given:
                break
            for layout in layouts(model, ranks, card.host_cards):
                roomy |= weigh(card, layout)
    return sorted(found, key=_cost)


def _cost(way: Plan) -> tuple[bool, bool, float, int]:
    price = way.usd_per_mtok
    return way.refusal is not None, price is None, price or 0.0, way.num_cards or way.cards_per_replica


def _priced(way: Plan, price: Price | None) -> Plan:
    if price is None:
        return way
    hourly = price.usd_per_hour * way.num_cards
    return replace(way, price=price, usd_per_mtok=hourly / 3600 / way.tokens_per_second * 1e6)


def _serve(
    model: Model,
    method: Method,
    place: Site,
    demand: Demand,
    engine: Engine,
    max_num_seqs: int,
    shortcuts: Shortcuts,
) -> Plan:
    """Raises ``ValueError``, saying why, where no batch meets the demand."""
    lengths, sharding = demand.lengths, place.sharding
    replicas = sharding.data_parallel_size
    cache = Deployment(shortcuts.held(model), method, engine, sharding)
    clock = _clock(model, method, place, lengths, engine, shortcuts)
    ttft = clock.ttft(1)
    if demand.slo_ttft is not None and ttft.value > demand.slo_ttft:
        late = f"time to first token {ttft.value * 1e3:,.0f} ms even alone, over {demand.slo_ttft * 1e3:g} ms"
        raise TooSlowError(late, "slo_ttft", ttft.value)
    a_rank = replace(cache, sharding=replace(sharding, data_parallel_size=1, enable_expert_parallel=False))
    risk = MemoryRisk(a_rank.rank_nbytes, lengths, place.cache_nbytes, demand.occupancy)
    share = demand.risk if replicas == 1 else 1 - (1 - demand.risk) ** (1 / replicas)  # that one of them runs out
    by_memory = min(MAX_BATCH, replicas * min(max_num_seqs, risk.most(share)))
    if not by_memory:
        raise ValueError(
            f"no request of {lengths.longest:,} tokens fits beside the weights at a risk of {demand.risk:g}"
        )
    by_time = largest(lambda batch: clock.within(batch, demand), by_memory)
    if not by_time:
        alone = clock.tpot(1).value
        slow = f"{alone * 1e3:,.1f} ms a token even alone, over {(demand.slo_tpot or 0) * 1e3:g} ms"
        raise TooSlowError(slow, "slo_tpot", alone)
    num_replicas = -(-demand.users // by_time)
    batch = -(-demand.users // num_replicas)
    tpot = clock.tpot(batch)
    longest = largest_context(cache, batch, place.cache_nbytes)
    out = risk.runs_out(sharding.rank_batch(batch))
    return Plan(
        method,
        place.card,
        sharding.ranks,
        sharding,
        num_replicas=num_replicas,
        batch_size=batch,
        max_batch=by_time,
        batch_bound="users" if batch == demand.users else "memory" if by_time == by_memory else "latency",
        max_context=MAX_CONTEXT if longest is None else min(longest, MAX_CONTEXT),
        tpot=tpot,
        ttft=clock.ttft(batch),
        bound=clock.bound(batch),
        copies=copies(model, sharding),
        cached_tokens=clock.cached_tokens,
        tokens_per_second=demand.users / tpot.value,
        runs_out=out if replicas == 1 else 1 - (1 - out) ** replicas,
    )


def _clock(model: Model, method: Method, place: Site, lengths: Lengths, engine: Engine, shortcuts: Shortcuts) -> Clock:
    found = shortcuts.found(Deployment(model, method, engine, place.sharding), place.cache_nbytes)
    return Clock(model, method, place, lengths, engine, shortcuts, found)


def clock_of(
    model: Model,
    way: Plan,
    lengths: Lengths,
    weight_bits: float | None = None,
    reserve: float | None = None,
    engine: Engine = IDEAL,
) -> Clock:
    """The times of one replica of a way that :func:`plan` weighed so, at every batch."""
    place = site(model, way.card, way.cards_per_replica, weight_bits, reserve, engine, sharding=way.sharding)
    return _clock(model, way.method, place, lengths, engine, NONE)


def nearest(ways: Sequence[Plan], demand: Demand, weigh: Callable[[Demand], list[Plan]]) -> tuple[Demand, Plan] | None:
    """Where nothing meets the demand: one with the least of its time limits raised that is met, and its first plan.

    ``weigh``: plans of a demand, as they were asked for.  ``None`` where time is not what is lacking.
    """
    for _ in range(2):  # a way that misses the first token may miss the others too
        missed = sorted((way.needs for way in ways if way.needs), key=lambda each: (each[0] != "slo_tpot", each[1]))
        if not missed:
            return None
        limit, seconds = missed[0]
        demand = replace(demand, **{limit: upward(seconds)})  # type: ignore[arg-type]  # a limit is seconds
        ways = weigh(demand)
        if ways and ways[0].refusal is None:
            return demand, ways[0]
    return None


def upward(seconds: float) -> float:
    """The next time of three digits, to be written in milliseconds.

    >>> upward(0.045678), upward(1.234567)
    (0.0457, 1.24)
    """
    step = 10.0 ** (floor(log10(seconds * 1e3)) - 2)
    return float(f"{ceil(seconds * 1e3 / step - 1e-9) * step / 1e3:.6g}")


class Clock:
    """The times of one replica at the lengths' means; its batch is known to fit, so nobody waits for memory.

    A batch is the replica's; a step is of the requests on one card's share of it: of one attention replica, and of one
    batch in the pipeline.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        place: Site,
        lengths: Lengths,
        engine: Engine = IDEAL,
        shortcuts: Shortcuts = NONE,
        found: PrefixShare = PrefixShare(),  # noqa: B008
    ) -> None:
        card = replace(place.card, memory_nbytes=None)
        sharding = place.sharding if place.sharding != SINGLE else Sharding(tensor_parallel_size=place.num_cards)
        serving = Serving(place.weight_bits, engine=engine, sharding=sharding)
        self._share = sharding.data_parallel_size * sharding.pipeline_parallel_size
        output = max(1, round(lengths.mean_output))
        given = max(1, round(lengths.mean_context - output / 2))  # so that a step finds the mean context
        self.cached_tokens = found.tokens(given)
        load: dict[str, Any] = {
            "input_len": given,
            "output_len": output,
            "serving": serving,
            "cached_tokens": self.cached_tokens,
        }
        self._token = partial(token_step, model, method, card, **load)
        self._first = partial(first_token, model, method, card, **load)
        self._drafted = None
        if shortcuts.drafts is not None:
            tokens = given + output // 2
            self._drafted = partial(
                speculative_step, model, method, card, num_tokens=tokens, spec=shortcuts.drafts, serving=serving
            )
        mean, long = (
            prefill(model, card, 1, tokens, serving, cached_tokens=found.tokens(tokens)).seconds
            for tokens in (given, lengths.input_quantile(INPUT_SHARE))
        )
        self._longer = Band(*(one - other for one, other in zip(long, mean, strict=True)))

    def _output(self, batch_size: int) -> Step:
        """A token of an answer, at this batch."""
        step = self._token(batch_size=self._step(batch_size))
        return step if self._drafted is None else busy(step, self._drafted(batch_size=self._step(batch_size)))

    def tpot(self, batch_size: int) -> Band:
        """Time per output token."""
        return self._output(batch_size).seconds

    def ttft(self, batch_size: int) -> Band:
        """Time to the first token of a long prompt."""
        seconds = self._first(batch_size=self._step(batch_size)).seconds
        return Band(*(max(0.0, one + other) for one, other in zip(seconds, self._longer, strict=True)))

    def bound(self, batch_size: int) -> str:
        return self._output(batch_size).bound

    def _step(self, batch_size: int) -> int:
        """Requests in one step of one card."""
        return -(-batch_size // self._share)

    def within(self, batch_size: int, demand: Demand) -> bool:
        """Whether both limits hold at this batch."""
        slow = demand.slo_tpot is not None and self.tpot(batch_size).value > demand.slo_tpot
        late = demand.slo_ttft is not None and self.ttft(batch_size).value > demand.slo_ttft
        return not (slow or late)
