"""``kvsim plan``: the command line of :mod:`kvsim.analysis.plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from kvsim.analysis.memory_risk import OCCUPANCIES
from kvsim.analysis.plan import INPUT_SHARE, MAX_BATCH, RISK, Demand, Plan, plan
from kvsim.analysis.request_lengths import Lengths, constant
from kvsim.commandline import Command
from kvsim.commands.flags import WeightChoice, gathered, own_cache, weights_gathered
from kvsim.engines import ENGINES, IDEAL, EngineChoice, engine_fields, owner
from kvsim.hardware import Hardware, given, lowest
from kvsim.install import install_hint
from kvsim.layout import Method
from kvsim.memory.capacity import held_share
from kvsim.memory.sharding import Sharding
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.quantization import WEIGHT_DTYPES, kv_method
from kvsim.output import text
from kvsim.output.schema import envelope
from kvsim.specs import (
    choose_methods,
    milliseconds,
    parse_card,
    parse_engine_choice,
    parse_human,
    parse_lengths,
    parse_reserve,
    parse_seconds,
    parse_size,
)

WEIGHED = DEFAULT_SPECS["plan"]
LAYOUT = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "decode_context_parallel_size",
)
PAGED = owner("block_size")
"""The engine that --block-size chooses."""


@click.command("plan", cls=Command)
@click.option("--model", "model_name", required=True, help="Catalogue name, config.json, directory, or hub id.")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    required=True,
    help="CARD, or CARD:COUNT where COUNT cards share the model (else 1, 2, 4, 8 are tried, more where the weights do "
    "not fit). Repeatable.",
)
@click.option("--users", type=int, required=True, help="Requests in flight at once.")
@click.option("--slo-tpot", metavar="TIME", help="Longest time per output token: 30ms.")
@click.option("--slo-ttft", metavar="TIME", help="Longest time to the first token, of 95 % of the requests: 2s.")
@click.option("--input-len", default="2k", show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", default="512", show_default=True, help="Tokens of an answer.")
@click.option(
    "--lengths",
    "spec",
    help="lognormal:mean=2000,sigma=0.8[,output_mean=300,output_sigma=0.6][,max=32k], or a CSV trace.",
)
@click.option(
    "--max-model-len",
    help="Tokens at which requests are cut, as vLLM reads it: 32k is 32000.  [default: the model's positions]",
)
@click.option("--method", "specs", multiple=True, help=f"Cache method; repeatable.  [default: {', '.join(WEIGHED)}]")
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--kv-cache-dtype", "--kv-dtype", help="As vLLM's: one more method, by an engine's name.")
@click.option("--weight-dtype", help=f"Type of the layers' weights: {', '.join(WEIGHT_DTYPES)}.")
@click.option("--quantization", "-q", help="The same by vLLM's name: fp8, awq, gptq, mxfp4 ...")
@click.option("--price", type=float, help="Dollars a card-hour.  [default: the lowest of the dated list prices]")
@click.option("--risk", type=float, default=RISK, show_default=True, help="Accepted probability of too little memory.")
@click.option(
    "--occupancy",
    type=click.Choice(OCCUPANCIES),
    default="full",
    show_default=True,
    help="Requests at the end of their answers, or at random moments.",
)
@click.option("--engine", help=f"Whose bytes: {', '.join(ENGINES)}.  [default: ideal, or {PAGED} with --block-size]")
@click.option("--block-size", type=int, help="As vLLM's: tokens a block.")
@click.option("--reserve", help="Share of a card's memory held back.  [default: the engine's, else 10%]")
@click.option("--gpu-memory-utilization", type=float, help="As vLLM's: 1 - reserve.")
@click.option("--tensor-parallel-size", "-tp", type=click.IntRange(1), help="As vLLM's: share every layer.")
@click.option("--pipeline-parallel-size", "-pp", type=click.IntRange(1), help="As vLLM's: stages of layers.")
@click.option(
    "--data-parallel-size",
    "-dp",
    type=click.IntRange(1),
    help="As vLLM's: attention on so many, a mixture's experts shared.  [default of these four: all that suit]",
)
@click.option("--decode-context-parallel-size", "-dcp", type=click.IntRange(1), help="As vLLM's: share tokens.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=MAX_BATCH, help="As vLLM's: largest batch.")
@click.option("--max-cards", type=click.IntRange(1), help="Refuse plans with more cards.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@weights_gathered
@gathered("engine", lambda **given: _engine(**given), "engine", "block_size")
@gathered("layout", lambda **given: _layout(**given), *LAYOUT)
@gathered("lengths", lambda **given: _lengths(**given), "input_len", "output_len", "spec")
@gathered("held", lambda **given: _share(**given), "reserve", "gpu_memory_utilization")
def command(
    model_name: str,
    gpus: tuple[str, ...],
    users: int,
    slo_tpot: str | None,
    slo_ttft: str | None,
    lengths: Lengths,
    max_model_len: str | None,
    specs: tuple[str, ...],
    kv_cache_dtype: str | None,
    weights: WeightChoice,
    price: float | None,
    risk: float,
    occupancy: str,
    engine: str,
    held: float | None,
    layout: Sharding | None,
    max_num_seqs: int,
    max_cards: int | None,
    as_json: bool,
) -> int:
    """How many cards, which method and batch for so many users within these latencies, and at what price.

    Exit code 1 where no card and method meets the demand.
    """
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise ValueError(f"plan needs numpy: {install_hint('plan')}") from None
    if price is not None:
        given("", price)
    serving, cards = parse_engine_choice(engine, {}), _cards(gpus, layout)
    model = load_model(model_name)
    longest = parse_human(max_model_len, "max-model-len") if max_model_len is not None else model.max_positions
    lengths, notes = _cut(lengths, longest)
    slos = _seconds(slo_tpot, "slo-tpot"), _seconds(slo_ttft, "slo-ttft")
    demand = Demand(users, lengths, slos[0], slos[1], risk, occupancy)
    methods, said = _methods(model, specs, kv_cache_dtype, serving)
    notes += said
    ways = plan(
        model,
        methods,
        cards,
        demand,
        lambda card, num_cards: lowest(card.id, num_cards) if price is None else given(card.id, price),
        weight_bits=weights.bits,
        reserve=held,
        quantized=weights.quantized,
        engine=serving.on,
        max_cards=max_cards,
        max_num_seqs=max_num_seqs,
    )
    if as_json:
        inputs: dict[str, Any] = {"model": model.name}
        inputs["gpus"] = [{"card": card.id, "cards_per_replica": _count(given)} for card, given in cards]
        inputs["layout"] = layout.label if layout else None
        inputs |= _demand(demand) | {"max_model_len": longest, "weight_bits": weights.bits, "risk": risk}
        inputs |= {"occupancy": occupancy, "engine": engine, "reserve": held}
        click.echo(json.dumps(envelope("plan", inputs, notes) | {"rows": [_row(way) for way in ways]}, indent=2))
    else:
        click.echo("\n\n".join(_screen(model.name, demand, ways, notes)))
    return 0 if any(way.refusal is None for way in ways) else 1


def _engine(engine: str | None, block_size: int | None) -> str:
    """The engine's spec, of the one that has blocks where their size is given.

    Raises ``ValueError`` for a block size of another's.
    """
    if block_size is None:
        return engine or IDEAL.name
    name, colon, options = (engine or PAGED).partition(":")
    own = name.strip().lower()
    if own not in ENGINES or "block_size" not in engine_fields(own):
        raise ValueError(f"engine {name} has no --block-size: it is {PAGED}'s")
    return f"{own}:{options}{',' * bool(colon)}block_size={block_size}"


def _seconds(text: str | None, what: str) -> float | None:
    return parse_seconds(text, what) if text is not None else None


def _lengths(input_len: str, output_len: str, spec: str | None) -> Lengths:
    """The requests' lengths.  Raises ``ValueError``."""
    made = parse_size(output_len, "output-len")
    return parse_lengths(spec, made) if spec else constant(parse_size(input_len, "input-len"), made)


