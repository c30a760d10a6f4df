"""``kvsim report``: the page of :mod:`kvsim.output.page` as one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvsim.analysis.plan import NoRoomError
from kvsim.atomic import replace_file
from kvsim.commandline import Command
from kvsim.commands.flags import gathered, show
from kvsim.commands.model_choice import cards, model_option
from kvsim.engines import ENGINES
from kvsim.hardware import given
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.models.weight_storage import check_weight_bits
from kvsim.output import text
from kvsim.output.page import deployment
from kvsim.output.page.document import TAB, found, report
from kvsim.output.page.question import TABS, Question, question_price
from kvsim.specs import choose_methods, parse_card, parse_reserve, parse_seconds, parse_serving, parse_size

SHOWN = DEFAULT_SPECS["page"]
PLANNED = ("users", "input_len", "output_len", "slo_tpot", "slo_ttft", "plan_gpus")
"""Options of the plan's tab."""


def planned(plan_gpus: tuple[str, ...], **texts: str | None) -> dict[str, Any]:
    """What :data:`PLANNED` give :class:`Question`.  Raises ``ValueError`` for what is no number or time."""
    fields: dict[str, Any] = {"plan_cards": tuple(map(parse_card, plan_gpus))}
    for name, value in texts.items():
        parse = parse_seconds if name.startswith("slo") else parse_size
        fields[name] = None if value is None else parse(value, name.replace("_", "-"))
    return fields


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
@click.option("--users", help="Of the plan: requests in flight at once.  [default: --batch]")
@click.option("--input-len", help="Of the plan: tokens of a prompt.  [default: --ctx less the answer]")
@click.option("--output-len", help="Of the plan: tokens of an answer.  [default: 512]")
@click.option("--slo-tpot", metavar="TIME", help="Of the plan: longest time per output token, 30ms.")
@click.option("--slo-ttft", metavar="TIME", help="Of the plan: longest time to the first token, 2s.")
@click.option(
    "--plan-gpu",
    "plan_gpus",
    multiple=True,
    help="Of the plan: a card to choose from, as --gpu. Repeatable.  [default: --gpu's, in any number]",
    shell_complete=cards,
)
@click.option(
    "--tab",
    type=click.Choice(tuple(TABS)),
    help="The tab that is shown first.  [default: plan where --users is given, else deployment]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("kvsim.html"),
    show_default=True,
    help="File.",
)
@click.option("--json", "as_object", is_flag=True, help="Print that tab's figures as one JSON object; no file.")
@gathered("plan_fields", planned, *PLANNED)
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
    plan_fields: dict[str, Any],
    tab: str | None,
    out: Path,
    as_object: bool,
) -> int:
    """One self-contained HTML file: plan, deployment, break-even and the cache explained.

    Exit code 1 (and no file) where the weights alone do not fit, 1 (with the file) where nothing meets the plan.
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
        tab=tab or ("plan" if plan_fields["users"] else "deployment"),
        **plan_fields,
    )
    try:
        answer = found(question)
    except NoRoomError as error:
        if as_object:
            click.echo(json.dumps(deployment.json_object(question, [str(error)], []), indent=2))
        else:
            show(str(error), text.not_modelled_line("page"))
        return 1
    unmet = 0 if getattr(answer, "good", True) else 1
    if as_object:
        click.echo(json.dumps(TAB[question.tab].as_json(answer), indent=2))
        return unmet
    page = report(question, answer).encode()
    replace_file(out, page)
    click.echo(f"wrote {out}: {question.model.name} on {question.place}, {len(page) / 1024:,.0f} KiB")
    show(text.not_modelled_line("page"))
    return unmet
