"""``kvsim breakeven``: the command line of :mod:`kvsim.analysis.breakeven`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from kvsim.analysis.breakeven import NOT_MODELLED, BreakEven, Runner, by_batch, by_context, by_money
from kvsim.analysis.plan import NoRoomError
from kvsim.commandline import Command
from kvsim.engines import ENGINES
from kvsim.hardware import Price, given, lowest
from kvsim.models.load import load_model
from kvsim.output import text
from kvsim.specs import (
    check_weight_bits,
    choose_methods,
    left_out,
    milliseconds,
    parse_card,
    parse_reserve,
    parse_serving,
    parse_share,
    parse_sizes,
)

METHODS = ("fp8", "kivi:nbits=4", "kivi:nbits=2")
AGAINST = ("fp16", "fp8")


@click.command("breakeven", cls=Command)
@click.option("--model", "model_name", required=True, help="Catalogue name, config.json, directory, or hub id.")
@click.option("--gpu", required=True, help="CARD, or CARD:COUNT where COUNT cards share the model.")
@click.option("--method", "specs", multiple=True, help=f"Method; repeatable.  [default: {', '.join(METHODS)}]")
@click.option("--against", multiple=True, help=f"Method to beat; repeatable.  [default: {', '.join(AGAINST)}]")
@click.option("--batch", default="1,8,64", show_default=True, help="Sequences, commas between several.")
@click.option("--ctx", default="4k,32k,128k", show_default=True, help="Tokens a sequence, commas between several.")
@click.option("--margin", default="1%", show_default=True, help="Faster, or cheaper, by at least so much.")
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--price", type=float, help="Dollars a card-hour.  [default: the lowest of the dated list prices]")
@click.option("--engine", default="ideal", show_default=True, help=f"Whose bytes and kernels: {', '.join(ENGINES)}.")
@click.option("--reserve", help="Share of a card's memory held back.  [default: the engine's, else 10%]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model_name: str,
    gpu: str,
    specs: tuple[str, ...],
    against: tuple[str, ...],
    batch: str,
    ctx: str,
    margin: str,
    weight_bits: float | None,
    price: float | None,
    engine: str,
    reserve: str | None,
    as_json: bool,
) -> int:
    """From which context and batch a method pays, in tokens a second and in money.

    Exit code 1 where the weights alone do not fit.
    """
    card, count = parse_card(gpu)
    ranks = count or 1
    batches, contexts = parse_sizes(batch, "batch"), parse_sizes(ctx)
    methods = choose_methods(specs or METHODS, {}, None)[0]
    others = choose_methods(against or AGAINST, {}, None)[0]
    cost = lowest(card.id, ranks) if price is None else given(card.id, price)
    model, chosen, share = load_model(model_name), parse_serving(engine, card, ranks), None
    if reserve is not None:
        share = parse_reserve(reserve)
    least = parse_share(margin, "margin")
    check_weight_bits(weight_bits)
    runners: dict[str, Runner] = {}
    refusal = ""
    reasons: dict[str, str] = {}
    for method in (*methods, *others):
        try:
            runners[method.name] = Runner(model, method, card, ranks, weight_bits, share, chosen)
        except NoRoomError as error:
            refusal = f"{model.name} on {ranks} x {card.id}: {error}"
            break
        except ValueError as error:
            if specs or against:
                raise
            reasons[method.name] = str(error)
    notes = [refusal] if refusal else left_out(reasons)
    pairs = [
        (runners[method.name], runners[other.name])
        for method in methods
        for other in others
        if method.name in runners and other.name in runners and method != other
    ]
    if not pairs and not refusal:
        raise ValueError("; ".join(notes) or "no method to compare: --method and --against are the same")
    rows = [
        row
        for one, other in pairs
        for row in (
            *(by_context(one, other, each, least) for each in batches),
            *(by_batch(one, other, each, least) for each in contexts),
            by_money(one, other, least),
        )
    ]
    if as_json:
        inputs: dict[str, Any] = {
            "model": model.name,
            "gpu": card.id,
            "cards": ranks,
            "batch": batches,
            "ctx": contexts,
        }
        inputs |= {"engine": engine, "reserve": share, "weight_bits": weight_bits, "margin": least}
        document: dict[str, Any] = {"schema": "kvsim.breakeven/1", "inputs": inputs, "notes": notes}
        document["not_modelled"] = NOT_MODELLED
        document["price"] = asdict(cost) if cost else None
        document["rates"] = [_rate(runner, each, cost, ranks) for runner in runners.values() for each in contexts]
        click.echo(json.dumps(document | {"rows": [_row(row) for row in rows]}, indent=2))
        return 1 if refusal else 0
    if refusal:
        click.echo(f"{refusal}\n\nNot modelled: {'; '.join(NOT_MODELLED)}.")
        return 1
    if model.max_positions and contexts[-1] > model.max_positions:
        notes.append(f"contexts beyond the model's {model.max_positions:,} positions are compared all the same")
    blocks = [
        f"{model.name} on {ranks} x {card.id}: where a method pays",
        f"Faster by {least:.1%} or more of the time with fewer bytes read, at one batch and context (decode steps):\n\n"
        + _faster([row for row in rows if row.kind == "context"], "batch", "from tokens")
        + "\n\n"
        + _faster([row for row in rows if row.kind == "batch"], "tokens", "from batch"),
        f"Cheaper by {least:.1%} or more, each with the largest batch that fits:\n\n"
        + _cheaper([row for row in rows if row.kind == "money"]),
        _rates(runners, contexts, cost, ranks),
        text.notes([*notes, _price_note(card.id, cost)]),
        "Not modelled: " + "; ".join(NOT_MODELLED) + ".",
    ]
    click.echo("\n\n".join(blocks))
    return 0


def _price_note(card: str, cost: Price | None) -> str:
    return f"price: {cost.label}" if cost else f"no price of {card} is listed: give --price"


def _row(row: BreakEven) -> dict[str, Any]:
    return {
        "method": row.method.name,
        "against": row.against.name,
        "kind": row.kind,
        "batch": row.batch_size,
        "ctx": row.num_tokens,
        "pays_from": row.first,
        "pays": row.pays,
        "method_fits_to": row.last,
        "against_fits_to": row.against_last,
    }


def _rate(runner: Runner, tokens: int, cost: Price | None, ranks: int) -> dict[str, Any]:
    batch, rate = runner.max_batch(tokens), runner.best_rate(tokens)
    seconds = runner.seconds(batch, tokens)._asdict() if batch else None
    return {
        "method": runner.method.name,
        "ctx": tokens,
        "max_batch": batch,
        "tpot_seconds": seconds,
        "tokens_per_second": rate,
        "usd_per_mtok": _dollars(rate, cost, ranks),
    }


def _dollars(rate: float, cost: Price | None, ranks: int) -> float | None:
    return cost.usd_per_hour * ranks / 3600 / rate * 1e6 if cost and rate else None


def _where(row: BreakEven) -> str:
    """``7,010 on``; ``1 to 300, 7,010 on``; ``never``."""
    parts = [f"{start:,} on" if end == row.last else f"{start:,} to {end:,}" for start, end in row.pays]
    return ", ".join("always" if part == "1 on" else part for part in parts) or "never"


def _faster(rows: list[BreakEven], fixed: str, head: str) -> str:
    return text.table(
        ["method", "against", fixed, head, "fits to", "against fits to"],
        (
            (
                row.method.name,
                row.against.name,
                f"{row.batch_size or row.num_tokens or 0:,}",
                _where(row) if row.last else "does not fit",
                f"{row.last:,}",
                f"{row.against_last:,}",
            )
            for row in rows
        ),
        left=(0, 1),
    )


def _cheaper(rows: list[BreakEven]) -> str:
    return text.table(
        ["method", "against", "from tokens", "fits to", "against fits to"],
        ((row.method.name, row.against.name, _where(row), f"{row.last:,}", f"{row.against_last:,}") for row in rows),
        left=(0, 1),
    )


def _rates(runners: dict[str, Runner], contexts: list[int], cost: Price | None, ranks: int) -> str:
    def line(runner: Runner, tokens: int) -> tuple[str, ...]:
        batch, rate = runner.max_batch(tokens), runner.best_rate(tokens)
        if not batch:
            return runner.method.name, f"{tokens:,}", "0", "-", "-", "-"
        band, dollars = runner.seconds(batch, tokens), _dollars(rate, cost, ranks)
        times = f"{milliseconds(band.value)} ({milliseconds(band.low)}-{milliseconds(band.high)})"
        price = f"{dollars:,.3f}" if dollars else "-"
        return runner.method.name, f"{tokens:,}", f"{batch:,}", times, f"{rate:,.0f}", price

    heads = ["method", "tokens", "largest batch", "ms a token", "tok/s", "$/Mtok"]
    return text.table(heads, (line(runner, tokens) for tokens in contexts for runner in runners.values()))
