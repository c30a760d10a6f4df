"""``kvsim hardware``: the cards that are known."""

from __future__ import annotations

from dataclasses import asdict

import click

from kvsim import catalog
from kvsim.commandline import Command
from kvsim.commands.flags import json_option, show, show_json
from kvsim.commands.model_choice import cards
from kvsim.hardware import Hardware, find_hardware
from kvsim.output import text
from kvsim.output.schema import envelope


@click.command("hardware", cls=Command)
@click.argument("name", required=False, shell_complete=cards)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """The cards that are known, with sources; with NAME all about one."""
    rows = catalog.rows("hardware")
    cards = [Hardware.from_row(row) for row in rows] if name is None else [find_hardware(name)]
    aliases = {row["id"]: row["aliases"] for row in rows}
    if as_json:
        listed = [{"id": card.id, "aliases": aliases[card.id]} | asdict(card) for card in cards]
        show_json(envelope("hardware", {"name": name}, []) | {"rows": listed})
    elif name is not None:
        show(text.hardware_detail(cards[0], aliases[cards[0].id]), text.not_modelled("hardware"))
    else:
        origin = "Memory as a process sees it where known, else the marketed size."
        show(text.hardware_list(cards), origin, text.not_modelled("hardware"))
