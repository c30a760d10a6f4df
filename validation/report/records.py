"""Rows by the schema of their file: those of ``validation memory`` and those of ``validation reliability``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsim.finite_json import read_json
from validation.claims.phases import judged
from validation.recorded import FOLDER, SCHEMA

RELIABILITY = "validation.reliability/1"


def memory_rows(files: Sequence[Path] | None = None) -> list[dict[str, Any]]:
    """The rows of ``validation memory``, ``speed`` and ``quality`` in ``files``, by default in all records."""
    return _rows(sorted(FOLDER.glob("*.json")) if files is None else files, SCHEMA)


def reliability_rows(files: Sequence[Path] | None = None) -> list[dict[str, Any]]:
    """The rows of ``validation reliability`` in ``files``, by default in all records, their figures judged anew."""
    own = sorted((FOLDER / "reliability").glob("*.json")) if files is None else files
    return list(map(judged, _rows(own, RELIABILITY)))


def _rows(files: Sequence[Path], schema: str) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for path in files:
        found = read_json(path, "record")
        if isinstance(found, dict) and found.get("schema") == schema:
            out += found["rows"]
    return out
