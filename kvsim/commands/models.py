"""``kvsim models``: the models that are known."""

from __future__ import annotations

import click

from kvsim import catalog
from kvsim.commandline import Command
from kvsim.commands.flags import json_option, show, show_json
from kvsim.commands.model_choice import models
from kvsim.models.load import Named, named_model
from kvsim.models.model import Model
from kvsim.output import text
from kvsim.output.schema import envelope, model_object


@click.command("models", cls=Command)
@click.argument("name", required=False, shell_complete=models)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """The models that are known, with sources; with NAME all about one, or those whose names hold it."""
    found, one = _found(name)
    if as_json:
        keys = ("id", "aliases", "source", "note", "config")
        rows = [{key: each.get(key) for key in keys} | model_object(model) for each, model in found]
        show_json(envelope("models", {"name": name}, []) | {"rows": rows})
    elif one:
        show(text.model_detail(*found[0]), text.notes(found[0][1].notes), text.not_modelled("models"))
    else:
        heads = "L x kv x dim: layers, key/value heads, head dimension (of the first kind of layer)."
        show(text.model_list(found), heads, text.not_modelled("models"))


def _found(name: str | None) -> tuple[list[Named], bool]:
    """The models that a name means, and whether it means one: else they are those whose names hold it, or all.

    Raises ``LookupError`` where no name holds it.
    """
    rows = catalog.rows("models")
    if name is not None:
        try:
            return [named_model(name)], True
        except LookupError:
            wanted = name.lower()
            rows = tuple(row for row in rows if any(wanted in each for each in catalog.names(row))) if wanted else ()
            if not rows:
                raise
    return [(row, Model.from_config(row["config"], row["id"])) for row in rows], False
