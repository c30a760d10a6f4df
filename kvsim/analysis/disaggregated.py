"""Prefill and decode on cards of their own: how many of each, the transfer of the cache, the time to the first token.

A request is prefilled on one side, its keys and values go over the network, and the other side decodes.  So a decode
step carries no prompts, and a prompt waits for prompts alone:

* **Decode**: the batch is limited by memory and by the time of a decode step, as in :mod:`kvsim.analysis.plan`.
* **Prefill**: a replica works on prompts one after the other.  Each replica is a queue with random arrivals (M/G/1):
  the wait is ``rate * E[s^2] / (2 (1 - load))``; a replica is loaded to :data:`LOAD` at the most.
* **Transfer**: the prompt's cache over the network of the prefill replica's cards, after the prefill (no overlap).
* **First token**: wait, prefill, transfer, and a decode step.

``users`` requests are in flight, of which so many are still before their first token as the times say.  Both sides are
of one card; every pair of their layouts is weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from kvsim.analysis.memory_risk import MemoryRisk
from kvsim.analysis.plan import INPUT_SHARE, MAX_BATCH, RANKS, Demand, NoRoomError, Site, layouts, site
from kvsim.analysis.shortcuts import NONE, Shortcuts
from kvsim.engines import IDEAL, Engine
from kvsim.hardware import Hardware, Price
from kvsim.latency.constants import constants
from kvsim.latency.exchange import NETWORK_BANDWIDTH, NETWORK_EFFICIENCY
from kvsim.latency.roofline import Serving
from kvsim.latency.speculation import speculative_step
from kvsim.latency.steps import Band, decode_step, prefill
from kvsim.layout import Method
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.models.model import Model
from kvsim.search import largest

LOAD = 0.8
"""Most of the time that a prefill replica works: beyond it the wait grows without bound."""
ROUNDS = 60


@dataclass(frozen=True)
class Disaggregation:
    """One way.  ``prefill``, ``decode``: how a replica's cards share the model, and the numbers of replicas.
    ``batch_size``: requests in a decode replica.  ``load``: share of the time that prefill works.
    """

    method: Method
    card: Hardware
    prefill: Sharding
    decode: Sharding
    num_prefill: int
    num_decode: int
    batch_size: int
    load: float
    transfer_seconds: float
    transfer_nbytes: int
    tpot: Band
    ttft: Band
    requests_per_second: float
    tokens_per_second: float
    usd_per_mtok: float | None = None
    price: Price | None = None

    @property
    def num_prefill_cards(self) -> int:
        return self.num_prefill * self.prefill.ranks

    @property
    def num_decode_cards(self) -> int:
        return self.num_decode * self.decode.ranks

    @property
    def num_cards(self) -> int:
        return self.num_prefill_cards + self.num_decode_cards


@dataclass(frozen=True)
class _Prefill:
    """A prefill replica: seconds that the mean prompt and a long one take, prompts a second, and a long one's cache."""

    sharding: Sharding
    mean: Band
    long: Band
    rate: float
    squared: float
    transfer_nbytes: int

    def wait(self, rate: float) -> float:
        """Mean seconds before a prompt's turn at ``rate`` prompts a second and replica."""
        return rate * self.squared / (2 * (1 - rate / self.rate)) if rate < self.rate else float("inf")

    def transfer(self) -> float:
        return self.transfer_nbytes / (NETWORK_BANDWIDTH * NETWORK_EFFICIENCY * self.sharding.tensor_parallel_size)


@dataclass(frozen=True)
class _Decode:
    """A decode replica: the largest batch, and the time of a step at a batch."""

    sharding: Sharding
    most: int
    step: Callable[[int], Band]


def apart(
    model: Model,
    methods: Sequence[Method],
    cards: Iterable[tuple[Hardware, int | None]],
    demand: Demand,
    price: Callable[[Hardware, int], Price | None],
    *,
    weight_bits: float | None = None,
    reserve: float | None = None,
    quantized: bool = False,
    engine: Callable[[Hardware, int], Engine] = lambda card, num_cards: IDEAL,
    shortcuts: Shortcuts = NONE,
) -> list[Disaggregation]:
    """For each card and method the cheapest pair of layouts, cheapest first (by price, else by cards).

    ``cards``, ``price``, ``engine``, ``weight_bits``, ``reserve``, ``quantized``, ``shortcuts``: as in
    :func:`kvsim.analysis.plan.plan`; prompts are found on the prefill side, drafts run on the other.  What cannot be is
    left out: ``plan`` says why.
    """
    found = []
    for card, given in dict.fromkeys(cards):
        sharded = [way for ranks in ((given,) if given else RANKS) for way in layouts(model, ranks, card.host_cards)]
        for method in methods:
            before: list[_Prefill] = []
            after: list[_Decode] = []
            for sharding in sharded:
                server = engine(card, sharding.ranks)
                try:
                    asked = (model, card, sharding.ranks, weight_bits, reserve, server, quantized, sharding)
                    before.append(_prefill_side(model, method, site(*asked), demand, server, shortcuts))
                    place = site(*asked, shortcuts)
                    after.append(_decode_side(model, method, place, demand, server, shortcuts))
                except (NoRoomError, ValueError):
                    continue
            ways = [way for one in before for other in after if (way := _pair(method, card, one, other, demand))]
            if ways:
                found.append(min((_priced(way, price) for way in ways), key=_cost))
    return sorted(found, key=_cost)


