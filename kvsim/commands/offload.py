"""``kvsim offload``: the command line of :mod:`kvsim.analysis.offload`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from kvsim.analysis.offload import TIERS, Offload, Tier, offload, tier
from kvsim.commandline import Command
from kvsim.commands.flags import show
from kvsim.commands.model_choice import cards, model_option
from kvsim.engines import ENGINES
from kvsim.hardware import Hardware, given, lowest
from kvsim.layout import Method
from kvsim.models.load import load_model
from kvsim.models.weight_storage import check_weight_bits
from kvsim.output import text
from kvsim.output.schema import envelope
from kvsim.specs import brief, choose_methods, parse_card, parse_serving, parse_sizes, rows_of

WEIGHED = ("fp16", "fp8")


@click.command("offload", cls=Command)
@model_option
@click.option(
    "--gpu", required=True, help="CARD, or CARD:COUNT where COUNT cards share the model.", shell_complete=cards
)
@click.option("--method", "specs", multiple=True, help=f"Cache method; repeatable.  [default: {', '.join(WEIGHED)}]")
@click.option("--ctx", default="4k,32k,128k", show_default=True, help="Tokens of a sequence, commas between several.")
@click.option(
    "--tier",
    "places",
    multiple=True,
    help=f"{', '.join(TIERS)}, or with GB/s a card, nvme=14; repeatable.  [default: all three]",
)
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--engine", default="ideal", show_default=True, help=f"Whose bytes: {', '.join(ENGINES)}.")
@click.option("--price", type=float, help="Dollars a card-hour.  [default: the lowest of the dated list prices]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model_name: str,
    gpu: str,
    specs: tuple[str, ...],
    ctx: str,
    places: tuple[str, ...],
    weight_bits: float | None,
    engine: str,
    price: float | None,
    as_json: bool,
) -> int:
    """A cache in the host's memory, on a drive or on another host: seconds to load it, against computing it again."""
    card, count = parse_card(gpu)
    check_weight_bits(weight_bits)
    cost = lowest(card.id, count or 1) if price is None else given(card.id, price)
    tiers = [_tier(place, card) for place in dict.fromkeys(places or TIERS)]
    contexts = parse_sizes(ctx)
    model, serving = load_model(model_name), parse_serving(engine, card, count or 1)

    def loaded(method: Method) -> Iterator[Offload]:
        for tokens in contexts:
            yield from offload(
                model,
                method,
                card,
                tiers,
                tokens,
                num_cards=count or 1,
                weight_bits=weight_bits,
                engine=serving,
                usd_per_hour=cost.usd_per_hour if cost else None,
            )

    rows, notes = rows_of(choose_methods(specs or WEIGHED, {}, None)[0], loaded, model.name, named=bool(specs))
    notes += [f"price: {cost.label}"] if cost else [f"no price of {card.id} is listed: give --price"]
    if as_json:
        inputs: dict[str, Any] = {"model": model.name, "gpu": card.id, "cards": count or 1, "engine": serving.name}
        inputs |= {"tiers": {each.name: each.bandwidth for each in tiers}, "weight_bits": weight_bits}
        click.echo(json.dumps(envelope("offload", inputs, notes) | {"rows": [_row(row) for row in rows]}, indent=2))
        return 0
    where = ", ".join(f"{each.name} {each.bandwidth / 1e9:g} GB/s" for each in tiers)
    title = f"{model.name} on {count or 1} x {card.id}; each card from {where}"
    show(title, _table(rows), text.notes(notes), text.not_modelled_line("offload"))
    return 0


def _tier(spec: str, card: Hardware) -> Tier:
    """``cpu``, or ``nvme=14`` in GB/s a card.  Raises ``ValueError``."""
    name, equals, speed = spec.partition("=")
    if not equals:
        return tier(name.strip().lower(), card)
    try:
        bandwidth = float(speed) * 1e9
    except ValueError:
        bandwidth = 0.0
    if not 0 < bandwidth < 1e15:
        raise ValueError(f"tier {brief(spec)}: allowed are GB/s above 0, such as nvme=14")
    return tier(name.strip().lower(), card, bandwidth)


def _row(row: Offload) -> dict[str, Any]:
    return {
        "tier": row.tier.name,
        "method": row.method.name,
        "ctx": row.num_tokens,
        "nbytes": row.nbytes,
        "load_seconds": row.load_seconds,
        "recompute_seconds": row.recompute._asdict(),
        "sooner_from": row.sooner_from,
        "step_seconds": row.step_seconds,
        "usd_saved": row.usd_saved,
    }


def _table(rows: list[Offload]) -> str:
    def short(seconds: float) -> str:
        return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"

    heads = ["method", "tokens", "tier", "GiB", "load ms", "recompute ms", "band", "times sooner", "sooner from"]
    return text.table(
        [*heads, "ms a step from there", "$ saved a 1,000 loads"],
        (
            (
                row.method.name,
                f"{row.num_tokens:,}",
                row.tier.name,
                f"{row.nbytes / (1 << 30):,.3f}",
                short(row.load_seconds),
                short(row.recompute.value),
                f"{short(row.recompute.low)}-{short(row.recompute.high)}",
                f"{row.gain:.3g}",
                "never" if row.sooner_from is None else f"{row.sooner_from:,}",
                short(row.step_seconds),
                "-" if row.usd_saved is None else f"{row.usd_saved * 1000:.3g}",
            )
            for row in rows
        ),
        left=(0, 2),
    )
