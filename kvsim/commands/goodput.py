"""``kvsim goodput``: the command line of :mod:`kvsim.analysis.arrivals`."""

from __future__ import annotations

import json
from typing import Any

import click

from kvsim.analysis.arrivals import MAX_SEQS, SHARE, WARM, Server, ServiceLevel, at_rate, drawn, most_at
from kvsim.analysis.plan import site
from kvsim.analysis.request_lengths import Lengths, constant
from kvsim.commandline import Command
from kvsim.commands.flags import WeightChoice, gathered, show, weights_gathered
from kvsim.commands.model_choice import cards, model_option
from kvsim.engines import ENGINES, Engine
from kvsim.hardware import Hardware, Price, given, lowest
from kvsim.layout import Method
from kvsim.memory.sharding import Sharding
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.quantization import WEIGHT_DTYPES
from kvsim.output import text
from kvsim.output.schema import envelope
from kvsim.specs import (
    brief,
    choose_methods,
    milliseconds,
    parse_card,
    parse_lengths,
    parse_reserve,
    parse_seconds,
    parse_serving,
    parse_share,
    parse_size,
    rows_of,
)
from kvsim.whole_numbers import LARGEST

WEIGHED = ("fp16", "fp8")
AROUND = (0.5, 0.8, 1.1)
"""Rates that are shown beside the highest, over it."""


