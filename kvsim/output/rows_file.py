"""The rows of an answer as a file: CSV with one column a figure, or the whole answer as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from kvsim.atomic import check_replaceable, replace_file

SUFFIXES = (".csv", ".json")


def check(path: Path) -> None:
    """Raises ``ValueError`` for a file that cannot be written: another suffix, no folder.  To be asked before work."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"file {path}: allowed are names that end in .csv or .json")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: no directory {path.parent}")
    check_replaceable(path)


def write(path: Path, answer: Mapping[str, Any]) -> None:
    """Writes the ``rows`` of ``answer`` as CSV, or all of it as JSON, by the suffix."""
    content = json.dumps(answer, indent=2) + "\n" if path.suffix.lower() == ".json" else to_csv(answer["rows"])
    replace_file(path, content)


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line a row under one of names; an object within a row gives a column a key (``tpot_seconds_low``).

    What a row does not have (``null``) is empty; ``true`` and ``false`` are as in JSON and in ``kvsim sweep``'s files.
    """
    flat = [_flat(row) for row in rows]
    whole = {
        name for row in flat for name in row if any(other.startswith(f"{name}_") for each in flat for other in each)
    }
    empty = {name for name in whole if all(row.get(name) is None for row in flat)}
    heads = [name for name in dict.fromkeys(name for row in flat for name in row) if name not in empty]
    out = StringIO()
    writer = csv.DictWriter(out, heads, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            out |= {f"{name}_{key}": each for key, each in _flat(value).items()}
        else:
            out[name] = str(value).lower() if isinstance(value, bool) else value
    return out
