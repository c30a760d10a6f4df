"""``kvsim report``: the page of :mod:`kvsim.output.page` as one file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvsim.analysis.plan import NoRoomError
from kvsim.atomic import replace_file
from kvsim.commandline import Command
from kvsim.commands.model_choice import cards, model_option
from kvsim.engines import ENGINES
from kvsim.hardware import given
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.models.weight_storage import check_weight_bits
from kvsim.output import text
from kvsim.output.page import Question, answer, as_json, json_object, question_price, report
from kvsim.specs import choose_methods, parse_card, parse_reserve, parse_serving, parse_size

SHOWN = DEFAULT_SPECS["page"]


@click.command("report", cls=Command)
@model_option
@click.option(
    "--gpu", required=True, help="CARD, or CARD:COUNT where COUNT cards share the model.", shell_complete=cards
)
@click.option(
    "--method", "specs", multiple=True, help=f"Method; the first is compared with.  [default: {', '.join(SHOWN)}]"
)
@click.option("--ctx", default="32k", show_default=True, help="Tokens a sequence.")
@click.option("--batch", default="8", show_default=True, help="Sequences.")
@click.option("--weight-bits", type=float, help="Bits a weight.  [default: the config's dtype, else 16]")
@click.option("--engine", default="ideal", show_default=True, help=f"Whose bytes and kernels: {', '.join(ENGINES)}.")
@click.option("--reserve", help="Share of a card's memory held back.  [default: the engine's, else 10%]")
@click.option("--price", type=float, help="Dollars a card-hour.  [default: the lowest of the dated list prices]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("kvsim.html"),
    show_default=True,
    help="File.",
)
@click.option("--json", "as_object", is_flag=True, help="Print the tables as one JSON object; no file.")
def command(
    model_name: str,
    gpu: str,
    specs: tuple[str, ...],
    ctx: str,
    batch: str,
    weight_bits: float | None,
    engine: str,
    reserve: str | None,
    price: float | None,
    out: Path,
    as_object: bool,
) -> int:
    """One self-contained HTML file: plots, and the tables behind them.

    Exit code 1 (and no file) where the weights alone do not fit.
    """
    card, count = parse_card(gpu)
    check_weight_bits(weight_bits)
    parse_serving(engine, card)
    question = Question(
        load_model(model_name),
        card,
        tuple(choose_methods(specs or SHOWN, {}, None)[0]),
        parse_size(ctx),
        parse_size(batch, "batch"),
        count or 1,
        weight_bits,
        engine,
        parse_reserve(reserve) if reserve is not None else None,
        question_price(card, count or 1) if price is None else given(card.id, price),
        specs or SHOWN,
        model_name,
    )
    try:
        found = answer(question)
    except NoRoomError as error:
        if as_object:
            click.echo(json.dumps(json_object(question, [str(error)], []), indent=2))
        else:
            click.echo(f"{error}\n\n{text.not_modelled_line('page')}")
        return 1
    if as_object:
        click.echo(json.dumps(as_json(found), indent=2))
        return 0
    page = report(found).encode()
    replace_file(out, page)
    click.echo(f"wrote {out}: {question.model.name} on {count or 1} x {card.id}, {len(page) / 1024:,.0f} KiB")
    click.echo(text.not_modelled_line("page"))
    return 0