def _share(reserve: str | None, gpu_memory_utilization: float | None) -> float | None:
    """The share of a card's memory that is asked to be held back; ``None``: as the engine does."""
    held = parse_reserve(reserve) if reserve is not None else None
    return held if gpu_memory_utilization is None else held_share(None, held, gpu_memory_utilization)


def _layout(**sizes: int | None) -> Sharding | None:
    """The one layout that is weighed, where any size is given.  Raises ``ValueError`` for sizes that cannot be."""
    given = {name: size for name, size in sizes.items() if size is not None}
    return Sharding(**given) if given else None


def _cards(gpus: tuple[str, ...], layout: Sharding | None) -> list[tuple[Hardware, int | Sharding | None]]:
    """The cards, and how many of each share the model or how.

    Raises ``ValueError`` where two options say otherwise.
    """
    cards = [parse_card(gpu) for gpu in gpus]
    if layout is None:
        return [(card, count) for card, count in cards]
    for gpu, (_, count) in zip(gpus, cards, strict=True):
        if count not in (None, layout.ranks):
            raise ValueError(f"gpu {gpu!r}: {count} cards, but the parallel sizes ask for {layout.ranks}")
    return [(card, layout) for card, _ in cards]


def _methods(
    model: Model, specs: tuple[str, ...], kv_cache_dtype: str | None, engine: EngineChoice
) -> tuple[list[Method], list[str]]:
    """The methods that are weighed, and notes."""
    named, notes = list(specs), []
    if kv_cache_dtype is not None:
        own, said = own_cache(model, engine.on(None))
        named.append(kv_method(kv_cache_dtype, own or model.dtype))
        notes = said if kv_cache_dtype.lower() == "auto" else []
    return choose_methods(named or WEIGHED, {}, None)[0], notes


