"""``kvsim breakeven``: the command line of :mod:`kvsim.analysis.breakeven`."""

from __future__ import annotations

import json

import click

from kvsim.analysis.breakeven import BreakEven, Runner
from kvsim.commandline import Command
from kvsim.commands.flags import show
from kvsim.commands.model_choice import cards, model_option
from kvsim.engines import ENGINES
from kvsim.hardware import Price, given, lowest
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.models.weight_storage import check_weight_bits
from kvsim.output import text
from kvsim.output.comparison import Comparison, comparison_object, dollars
from kvsim.specs import (
    choose_methods,
    milliseconds,
    parse_card,
    parse_reserve,
    parse_serving,
    parse_share,
    parse_sizes,
)

COMPARED, AGAINST = DEFAULT_SPECS["breakeven"], DEFAULT_SPECS["breakeven against"]


@click.command("breakeven", cls=Command)
@model_option
@click.option(
    "--gpu", required=True, help="CARD, or CARD:COUNT where COUNT cards share the model.", shell_complete=cards
)
@click.option("--method", "specs", multiple=True, help=f"Method; repeatable.  [default: {', '.join(COMPARED)}]")
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
    methods = choose_methods(specs or COMPARED, {}, None)[0]
    others = choose_methods(against or AGAINST, {}, None)[0]
    cost = lowest(card.id, ranks) if price is None else given(card.id, price)
    model, serving = load_model(model_name), parse_serving(engine, card, ranks)
    share = parse_reserve(reserve) if reserve is not None else None
    least = parse_share(margin, "margin")
    check_weight_bits(weight_bits)
    comparison = Comparison(model, card, ranks, batches, contexts, least, cost)
    comparison.run(methods, others, weight_bits, share, serving, named=bool(specs or against))
    if as_json:
        inputs = {"model": model.name, "gpu": card.id, "cards": ranks, "batch": batches, "ctx": contexts}
        inputs |= {"engine": engine, "reserve": share, "weight_bits": weight_bits, "margin": least}
        click.echo(json.dumps(comparison_object(comparison, inputs), indent=2))
    else:
        show(_screen(comparison))
    return 1 if comparison.refusal else 0


def _screen(found: Comparison) -> str:
    if found.refusal:
        return f"{found.refusal}\n\n{text.not_modelled_line('breakeven')}"
    model, least, notes = found.model, found.margin, list(found.notes)
    if model.max_positions and found.contexts[-1] > model.max_positions:
        notes.append(f"contexts beyond the model's {model.max_positions:,} positions are compared all the same")
    kinds = {kind: [row for row in found.rows if row.kind == kind] for kind in ("context", "batch", "money")}
    blocks = [
        f"{model.name} on {found.ranks} x {found.card.id}: where a method pays",
        f"Faster by {least:.1%} or more of the time with fewer bytes read, at one batch and context (decode steps):",
        _faster(kinds["context"], "batch", "from tokens"),
        _faster(kinds["batch"], "tokens", "from batch"),
        f"Cheaper by {least:.1%} or more, each with the largest batch that fits:",
        _cheaper(kinds["money"]),
        _rates(found.runners, found.contexts, found.price, found.ranks),
        text.notes([*notes, _price_note(found.card.id, found.price)]),
        text.not_modelled_line("breakeven"),
    ]
    return "\n\n".join(blocks)


def _price_note(card: str, cost: Price | None) -> str:
    return f"price: {cost.label}" if cost else f"no price of {card} is listed: give --price"


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
        band, each = runner.seconds(batch, tokens), dollars(rate, cost, ranks)
        times = f"{milliseconds(band.value)} ({milliseconds(band.low)}-{milliseconds(band.high)})"
        price = f"{each:,.3f}" if each else "-"
        return runner.method.name, f"{tokens:,}", f"{batch:,}", times, f"{rate:,.0f}", price

    heads = ["method", "tokens", "largest batch", "ms a token", "tok/s", "$/Mtok"]
    return text.table(heads, (line(runner, tokens) for tokens in contexts for runner in runners.values()))
