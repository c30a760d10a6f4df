"""``kvsim explain``: where every byte comes from."""

from __future__ import annotations

import click

from kvsim.analysis.explain import explain, model_numbers
from kvsim.commandline import Command
from kvsim.commands.flags import (
    MethodFlags,
    Selection,
    batch_option,
    beyond,
    inputs_object,
    json_option,
    method_options,
    show,
    show_json,
)
from kvsim.commands.model_choice import model_option
from kvsim.memory.estimate import check_sizes
from kvsim.models.load import load_model
from kvsim.output import text as report
from kvsim.output.schema import envelope, explain_rows, model_object
from kvsim.specs import parse_size


@click.command("explain", cls=Command)
@model_option
@click.option("--ctx", default="4k", show_default=True, help="Tokens a sequence: 4096, 128k, 1M.")
@batch_option
@method_options
@json_option
def command(
    model_name: str,
    ctx: str,
    batch: int,
    asked: MethodFlags,
    as_json: bool,
) -> None:
    """Where every byte comes from: the formulas, with the numbers and their config keys."""
    tokens = parse_size(ctx)
    check_sizes(batch, tokens)
    model = load_model(model_name)
    chosen = Selection(model, asked)
    if chosen.default:
        chosen.methods = [chosen.methods[0], chosen.methods[-1]]
    weighed, left_out = chosen.weigh(model, batch, [tokens])
    rows = [explain(model, row.method, batch, tokens) for row in weighed]
    numbers = model_numbers(model, batch, tokens)
    notes = [*beyond(model, [tokens]), *left_out]
    if as_json:
        out = envelope("explain", inputs_object(model, batch, chosen, ctx=tokens), notes)
        show_json(out | {"model": model_object(model)} | explain_rows(numbers, weighed, rows))
        return
    show(
        report.heading(model),
        f"One sequence (residual: every token in full precision):\n\n{report.components(weighed)}",
        report.explanations(numbers, rows),
        report.notes(notes),
        report.not_modelled("explain"),
    )