def _cost(way: Disaggregation) -> tuple[bool, float, int, float]:
    dollars = way.usd_per_mtok
    return dollars is None, dollars or 0.0, way.num_cards, way.ttft.value


def _priced(way: Disaggregation, price: Callable[[Hardware, int], Price | None]) -> Disaggregation:
    cost = price(way.card, way.num_cards)
    if cost is None:
        return way
    each = cost.usd_per_hour * way.num_cards / 3600 / way.tokens_per_second * 1e6
    return replace(way, price=cost, usd_per_mtok=each)


def _prefill_side(
    model: Model, method: Method, place: Site, demand: Demand, engine: Engine, shortcuts: Shortcuts
) -> _Prefill:
    lengths, sharding = demand.lengths, place.sharding
    serving = Serving(place.weight_bits, engine=engine, sharding=sharding)
    given, longest = max(1, round(lengths.mean_input)), lengths.input_quantile(INPUT_SHARE)
    found = shortcuts.found(Deployment(model, method, engine, sharding), place.cache_nbytes)
    mean, long = (
        prefill(model, place.card, 1, tokens, serving, cached_tokens=found.tokens(tokens), method=method).seconds
        for tokens in (given, longest)
    )
    beside = constants().prefill_seconds  # a wait, not work
    work = max(1e-9, mean.value - beside)
    spread = sum(weight * tokens**2 for tokens, _, weight in lengths.points) / lengths.mean_input**2
    at_once = sharding.data_parallel_size * sharding.pipeline_parallel_size
    one = replace(sharding, data_parallel_size=1, enable_expert_parallel=False)
    cache = Deployment(model, method, engine, one).rank_nbytes(1, longest)
    if cache > place.cache_nbytes:
        raise ValueError(f"no prompt of {longest:,} tokens fits beside the weights")
    nbytes = cache * one.tensor_parallel_size * one.pipeline_parallel_size
    return _Prefill(sharding, mean, long, at_once / work, spread * work**2 / at_once, nbytes)


def _decode_side(
    model: Model, method: Method, place: Site, demand: Demand, engine: Engine, shortcuts: Shortcuts
) -> _Decode:
    lengths, sharding = demand.lengths, place.sharding
    serving = Serving(place.weight_bits, engine=engine, sharding=sharding)
    replicas = sharding.data_parallel_size
    one = replace(sharding, data_parallel_size=1, enable_expert_parallel=False)
    cache = Deployment(shortcuts.held(model), method, engine, one)
    risk = MemoryRisk(cache.rank_nbytes, lengths, place.cache_nbytes, demand.occupancy)
    share = demand.risk if replicas == 1 else 1 - (1 - demand.risk) ** (1 / replicas)
    context, parts = max(1, round(lengths.mean_context)), replicas * sharding.pipeline_parallel_size

    def step(batch: int) -> Band:
        load = (model, method, place.card, -(-batch // parts), context)
        if shortcuts.drafts is not None:
            return speculative_step(*load, shortcuts.drafts, serving).seconds
        return decode_step(*load, serving).seconds

    most = min(MAX_BATCH, replicas * risk.most(share))
    most = largest(lambda batch: demand.slo_tpot is None or step(batch).value <= demand.slo_tpot, most)
    if not most:
        raise ValueError("no request fits, or no step is within the limit")
    return _Decode(sharding, most, step)


def _pair(method: Method, card: Hardware, one: _Prefill, other: _Decode, demand: Demand) -> Disaggregation | None:
    """The fewest replicas of each side that serve the demand; ``None`` where the first token is late even alone."""
    output, transfer = max(1.0, demand.lengths.mean_output), one.transfer()
    num_decode = -(-demand.users // other.most)
    batch = -(-demand.users // num_decode)
    tpot = other.step(batch)
    alone = one.long.value + transfer + tpot.value
    if demand.slo_ttft is not None and alone > demand.slo_ttft:
        return None
    rate = demand.users / (output * tpot.value + one.mean.value + transfer)
    num_prefill = max(1, -int(-rate // (LOAD * one.rate)))
    for _ in range(ROUNDS):
        each, first = _settled(demand.users, output * tpot.value + transfer, one, num_prefill)
        late = demand.slo_ttft is not None and first + alone - one.mean.value > demand.slo_ttft
        if each <= LOAD * one.rate and not late:
            break
        num_prefill += max(1, num_prefill // 4)
    else:
        return None
    wait = first - one.mean.value
    ttft = Band(*(wait + long + transfer + token for long, token in zip(one.long, tpot, strict=True)))
    requests = each * num_prefill
    return Disaggregation(
        method,
        card,
        one.sharding,
        other.sharding,
        num_prefill,
        num_decode,
        batch,
        each / one.rate,
        transfer,
        one.transfer_nbytes,
        tpot,
        ttft,
        requests,
        requests * output,
    )


def _settled(users: int, rest: float, one: _Prefill, num_prefill: int) -> tuple[float, float]:
    """Requests a second and prefill replica, and the mean seconds of wait and prefill, at which ``users`` are in flight
    (their wait grows with the rate, so there is one such rate)."""
    low, high = 0.0, one.rate * (1 - 1e-9)
    for _ in range(80):
        rate = (low + high) / 2
        inside = rate * num_prefill * (rest + one.mean.value + one.wait(rate))
        low, high = (rate, high) if inside < users else (low, rate)
    return low, one.mean.value + one.wait(low)
