"""``kvsim breakeven``: the command line of :mod:`kvsim.analysis.breakeven`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import click

from kvsim.analysis.breakeven import BreakEven, Runner, by_batch, by_context, by_money
from kvsim.analysis.plan import NoRoomError
from kvsim.commandline import Command
from kvsim.commands.model_choice import cards, model_option
from kvsim.engines import ENGINES, Engine
from kvsim.hardware import Hardware, Price, given, lowest
from kvsim.layout import Method
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.weight_storage import check_weight_bits
from kvsim.output import text
from kvsim.output.schema import envelope
from kvsim.specs import (
    choose_methods,
    left_out,
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
        click.echo(json.dumps(_json(comparison, inputs), indent=2))
    else:
        click.echo(_screen(comparison))
    return 1 if comparison.refusal else 0


@dataclass
class Comparison:
    """Methods against others on one card (``ranks`` of it share the model): who runs, and where which one pays.

    ``refusal``: why nothing fits, else empty.
    """

    model: Model
    card: Hardware
    ranks: int
    batches: list[int]
    contexts: list[int]
    margin: float
    price: Price | None
    runners: dict[str, Runner] = field(default_factory=dict)
    rows: list[BreakEven] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refusal: str = ""

    def run(
        self,
        methods: list[Method],
        others: list[Method],
        weight_bits: float | None,
        share: float | None,
        engine: Engine,
        named: bool,
    ) -> None:
        """Compares every one of ``methods`` with every one of ``others``.

        Raises ``ValueError`` for a method that was ``named`` and cannot be, and where there is no pair to compare.
        """
        reasons: dict[str, str] = {}
        for method in (*methods, *others):
            try:
                runner = Runner(self.model, method, self.card, self.ranks, weight_bits, share, engine)
            except NoRoomError as error:
                self.refusal = f"{self.model.name} on {self.ranks} x {self.card.id}: {error}"
                break
            except ValueError as error:
                if named:
                    raise
                reasons[method.name] = str(error)
            else:
                self.runners[method.name] = runner
        self.notes = [self.refusal] if self.refusal else left_out(reasons)
        pairs = [
            (self.runners[method.name], self.runners[other.name])
            for method in methods
            for other in others
            if method.name in self.runners and other.name in self.runners and method != other
        ]
        if not pairs and not self.refusal:
            same = "no method to compare: --method and --against are the same"
            raise ValueError("; ".join(self.notes) or same)
        self.rows = [row for pair in pairs for row in self._compared(*pair)]

    def _compared(self, one: Runner, other: Runner) -> list[BreakEven]:
        return [
            *(by_context(one, other, each, self.margin) for each in self.batches),
            *(by_batch(one, other, each, self.margin) for each in self.contexts),
            by_money(one, other, self.margin),
        ]


def _json(found: Comparison, inputs: dict[str, Any]) -> dict[str, Any]:
    out = envelope("breakeven", inputs, found.notes)
    out["price"] = asdict(found.price) if found.price else None
    runners = found.runners.values()
    out["rates"] = [_rate(runner, each, found.price, found.ranks) for runner in runners for each in found.contexts]
    return out | {"rows": [_row(row) for row in found.rows]}


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