@click.command("goodput", cls=Command)
@model_option
@click.option(
    "--gpu", required=True, help="CARD, or CARD:COUNT where COUNT cards share the model.", shell_complete=cards
)
@click.option("--slo-ttft", metavar="TIME", help="Longest time to the first token: 2s.")
@click.option("--slo-tpot", metavar="TIME", help="Longest time per output token: 30ms.")
@click.option("--share", default=f"{SHARE:.0%}", show_default=True, help="Requests that must keep both.")
@click.option("--rate", "rates", help="Requests a second, commas between several.  [default: around the highest]")
@click.option("--input-len", default="2k", show_default=True, help="Tokens of a prompt.")
@click.option("--output-len", default="512", show_default=True, help="Tokens of an answer.")
@click.option("--lengths", "spec", help="As in plan: lognormal:mean=2000,sigma=0.8, or a CSV trace.")
@click.option("--method", "specs", multiple=True, help=f"Cache method; repeatable.  [default: {', '.join(WEIGHED)}]")
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--weight-dtype", help=f"Type of the layers' weights: {', '.join(WEIGHT_DTYPES)}.")
@click.option("--quantization", "-q", help="The same by vLLM's name: fp8, awq, gptq, mxfp4 ...")
@click.option("--engine", default="ideal", show_default=True, help=f"Whose bytes: {', '.join(ENGINES)}.")
@click.option("--reserve", help="Share of a card's memory held back.  [default: the engine's, else 10%]")
@click.option("--data-parallel-size", "-dp", type=click.IntRange(1), default=1, help="As vLLM's; experts are shared.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=MAX_SEQS, help="As vLLM's: most that run at once.")
@click.option("--requests", type=click.IntRange(20, 100_000), default=400, show_default=True, help="Simulated a rate.")
@click.option("--seed", type=click.IntRange(0, LARGEST), default=0, show_default=True, help="Of the arrivals.")
@click.option("--price", type=float, help="Dollars a card-hour.  [default: the lowest of the dated list prices]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@weights_gathered
@gathered("limits", lambda **given: tuple(_limit(*pair) for pair in given.items()), "slo_ttft", "slo_tpot")
@gathered("lengths", lambda **given: _lengths(**given), "input_len", "output_len", "spec")
@gathered("sample", lambda **given: (given["requests"], given["seed"]), "requests", "seed")
def command(
    model_name: str,
    gpu: str,
    limits: tuple[float | None, float | None],
    share: str,
    rates: str | None,
    lengths: Lengths,
    specs: tuple[str, ...],
    weights: WeightChoice,
    engine: str,
    reserve: str | None,
    data_parallel_size: int,
    max_num_seqs: int,
    sample: tuple[int, int],
    price: float | None,
    as_json: bool,
) -> int:
    """The rate of requests that arrive at random which a server takes within these latencies, by simulation.

    Exit code 1 where no method serves even one request in time.
    """
    card, count = parse_card(gpu)
    model, least = load_model(model_name), parse_share(share, "share")
    if not 0 < least <= 1:
        raise ValueError(f"share {brief(share)}: allowed are above 0% to 100%")
    place = _Place(model, card, _sharding(count, data_parallel_size, gpu), weights, reserve, engine, max_num_seqs)
    cost = lowest(card.id, place.sharding.ranks) if price is None else given(card.id, price)
    asked = _rates(rates)

    def served(method: Method) -> list[tuple[Method, ServiceLevel, bool]]:
        return [(method, *row) for row in _served(place.server(method), lengths, sample, limits, least, asked, place)]

    rows, notes = rows_of(choose_methods(specs or WEIGHED, {}, None)[0], served, model.name, named=bool(specs))
    if model.max_positions is not None and lengths.longest > model.max_positions:
        notes.append(f"{lengths.longest:,} tokens are beyond the model's {model.max_positions:,} positions")
    notes += [
        f"{sample[0]:,} requests a rate, seed {sample[1]}; the first {WARM:.0%} fill the server and are not counted",
        *([f"price: {cost.label}"] if cost else []),
    ]
    if as_json:
        inputs: dict[str, Any] = {"model": model.name, "gpu": card.id, "layout": place.sharding.label}
        inputs |= {"lengths": lengths.label, "slo_ttft_seconds": limits[0], "slo_tpot_seconds": limits[1]}
        inputs |= {"share": least, "requests": sample[0], "seed": sample[1], "engine": place.engine.name}
        out = envelope("goodput", inputs, notes)
        click.echo(json.dumps(out | {"rows": [_row(*row, place, cost) for row in rows]}, indent=2))
    else:
        title = f"{model.name} on {place.sharding.ranks} x {card.id}: {lengths.label}; {_asked(limits, least)}"
        show(title, _table(rows, place, cost), text.notes(notes), text.not_modelled_line("goodput"))
    return 0 if any(served.share >= least for _, served, _ in rows) else 1


class _Place:
    """Where the requests are served."""

    def __init__(
        self,
        model: Model,
        card: Hardware,
        sharding: Sharding,
        weights: WeightChoice,
        reserve: str | None,
        engine: str,
        max_num_seqs: int,
    ) -> None:
        self.model, self.sharding, self.max_num_seqs = model, sharding, max_num_seqs
        self.engine: Engine = parse_serving(engine, card, sharding.ranks)
        held = parse_reserve(reserve) if reserve is not None else None
        self.site = site(model, card, sharding.ranks, weights.bits, held, self.engine, weights.quantized, sharding)

    def server(self, method: Method) -> Server:
        return Server(self.model, method, self.site, self.engine, self.max_num_seqs)


def _served(
    server: Server,
    lengths: Lengths,
    sample: tuple[int, int],
    limits: tuple[float | None, float | None],
    least: float,
    asked: list[float],
    place: _Place,
) -> list[tuple[ServiceLevel, bool]]:
    """What a method serves at each rate, by rate, and whether that is the highest within the limits."""
    draws, replicas = drawn(lengths, *sample), place.sharding.data_parallel_size
    if asked:
        return [(at_rate(server, draws, rate / replicas, *limits), False) for rate in sorted(asked)]
    best = most_at(server, draws, *limits, least)
    if best is None:
        return [(at_rate(server, draws, 1e-3, *limits), False)]
    others = [at_rate(server, draws, best.rate * share, *limits) for share in AROUND]
    return sorted([(best, True), *((other, False) for other in others)], key=lambda row: row[0].rate)


def _sharding(count: int | None, data_parallel: int, gpu: str) -> Sharding:
    cards = count or data_parallel
    if cards % data_parallel:
        raise ValueError(f"gpu {gpu!r}: {cards} cards, --data-parallel-size {data_parallel} does not divide them")
    return Sharding(cards // data_parallel, data_parallel_size=data_parallel)


def _limit(name: str, value: str | None) -> float | None:
    return None if value is None else parse_seconds(value, name.replace("_", "-"))


def _lengths(input_len: str, output_len: str, spec: str | None) -> Lengths:
    made = parse_size(output_len, "output-len")
    return parse_lengths(spec, made) if spec is not None else constant(parse_size(input_len, "input-len"), made)


def _rates(given: str | None) -> list[float]:
    try:
        rates = [float(part) for part in given.split(",")] if given is not None else []
    except ValueError:
        rates = [0.0]
    if not all(1e-6 <= rate <= 1e6 for rate in rates):
        raise ValueError(f"rate {brief(given or '')}: allowed are requests a second, such as 0.5,2,8")
    return rates


def _asked(limits: tuple[float | None, float | None], least: float) -> str:
    words = [
        f"{what} within {milliseconds(limit)} ms"
        for what, limit in zip(("the first token", "a token"), limits, strict=True)
        if limit is not None
    ]
    return f"{' and '.join(words)} for {least:.0%}" if words else "no limits"


def _dollars(served: ServiceLevel, place: _Place, cost: Price | None) -> float | None:
    tokens = served.tokens_per_second * place.sharding.data_parallel_size
    return None if cost is None else cost.usd_per_hour * place.sharding.ranks / 3600 / tokens * 1e6


def _row(method: Method, served: ServiceLevel, highest: bool, place: _Place, cost: Price | None) -> dict[str, Any]:
    replicas = place.sharding.data_parallel_size
    return {
        "method": method.name,
        "requests_per_second": served.rate * replicas,
        "highest": highest,
        "share": served.share,
        "ttft_median_seconds": served.first[0],
        "ttft_p95_seconds": served.first[1],
        "tpot_median_seconds": served.token[0],
        "tpot_p95_seconds": served.token[1],
        "mean_decoding": served.mean_decoding * replicas,
        "preempted": served.preempted,
        "tokens_per_second": served.tokens_per_second * replicas,
        "usd_per_mtok": _dollars(served, place, cost),
    }


def _table(rows: list[tuple[Method, ServiceLevel, bool]], place: _Place, cost: Price | None) -> str:
    heads = ["method", "requests/s", "kept", "first ms, median", "95%", "token ms, median", "95%", "decoding"]
    replicas = place.sharding.data_parallel_size

    def line(method: Method, served: ServiceLevel, highest: bool) -> tuple[str, ...]:
        dollars = _dollars(served, place, cost)
        return (
            method.name,
            f"{served.rate * replicas:,.3g}" + (" highest" if highest else ""),
            f"{served.share:.0%}",
            *(milliseconds(seconds) for seconds in (*served.first, *served.token)),
            f"{served.mean_decoding * replicas:,.3g}",
            f"{served.preempted:,}",
            f"{served.tokens_per_second * replicas:,.0f}",
            f"{dollars:.3f}" if dollars else "-",
        )

    return text.table([*heads, "preempted", "tok/s", "$/Mtok"], (line(*row) for row in rows))
