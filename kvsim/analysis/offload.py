"""A cache that lies beside the card: seconds to load it from the host's memory, a drive or another host, against
computing it again, and against reading it from there at every step.

    load       latency + bytes of a card's share / its bandwidth
    recompute  the prefill of all tokens, alone

Loading pays from the length on at which it takes less than the prefill's arithmetic: a busy server's steps read the
weights anyhow.  Loading is by copy engines, and recomputing keeps the card busy; what a card-hour costs is charged to
the latter.  The bandwidths are shares of what is stated for a card's link to its host, an NVMe drive of PCIe 4 and an
adapter of 400 Gb/s: stated, not measured here.  Loading is not overlapped with computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.engines import IDEAL, Engine
from kvsim.hardware import Hardware
from kvsim.latency.constants import constants
from kvsim.latency.exchange import NETWORK_BANDWIDTH, NETWORK_EFFICIENCY
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.steps import Band, prefill
from kvsim.layout import Method, mean_read_nbytes
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import placed
from kvsim.models.model import Model
from kvsim.search import largest

HOST_LINK = {
    "volta": 16e9,
    "turing": 16e9,
    "ampere": 32e9,
    "ada": 32e9,
    "hopper": 64e9,
    "blackwell": 64e9,
    "blackwell-ultra": 64e9,
    "cdna2": 32e9,
    "cdna3": 64e9,
    "cdna4": 64e9,
    "rdna3": 32e9,
}
"""Bytes a second and direction of 16 lanes of the PCIe generation of an architecture: 3, 4 or 5."""
COHERENT = {"gh200-144gb": 450e9, "gb200": 450e9, "gb300": 450e9}
"""Of cards with a coherent link to their host (NVLink-C2C, 900 GB/s both ways)."""
LINK_EFFICIENCY = 0.8
TIERS = ("cpu", "nvme", "remote")
NVME_BANDWIDTH = 7e9
LATENCY = {"cpu": 20e-6, "nvme": 200e-6, "remote": 100e-6}
"""Seconds before the first byte."""
LONGEST = 1 << 24


@dataclass(frozen=True)
class Tier:
    """Where the cache lies, and the bytes a second that each card gets of it."""

    name: str
    bandwidth: float

    def seconds(self, nbytes: float) -> float:
        return LATENCY[self.name] + nbytes / self.bandwidth


@dataclass(frozen=True)
class Offload:
    """One method and context in one tier: bytes over all cards, seconds to ``load`` and to ``recompute``, the fewest
    tokens from which loading takes less than their arithmetic (``None``: never), seconds a step that reads the cache
    from there, and US dollars of card time that a load saves."""

    tier: Tier
    method: Method
    num_tokens: int
    nbytes: int
    load_seconds: float
    recompute: Band
    sooner_from: int | None
    step_seconds: float
    usd_saved: float | None

    @property
    def gain(self) -> float:
        """How many times sooner."""
        return self.recompute.value / self.load_seconds


def tier(name: str, card: Hardware, bandwidth: float | None = None) -> Tier:
    """A tier at ``bandwidth`` bytes a second and card, else at what is stated for it.

    Raises ``ValueError`` for another name, or where the card's link to its host is not known.
    """
    if name not in TIERS:
        raise ValueError(f"tier {name[:40]!r}: allowed are {', '.join(TIERS)}")
    if bandwidth is not None:
        return Tier(name, bandwidth)
    if name == "remote":
        return Tier(name, NETWORK_BANDWIDTH * NETWORK_EFFICIENCY)
    if name == "nvme":
        return Tier(name, NVME_BANDWIDTH)
    link = COHERENT.get(card.id) or HOST_LINK.get(card.arch)
    if link is None:
        raise ValueError(f"tier cpu: the link of {card.id} to its host is not known, give cpu=GB/s")
    return Tier(name, link * LINK_EFFICIENCY)


def offload(
    model: Model,
    method: Method,
    card: Hardware,
    tiers: Sequence[Tier],
    num_tokens: int,
    *,
    num_cards: int = 1,
    weight_bits: float | None = None,
    engine: Engine = IDEAL,
    usd_per_hour: float | None = None,
) -> list[Offload]:
    """One sequence of ``num_tokens`` tokens in each tier, on ``num_cards`` cards that share the model.

    Raises ``ValueError`` where the method cannot hold the model or the card's figures are not known.
    """
    sharding = Sharding(tensor_parallel_size=num_cards)
    cache = Deployment(model, method, engine, sharding)
    serving = Serving(weight_bits, engine=engine, sharding=sharding)
    roofline = Roofline(model, card, serving)

    def recompute(tokens: int) -> Band:
        band, waits = prefill(model, card, 1, tokens, serving).seconds, constants().prefill_seconds
        share = (band.value - waits) / band.value  # the constant wait of a first token is both's
        return Band(*(seconds * share for seconds in band))

    again = recompute(num_tokens)
    held = engine.held(model)
    read = sum(
        count * mean_read_nbytes(chosen, layer, 1, num_tokens)
        for (layer, chosen), count in placed(method, held.cache_layers).items()
    )
    share = cache.rank_nbytes(1, num_tokens) / Deployment(model, method, engine).rank_nbytes(1, num_tokens)
    out = []
    for place in tiers:

        def later(tokens: int, place: Tier = place) -> bool:
            return place.seconds(cache.rank_nbytes(1, tokens)) >= roofline.prompt(1, tokens, tokens)[0]

        most = largest(later, LONGEST)
        load = place.seconds(cache.rank_nbytes(1, num_tokens))
        spared = None if usd_per_hour is None else max(0.0, again.value) * num_cards * usd_per_hour / 3600
        out.append(
            Offload(
                place,
                method,
                num_tokens,
                cache.all_nbytes(1, num_tokens),
                load,
                again,
                None if most == LONGEST else most + 1,
                place.seconds(read * share),
                spared,
            )
        )
    return out
