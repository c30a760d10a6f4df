"""``kvsim models``: the models that are known."""

from __future__ import annotations

import click

from kvsim import catalog
from kvsim.commandline import Command
from kvsim.commands.flags import json_option, show, show_json
from kvsim.models.model import Model
from kvsim.output import text
from kvsim.output.schema import envelope, model_object


@click.command("models", cls=Command)
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """The models that are known, with sources; with NAME all about one."""
    row = catalog.find("models", name) if name is not None else None
    if name is not None and row is None:
        raise LookupError(catalog.unknown("models", "model", name, "kvsim models"))
    listed = [row] if row else catalog.rows("models")
    found = [(each, Model.from_config(each["config"], each["id"])) for each in listed]
    if as_json:
        keys = ("id", "aliases", "source", "note", "config")
        rows = [{key: each.get(key) for key in keys} | model_object(model) for each, model in found]
        show_json(envelope("models", {"name": name}, []) | {"rows": rows})
    elif row is not None:
        show(text.model_detail(row, found[0][1]), text.notes(found[0][1].notes), text.not_modelled("models"))
    else:
        heads = "L x kv x dim: layers, key/value heads, head dimension (of the first kind of layer)."
        show(text.model_list(found), heads, text.not_modelled("models"))