def _cut(lengths: Lengths, longest: int | None) -> tuple[Lengths, list[str]]:
    if longest is None:
        return lengths, []
    lengths, share = lengths.cut(longest)
    return lengths, [f"{share:.2%} of the requests are longer than {longest:,} tokens and cut there"] if share else []


def _demand(demand: Demand) -> dict[str, Any]:
    return {
        "users": demand.users,
        "lengths": demand.lengths.label,
        "slo_tpot_seconds": demand.slo_tpot,
        "slo_ttft_seconds": demand.slo_ttft,
    }


def _count(given: int | Sharding | None) -> int | None:
    return given.ranks if isinstance(given, Sharding) else given


def _row(way: Plan) -> dict[str, Any]:
    return {
        "method": way.method.name,
        "gpu": way.card.id,
        "cards_per_replica": way.cards_per_replica,
        "layout": way.sharding.label,
        "copies": way.copies,
        "fits": way.refusal is None,
        "refusal": way.refusal,
        "num_cards": way.num_cards,
        "num_replicas": way.num_replicas,
        "batch_per_replica": way.batch_size,
        "max_batch": way.max_batch,
        "batch_bound": way.batch_bound,
        "max_ctx": way.max_context,
        "tpot_seconds": way.tpot._asdict() if way.tpot else None,
        "ttft_seconds": way.ttft._asdict() if way.ttft else None,
        "bound": way.bound,
        "tokens_per_second": way.tokens_per_second,
        "out_of_memory_probability": way.runs_out,
        "usd_per_mtok": way.usd_per_mtok,
        "price": asdict(way.price) if way.price else None,
    }


