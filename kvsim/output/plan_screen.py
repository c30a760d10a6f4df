"""The screen of ``kvsim plan``: the cheapest ways, what cannot be, and what the figures rest on."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from kvsim.analysis.disaggregated import Disaggregation
from kvsim.analysis.plan import INPUT_SHARE, Demand, Plan
from kvsim.memory.sharding import Sharding
from kvsim.output import text
from kvsim.specs import milliseconds, parse_seconds

NOT_APART = "Prefill and decode on cards of their own: nothing meets this demand"


def blocks(
    name: str,
    demand: Demand,
    ways: list[Plan],
    notes: list[str],
    divided: list[Disaggregation] | None = None,
    near: Sequence[str] = (),
) -> list[str]:
    """The screen: what was asked, the headline (``near``: what would do where nothing does), the cheapest ways,
    refusals, notes."""
    out = [f"{name}: {asked(demand)}"]
    good = [way for way in ways if way.refusal is None]
    if good:
        out += [headline(good), text.table(HEADS, map(cells, cheapest_ways(good)))]
    else:
        out.append("\n".join(["nothing meets this demand", *near]))
    if divided is not None:
        out += ["Prefill and decode on cards of their own:", _divided(divided)] if divided else [NOT_APART]
    refused = refused_ways(ways)
    if refused:
        out.append("\n  ".join(["Not possible:", *refused]))
    out.append(text.notes([*explained(demand, good), *notes]))
    out.append(text.not_modelled_line("plan"))
    return out


def asked(demand: Demand) -> str:
    """Users, lengths and limits in a line."""
    limits = [
        f"{what} within {milliseconds(limit)} ms"
        for what, limit in (("a token", demand.slo_tpot), ("the first token", demand.slo_ttft))
        if limit is not None
    ]
    return f"{demand.users:,} users, {demand.lengths.label}" + "".join(f"; {limit}" for limit in limits)


def explained(demand: Demand, good: list[Plan]) -> list[str]:
    """What the columns mean and the figures rest on."""
    others = {way.card.id: way.card.vendor for way in good if way.card.vendor != "nvidia"}.items()
    prices: dict[str, list[str]] = {}
    for way in good:
        if way.price:
            prices.setdefault(way.price.label, []).append(way.card.id)
    return [
        "a token, first token: predicted times, each with its band (low to high)",
        "both count the prompts of the other requests",
        f"first token: of a long prompt; {INPUT_SHARE:.0%} of the prompts are no longer",
        f"P(out): probability, by convolution, that a replica's requests do not fit at once, each {_moment(demand)}",
        *_layout_notes(good),
        *(f"{card}: no card of {vendor}'s was timed, its shares of peaks are nvidia's" for card, vendor in others),
        *(f"price of {', '.join(dict.fromkeys(cards))}: {label}" for label, cards in prices.items()),
        *_unpriced(good),
    ]


def would_do(demand: Demand, found: tuple[Demand, Plan] | None) -> list[str]:
    """What would be met, and by what, where the demand is not: the flags to give."""
    if found is None:
        return []
    near, way = found
    flags = [
        f"--{name.replace('_', '-')} {time_text(limit)}"
        for name in ("slo_tpot", "slo_ttft")
        if (limit := getattr(near, name)) is not None and limit != getattr(demand, name)
    ]
    return [f"{' '.join(flags)} would do: {headline([way])}"]


def time_text(seconds: float) -> str:
    """As ``--slo-tpot`` reads it back: ``45.7ms``, ``3s``."""
    short = f"{seconds:g}s" if seconds >= 1 else f"{seconds * 1e3:.6g}ms"
    return short if "e" not in short and parse_seconds(short, "time") == seconds else f"{Decimal(repr(seconds)):f}s"


def place(way: Plan) -> str:
    """``8 x h200-sxm dp8 ep``; of one card, or of tensor parallel alone, the card and how many."""
    layout = way.sharding
    plain = layout == Sharding(layout.tensor_parallel_size) and way.copies == 1
    return f"{way.cards_per_replica} x {way.card.id}" + ("" if plain else f" {layout.label}")


def _unpriced(good: list[Plan]) -> list[str]:
    """What each card without a price needs, by the fewest cards."""
    fewest: dict[str, Plan] = {}
    for way in good:
        if not way.price and way.num_cards < fewest.get(way.card.id, way).num_cards + (way.card.id not in fewest):
            fewest[way.card.id] = way
    return [
        f"no price of {card} is listed: {way.num_cards} would do it ({place(way)}, {way.method.name}); give --price "
        f"{card}=DOLLARS"
        for card, way in fewest.items()
    ]


def headline(good: Sequence[Plan]) -> str:
    """The first, which is the cheapest of those with a price."""
    best = good[0]
    cost = f", ${best.usd_per_mtok:.2f} a million output tokens" if best.usd_per_mtok else ""
    some = best.price is not None and not all(way.price for way in good)
    layout = f" ({best.sharding.label})" if best.cards_per_replica > 1 else ""
    return ("cheapest of the cards with a price: " if some else "") + (
        f"{best.num_cards} x {best.card.id} with {best.method.name}: {best.num_replicas} "
        f"replica{'s' if best.num_replicas > 1 else ''} of {best.cards_per_replica}{layout}, "
        f"{best.tokens_per_second:,.0f} tokens/s{cost}"
    )


def cheapest_ways(good: list[Plan]) -> list[Plan]:
    """Of the layouts of as many cards with one method the first, which is the cheapest."""
    first: dict[tuple[str, int, str], Plan] = {}
    for way in good:
        first.setdefault((way.card.id, way.cards_per_replica, way.method.name), way)
    return list(first.values())


def refused_ways(ways: list[Plan]) -> list[str]:
    """Why, once for all methods and layouts that are refused alike; not where another layout does it."""
    served = {(way.card.id, way.cards_per_replica, way.method.name) for way in ways if way.refusal is None}
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for way in ways:
        if way.refusal and (way.card.id, way.cards_per_replica, way.method.name) not in served:
            where = f"{way.cards_per_replica} x {way.card.id}"
            reasons.setdefault((where, way.refusal), {})[way.method.name] = None
    return [f"{where}, {', '.join(methods)}: {reason}" for (where, reason), methods in reasons.items()]


def _layout_notes(good: list[Plan]) -> list[str]:
    """What the layouts are, and what tensor parallelism alone costs where it copies."""
    notes = []
    labels = {word.rstrip("0123456789") for way in cheapest_ways(good) for word in way.sharding.label.split()}
    if "dp" in labels:
        notes.append("dp: data-parallel attention, each card with requests of its own; ep: experts over all cards")
    if any(way.cards_per_replica > way.card.host_cards for way in good):
        notes.append("between hosts 400 Gb/s a card are taken")
    way = max(good, key=lambda each: each.copies, default=None)
    if way is not None and way.copies > 1:
        rest = (each for each in good if (each.card, each.method) == (way.card, way.method) and each.copies == 1)
        best = next(rest, None)
        instead = (
            f"; {best.sharding.label}, which copies none, {best.num_cards}" if best else ": -dp or -dcp copies none"
        )
        notes.append(
            f"tensor parallelism alone ({way.sharding.label}) puts the same keys and values (a latent, or a head) on "
            f"{way.copies} cards: with {way.method.name} it needs {way.num_cards} x {way.card.id}{instead}"
        )
    return notes


def _divided(ways: list[Disaggregation]) -> str:
    heads = ["plan", "cards", "prefill", "load", "decode", "batch", "transfer ms", "ms a token", "first token ms"]
    return text.table(
        [*heads, "tok/s", "$/Mtok"],
        (
            (
                f"{way.card.id} {way.method.name}",
                f"{way.num_cards:,}",
                f"{way.num_prefill:,} x {way.prefill.label or 1}",
                f"{way.load:.0%}",
                f"{way.num_decode:,} x {way.decode.label or 1}",
                f"{way.batch_size:,}",
                milliseconds(way.transfer_seconds),
                _band(way.tpot),
                _band(way.ttft),
                f"{way.tokens_per_second:,.0f}",
                f"{way.usd_per_mtok:.3f}" if way.usd_per_mtok else "-",
            )
            for way in ways
        ),
    )


def _moment(demand: Demand) -> str:
    return "at its full length" if demand.occupancy == "full" else "at a random moment of its answer"


HEADS = (
    "plan",
    "cards",
    "batch",
    "most",
    "bound",
    "max ctx",
    "ms a token",
    "first token ms",
    "tok/s",
    "P(out)",
    "$/Mtok",
)


def cells(way: Plan) -> tuple[str, ...]:
    """A way under :data:`HEADS`."""
    return (
        f"{place(way)} {way.method.name}",
        f"{way.num_cards:,}",
        f"{way.batch_size:,}",
        f"{way.max_batch:,}",
        way.batch_bound,
        f"{way.max_context:,}",
        _band(way.tpot),
        _band(way.ttft),
        f"{way.tokens_per_second:,.0f}",
        f"{way.runs_out:.1g}" if way.runs_out else "0",
        f"{way.usd_per_mtok:.3f}" if way.usd_per_mtok else "-",
    )


def _band(band: Any) -> str:
    return f"{milliseconds(band.value)} ({milliseconds(band.low)}-{milliseconds(band.high)})"
