"""The model and the cards of a command: where they may stand, and their names for a shell's completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from kvsim import catalog

Command = TypeVar("Command", bound=Callable[..., Any])
MODEL_HELP = "Catalogue name or alias, config.json, model directory, GGUF file, or hub id; or as the first word."


def model_option(command: Command, required: bool = True) -> Command:
    """``MODEL`` or ``--model MODEL`` as ``model_name``.

    Raises ``click.UsageError`` for both, or where it is ``required`` neither.
    """
    from kvsim.commands.flags import gathered

    def chosen(model_word: str | None, model_flag: str | None) -> str | None:
        if model_word is not None and model_flag is not None:
            raise click.UsageError(f"the model is given twice: {model_word} and --model {model_flag}")
        name = model_flag if model_word is None else model_word
        if name is None and required:
            path = click.get_current_context().command_path
            raise click.UsageError(f"Missing option '--model': {path} qwen3-8b, for one (kvsim models lists them)")
        return name

    for decorate in (
        gathered("model_name", chosen, "model_word", "model_flag"),
        click.option("--model", "model_flag", metavar="MODEL", help=MODEL_HELP, shell_complete=models),
        click.argument("model_word", metavar="[MODEL]", required=False, shell_complete=models),
    ):
        command = decorate(command)
    return command


def models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of the catalogue that begin so: short ones, or whole ids once a slash is typed."""
    return _beginning("models", incomplete)


def cards(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The cards' names that begin so."""
    return _beginning("hardware", incomplete)


def _beginning(kind: str, incomplete: str) -> list[str]:
    begun = incomplete.lower()
    names: Sequence[str] = [name for row in catalog.rows(kind) for name in catalog.names(row)]
    return sorted({name for name in names if name.startswith(begun) and ("/" in begun or "/" not in name)})