def _screen(name: str, demand: Demand, ways: list[Plan], notes: list[str]) -> list[str]:
    limits = [
        f"{what} within {milliseconds(limit)} ms"
        for what, limit in (("a token", demand.slo_tpot), ("the first token", demand.slo_ttft))
        if limit is not None
    ]
    blocks = [f"{name}: {demand.users:,} users, {demand.lengths.label}" + "".join(f"; {limit}" for limit in limits)]
    good = [way for way in ways if way.refusal is None]
    if good:
        blocks += [_headline(good), _table(_best(good))]
    else:
        blocks.append("nothing meets this demand")
    refused = _refused(ways)
    if refused:
        blocks.append("\n".join(["Not possible:", *refused]))
    prices = dict.fromkeys(way.price.label for way in good if way.price)
    unpriced = dict.fromkeys(way.card.id for way in good if not way.price)
    lines = [
        "a token, first token: predicted times, each with its band (low to high)",
        "both count the prompts of the other requests",
        f"first token: of a long prompt; {INPUT_SHARE:.0%} of the prompts are no longer",
        f"P(out): probability, by convolution, that a replica's requests do not fit at once, each {_moment(demand)}",
        *_layout_notes(good),
        *(f"price: {label}" for label in prices),
        *(f"no price of {card} is listed: give --price" for card in unpriced),
        *notes,
    ]
    blocks.append(text.notes(lines))
    blocks.append(text.not_modelled_line("plan"))
    return blocks


def _place(way: Plan) -> str:
    """``8 x h200-sxm dp8 ep``; of one card, or of tensor parallel alone, the card and how many."""
    layout = way.sharding
    plain = layout == Sharding(layout.tensor_parallel_size) and way.copies == 1
    return f"{way.cards_per_replica} x {way.card.id}" + ("" if plain else f" {layout.label}")


def _headline(good: list[Plan]) -> str:
    best = good[0]
    cost = f", ${best.usd_per_mtok:.2f} a million output tokens" if best.usd_per_mtok else ""
    layout = f" ({best.sharding.label})" if best.cards_per_replica > 1 else ""
    return (
        f"{best.num_cards} x {best.card.id} with {best.method.name}: {best.num_replicas} "
        f"replica{'s' if best.num_replicas > 1 else ''} of {best.cards_per_replica}{layout}, "
        f"{best.tokens_per_second:,.0f} tokens/s{cost}"
    )


def _best(good: list[Plan]) -> list[Plan]:
    """Of the layouts of as many cards with one method the first, which is the cheapest."""
    first: dict[tuple[str, int, str], Plan] = {}
    for way in good:
        first.setdefault((way.card.id, way.cards_per_replica, way.method.name), way)
    return list(first.values())


def _refused(ways: list[Plan]) -> list[str]:
    """Why, once for all methods and layouts that are refused alike; not where another layout does it."""
    served = {(way.card.id, way.cards_per_replica, way.method.name) for way in ways if way.refusal is None}
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for way in ways:
        if way.refusal and (way.card.id, way.cards_per_replica, way.method.name) not in served:
            where = f"{way.cards_per_replica} x {way.card.id}"
            reasons.setdefault((where, way.refusal), {})[way.method.name] = None
    return [f"  {where}, {', '.join(methods)}: {reason}" for (where, reason), methods in reasons.items()]


def _layout_notes(good: list[Plan]) -> list[str]:
    """What the layouts are, and what tensor parallelism alone costs where it copies."""
    notes = []
    labels = {word.rstrip("0123456789") for way in _best(good) for word in way.sharding.label.split()}
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


def _moment(demand: Demand) -> str:
    return "at its full length" if demand.occupancy == "full" else "at a random moment of its answer"


def _table(ways: list[Plan]) -> str:
    heads = [
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
    ]
    return text.table(
        heads,
        (
            (
                f"{_place(way)} {way.method.name}",
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
            for way in ways
        ),
    )


def _band(band: Any) -> str:
    return f"{milliseconds(band.value)} ({milliseconds(band.low)}-{milliseconds(band.high)})"
