"""``kvsim compare``: methods down, contexts across; or engines side by side, and why they differ."""

from __future__ import annotations

from typing import Any

import click

from kvsim.commandline import Command
from kvsim.commands.flags import (
    MethodFlags,
    Selection,
    batch_option,
    beyond,
    choose_engine,
    engine_option,
    engine_options,
    given_flags,
    inputs_object,
    json_option,
    method_options,
    show,
    show_json,
)
from kvsim.commands.model_choice import model_option
from kvsim.engines import ENGINES, IDEAL, Engine
from kvsim.memory.estimate import Estimate, check_sizes, estimate
from kvsim.methods.defaults import DEFAULT_SPECS
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.output import text
from kvsim.output.schema import envelope, model_object, row_object
from kvsim.specs import parse_engine, parse_sizes


@click.command("compare", cls=Command)
@model_option
@click.option("--ctx", default="1k,8k,32k,128k", show_default=True, help="Tokens a sequence, commas between several.")
@batch_option
@method_options
@engine_option
@engine_options
@click.option(
    "--engines",
    is_flag=False,
    flag_value="all",
    help="Engines side by side, and why they differ: all, or a list with commas.",
)
@json_option
def command(
    model_name: str,
    ctx: str,
    batch: int,
    asked: MethodFlags,
    engine: str | None,
    flags: dict[str, int | None],
    engines: str | None,
    as_json: bool,
) -> None:
    """Methods down, contexts across: bytes and compression; with --engines what each engine takes, and why."""
    if engines is not None:
        if engine is not None:
            raise ValueError("give --engine or --engines, not both")
        _engines(model_name, ctx, batch, asked, engines, flags, as_json)
        return
    serving, said = choose_engine(engine, None, flags)
    model, chosen, contexts, rows, notes = weighed_grid(model_name, ctx, batch, asked, serving)
    notes += [*said, *(f"{serving.name}: {line}" for line in serving.notes(model, rows[0].method))]
    if as_json:
        out = envelope("compare", inputs_object(model, batch, chosen, ctx=contexts, engine=serving.name), notes)
        show_json(out | {"model": model_object(model), "rows": [row_object(row) for row in rows]})
        return
    under = "" if serving.name == IDEAL.name else f", engine {serving.name}"
    show(
        text.heading(model),
        f"batch {batch:,}{under}",
        text.comparison(rows),
        text.notes(notes),
        text.not_modelled("compare"),
    )


def weighed_grid(
    model_name: str, ctx: str, batch: int, asked: MethodFlags, engine: Engine = IDEAL
) -> tuple[Model, Selection, list[int], list[Estimate], list[str]]:
    """Methods times contexts; without any option, the wider default set."""
    contexts = parse_sizes(ctx)
    check_sizes(batch, contexts[0])
    model = load_model(model_name)
    chosen = Selection(model, asked, engine)
    if chosen.default and chosen.engine.name == IDEAL.name:
        baseline = chosen.methods[0].name
        chosen = Selection(model, MethodFlags((baseline, *DEFAULT_SPECS["compare"]), asked.dtype), engine)
        chosen.default = True
    rows, left_out = chosen.weigh(model, batch, contexts)
    return model, chosen, contexts, rows, [*beyond(model, contexts), *left_out]


def _engines(
    model_name: str,
    ctx: str,
    batch: int,
    asked: MethodFlags,
    engines: str,
    flags: dict[str, int | None],
    as_json: bool,
) -> None:
    """Engines down, contexts across, one table a method."""
    contexts = parse_sizes(ctx)
    check_sizes(batch, contexts[0])
    model = load_model(model_name)
    chosen = Selection(model, asked)
    if chosen.default:
        chosen.methods = chosen.methods[:1]
    given = given_flags(flags)
    names = list(ENGINES) if engines == "all" else [name.strip() for name in engines.split(",")]
    compared = [parse_engine(name, given) for name in names]
    rows: list[Estimate] = []
    reasons: list[dict[str, Any]] = []
    for method in chosen.methods:
        for each in compared:
            reason: dict[str, Any] = {"engine": each.name, "method": method.name, "notes": [], "error": None}
            try:
                rows += [estimate(model, method, batch, tokens, each) for tokens in contexts]
                reason["notes"] = list(each.notes(model, method))
            except ValueError as error:
                reason["error"] = str(error)
            reasons.append(reason)
    if not rows:
        raise ValueError("; ".join(reason["error"] for reason in reasons))
    notes = [*beyond(model, contexts), *chosen.notes]
    if as_json:
        inputs = inputs_object(model, batch, chosen, ctx=contexts, engines=[each.name for each in compared])
        out = envelope("compare", inputs, notes) | {"model": model_object(model)}
        show_json(out | {"rows": [row_object(row) for row in rows], "engines": reasons})
        return
    show(
        text.heading(model),
        f"batch {batch:,}",
        text.engines(rows, reasons, contexts),
        text.notes(notes),
        text.not_modelled("compare"),
    )
