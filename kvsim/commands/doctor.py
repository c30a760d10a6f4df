"""``kvsim doctor``: an engine's boot log against prediction."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from kvsim import catalog, report
from kvsim.commands.flags import json_option, show, show_json
from kvsim.doctor import diagnose, engine_of, model_of
from kvsim.hardware import find_hardware
from kvsim.load import load_model
from kvsim.model import Model
from kvsim.schema import envelope

TUNED = re.compile(r"-(?:instruct|chat|it|hf)$", re.IGNORECASE)
"""Suffixes under which a tuned model has its base model's shape."""


@click.command("doctor")
@click.option("--log", "log", required=True, help="Boot log of vLLM or llama.cpp; - reads standard input.")
@click.option("--model", "model_name", help="Model to predict.  [default: as the log names it]")
@click.option("--gpu", help="Card, where the log does not say its memory.")
@json_option
def command(log: str, model_name: str | None, gpu: str | None, as_json: bool) -> None:
    """An engine's boot log against prediction, line by line, with causes."""
    text = sys.stdin.read() if log == "-" else _read(Path(log))
    engine = engine_of(text)
    if engine is None:
        raise ValueError(f"log {log}: no line of a vLLM or llama.cpp boot log in it")
    name = model_name or (model_of(text) if engine == "vllm" else None)
    if engine == "vllm" and name is None:
        raise ValueError(f"log {log} does not name its model: give --model")
    model, notes = (None, []) if name is None else _load(name, asked=model_name is not None)
    diagnosis = diagnose(text, model, find_hardware(gpu) if gpu is not None else None)
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


def _load(name: str, asked: bool) -> tuple[Model, list[str]]:
    """The model; one that the log names may be in the catalogue without the suffix of its tuning, which a note says.

    Raises ``LookupError`` for an unknown model.
    """
    plain = TUNED.sub("", name)
    if not asked and catalog.find("models", name) is None and plain != name:
        row = catalog.find("models", plain)
        if row is not None:
            return load_model(plain), [f"{name} taken for {row['id']}, the same shape untuned; else give --model"]
    return load_model(name), []


def _read(path: Path) -> str:
    """The file's text.  Raises ``ValueError``, naming it, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"log {path} cannot be read: {error.strerror}") from None
