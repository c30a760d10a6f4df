"""Rows in one JSON file: read whole, replaced in one step, never over what another run has written meanwhile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsim.atomic import replace_file
from kvsim.finite_json import json_text, read_json
from kvsim.regular_files import read_named, signature

Row = dict[str, Any]


class Store:
    """The rows of the file at ``path``, which has this ``schema``; None keeps them in memory alone.

    ``named`` is the field that every row has, a text.  ``found`` is the object that was there; ``fresh`` leaves it
    unread, and keeps the file beside as ``.old`` when the first row is written.  Raises ``ValueError`` for a path that
    cannot be written and, unless ``fresh``, for a file that is not such rows.
    """

    def __init__(self, path: Path | None, schema: str, named: str, *, fresh: bool = False) -> None:
        self.path, self.schema = path, schema
        self.rows: list[Row] = []
        self.found: dict[str, Any] | None = None
        self._seen: tuple[int, int, int] | None = None
        self._keep = False
        if path is None:
            return
        check_writable(path)
        self._seen = signature(path)
        self._keep = self._seen is not None and fresh
        if self._seen is not None and not fresh:
            self.found = read_rows(path, schema, named)
            self.rows = list(self.found["rows"])

    def put(self, new: Sequence[Row], same: Callable[[Row, Row], bool], *, behind: bool = False) -> None:
        """Takes ``new`` rows, each in place of the old ones that ``same(old, row)`` says it is.

        A row that replaces none, and with ``behind`` every one, goes to the end.
        """
        for row in new:
            places = [index for index, old in enumerate(self.rows) if same(old, row)]
            first = len(self.rows) if behind or not places else places[0]
            self.rows.insert(first, row)
            for index in reversed(places):
                del self.rows[index + (index >= first)]

    def write(self, text: str) -> None:
        """Replaces the file in one step: a reader, or a kill at any moment, finds the old or the new one whole.

        Raises ``ValueError`` where it cannot be written, and where another run has written it since.
        """
        if self.path is None:
            return
        if signature(self.path) != self._seen:
            raise ValueError(f"{self.path} was changed by another run meanwhile: give each its own --out")
        if self._keep:  # only now: a run refused for its other options has not touched it
            replace_file(self.path.with_name(self.path.name + ".old"), read_named(self.path, "results"), regular=True)
            self._keep = False
        replace_file(self.path, text, regular=True)
        self._seen = signature(self.path)


def read_rows(path: str | os.PathLike[str], schema: str, named: str) -> dict[str, Any]:
    """A file of rows.  Raises ``ValueError`` for one that is missing, broken or of another schema."""
    found = read_json(path, "results")
    theirs = found.get("schema") if isinstance(found, dict) else None
    if theirs != schema:
        raise ValueError(f"{path} has schema {theirs!r}: expected {schema!r}")
    rows = found.get("rows")
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no rows of measurements")
    if not all(isinstance(row, dict) and isinstance(row.get(named), str) and row[named] for row in rows):
        raise ValueError(f"{path} holds a row without a {named}")
    whole: dict[str, Any] = found
    return whole


def rows_as_lines(schema: str, rows: Sequence[Row]) -> str:
    """A file of rows, one a line: what changes is what ``git diff`` shows."""
    lines = ",\n".join(json_text(row) for row in rows)
    return f'{{"schema": {json_text(schema)}, "rows": [\n{lines}\n]}}\n'


def check_writable(path: Path) -> None:
    """Raises ``ValueError`` unless a file can be written (and replaced) at ``path``; makes its folder."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: it is not a regular file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent):
            pass
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
