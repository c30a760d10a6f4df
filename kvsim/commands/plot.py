"""``kvsim plot``: bytes and compression over context, as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from kvsim.commandline import Command
from kvsim.commands.compare import weighed_grid
from kvsim.commands.flags import (
    MethodFlags,
    batch_option,
    inputs_object,
    json_option,
    method_options,
    show,
    show_json,
)
from kvsim.commands.model_choice import model_option
from kvsim.output import text
from kvsim.output.schema import envelope, model_object, row_object

PLOT_CONTEXTS = "128,256,512,1k,2k,4k,8k,16k,32k,64k,128k"


@click.command("plot", cls=Command)
@model_option
@click.option("--ctx", default=PLOT_CONTEXTS, help="Tokens a sequence, commas between several.  [default: 128 to 128k]")
@batch_option
@method_options
@click.option("--output", "-o", default="kvsim.png", show_default=True, help="Picture to write: .png or .svg.")
@json_option
def command(
    model_name: str,
    ctx: str,
    batch: int,
    asked: MethodFlags,
    output: str,
    as_json: bool,
) -> None:
    """Bytes and compression over context, as PNG or SVG."""
    model, chosen, contexts, rows, notes = weighed_grid(model_name, ctx, batch, asked)
    from kvsim.output.plot import draw

    draw(rows, f"{model.name}, batch {batch:,}", Path(output))
    if as_json:
        out = envelope("plot", inputs_object(model, batch, chosen, ctx=contexts), notes)
        show_json(out | {"model": model_object(model), "path": output, "rows": [row_object(row) for row in rows]})
        return
    show(f"wrote {output}", text.notes(notes), text.not_modelled("plot"))
