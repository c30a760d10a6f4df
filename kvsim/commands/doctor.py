"""``kvsim doctor``: an engine's boot log against prediction."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path

import click

from kvsim import catalog
from kvsim.analysis.doctor import READERS, Log, diagnose, engine_of, labels
from kvsim.commandline import Command
from kvsim.commands.flags import json_option, show, show_json
from kvsim.commands.model_choice import cards
from kvsim.hardware import find_hardware
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.output import text as report
from kvsim.output.schema import envelope

TUNED = re.compile(r"-(?:instruct|chat|it|hf)$", re.IGNORECASE)
"""Suffixes under which a tuned model has its base model's shape."""
LOG_NBYTES = 1 << 24
"""A boot prints a few hundred kilobytes; requests follow it."""


@click.command("doctor", cls=Command)
@click.option("--log", "log", required=True, help=f"Boot log of {labels()}; - reads standard input.")
@click.option("--model", "model_name", help="Model to predict.  [default: as the log names it]")
@click.option("--gpu", help="Card, where the log does not say its memory.", shell_complete=cards)
@json_option
def command(log: str, model_name: str | None, gpu: str | None, as_json: bool) -> None:
    """An engine's boot log against prediction, line by line, with causes."""
    text, notes = _read(log)
    lines = Log.of(text)
    engine = engine_of(lines)
    if engine is None:
        raise ValueError(f"log {log}: no line of a {labels()} boot log in it")
    reader = READERS[engine]
    name = model_name or reader.model_name(lines)
    if reader.needs_model and name is None:
        raise ValueError(f"log {log} does not name its model: give --model")
    model = None
    if name is not None:
        model, taken = (load_model(name), []) if model_name is not None else _named(name)
        notes += taken
    draft = reader.draft_name(lines)
    row = catalog.find("models", draft) if draft is not None else None
    card = find_hardware(gpu) if gpu is not None else None
    diagnosis = diagnose(lines, model, card, None if row is None else load_model(row["id"]))
    notes += diagnosis.notes
    if as_json:
        inputs = {"log": log, "model": model.name if model else None, "gpu": gpu}
        out = envelope("doctor", inputs, notes)
        out |= {
            "engine": diagnosis.engine,
            "version": diagnosis.version,
            "model_name": diagnosis.model,
            "settings": dict(diagnosis.settings),
        }
        keys = ("line", "what", "unit", "predicted", "reported", "error", "cause")
        out["rows"] = [{key: getattr(finding, key) for key in keys} for finding in diagnosis.findings]
        show_json(out)
        return
    show(report.diagnosis(diagnosis), report.notes(notes), report.not_modelled("doctor"))


def _named(name: str) -> tuple[Model, list[str]]:
    """The model that a log names; it may be in the catalogue without the suffix of its tuning, which a note says.

    Raises ``LookupError`` where it is not to be had here: the log is mostly of another machine.
    """
    plain = TUNED.sub("", name)
    if catalog.find("models", name) is None and plain != name:
        row = catalog.find("models", plain)
        if row is not None:
            return load_model(plain), [f"{name} taken for {row['id']}, the same shape untuned; else give --model"]
    try:
        return load_model(name), []
    except LookupError as error:
        hub = re.search(r"\((model hub: .*|no model hub: .*)\)$", str(error))
        why = f"; {hub[1]}" if hub else ""
        message = f"the log's model is not here: give --model (the log names {name}{why})"
        raise LookupError(message) from None


def _read(log: str) -> tuple[str, list[str]]:
    """The text of a file or of standard input (``-``), and a note where it was too long to be read whole.

    Raises ``ValueError``, naming the log, where it cannot be read, is not a regular file, empty, or no text.
    """
    if log == "-":
        data = sys.stdin.buffer.read(LOG_NBYTES + 1)
        size = len(data)
    else:
        try:
            found = Path(log).stat()
            if stat.S_ISDIR(found.st_mode):
                raise ValueError(f"log {log} is a directory")
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"log {log} is not a regular file: pipe it to --log -")
            with Path(log).open("rb") as file:
                data, size = file.read(LOG_NBYTES + 1), found.st_size
        except OSError as error:
            raise ValueError(f"log {log} cannot be read: {error.strerror}") from None
    notes = []
    if len(data) > LOG_NBYTES:
        data = data[:LOG_NBYTES]
        of = "" if log == "-" else f" of {size / (1 << 20):,.0f}"
        notes.append(f"the first {LOG_NBYTES >> 20} MiB{of} of the log are read")
    if not data.strip():
        raise ValueError(f"log {log} is empty")
    return _text(log, data), notes


def _text(log: str, data: bytes) -> str:
    """UTF-8, or UTF-16 with its mark, as a Windows shell redirects.  Raises ``ValueError`` for what is no text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data:
        raise ValueError(f"log {log} is no text: it has a byte 0 at {data.index(0):,}")
    return data.decode("utf-8", errors="replace").removeprefix("\ufeff")
