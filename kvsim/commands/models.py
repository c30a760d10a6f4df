"""``kvsim models``: the models that are known."""

from __future__ import annotations

import click

from kvsim import catalog
from kvsim.commandline import Command
from kvsim.commands.flags import json_option, show, show_json
from kvsim.models.load import named_model
from kvsim.models.model import Model
from kvsim.output import text
from kvsim.output.schema import envelope, model_object


@click.command("models", cls=Command)
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """The models that are known, with sources; with NAME all about one."""
    if name is not None:
        found = [named_model(name)]
    else:
        found = [(each, Model.from_config(each["config"], each["id"])) for each in catalog.rows("models")]
    if as_json:
        keys = ("id", "aliases", "source", "note", "config")
        rows = [{key: each.get(key) for key in keys} | model_object(model) for each, model in found]
        show_json(envelope("models", {"name": name}, []) | {"rows": rows})
    elif name is not None:
        show(text.model_detail(*found[0]), text.notes(found[0][1].notes), text.not_modelled("models"))
    else:
        heads = "L x kv x dim: layers, key/value heads, head dimension (of the first kind of layer)."
        show(text.model_list(found), heads, text.not_modelled("models"))
