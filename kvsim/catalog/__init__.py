"""What is known, with its source: ``models.json`` and ``hardware.json``, looked up by id, last part or alias."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kvsim.nearest import nearest

Row = dict[str, Any]


@cache
def rows(kind: str) -> tuple[Row, ...]:
    """The rows of ``"models"`` or ``"hardware"``."""
    with open(Path(__file__).with_name(f"{kind}.json"), encoding="utf-8") as file:
        return tuple(json.load(file)["rows"])


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    with open(Path(__file__).with_name("defaults.json"), encoding="utf-8") as file:
        families: dict[str, dict[str, Any]] = json.load(file)["families"]
    return families


def defaults(model_type: str) -> dict[str, Any]:
    """What the class of ``model_type`` in transformers fills in for keys that a config lacks."""
    return _defaults().get(model_type, {})


def names(row: Row) -> list[str]:
    """Every lower-case name a row answers to: its id and aliases, and the last part of each."""
    spellings = [spelling.lower() for spelling in (row["id"], *row["aliases"])]
    return list(dict.fromkeys(spelling for full in spellings for spelling in (full, full.rsplit("/", 1)[-1])))


def find(kind: str, name: str) -> Row | None:
    """The row that answers to ``name``, case ignored; ``None`` where there is none."""
    wanted = name.lower()
    return next((row for row in rows(kind) if wanted in names(row)), None)


def near(kind: str, name: str) -> Sequence[str]:
    """Up to three known names closest to ``name``, one a row."""
    owner = {spelling: row["id"] for row in rows(kind) for spelling in names(row)}
    close = nearest(name.lower(), owner, n=12, cutoff=0.5)
    out: dict[str, str] = {}
    for spelling in close:
        out.setdefault(owner[spelling], spelling)
    return list(out.values())[:3]


def unknown(kind: str, what: str, name: str, listing: str) -> str:
    """The one line for a name that nothing answers to, with the nearest names."""
    close = near(kind, name)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return f"unknown {what} {name!r}: {hint}`{listing}` lists all"
