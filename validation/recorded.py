"""Rows of validation: one file a device, which a :class:`Store` keeps, merged row by row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvruntime.bench.harness.store import Row, Store, read_rows, rows_as_lines
from kvsim.finite_json import json_text

SCHEMA = "validation/1"
FOLDER = Path(__file__).with_name("results")

KEY = ("task", "kind", "way", "phase", "counter", "device")
"""What makes two rows the same measurement: a task's name says model, method, lengths and settings."""


def slug(device: str) -> str:
    """A file name for a device's name: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def same(one: Row, other: Row) -> bool:
    """Whether both measure the same: they agree in the fields of :data:`KEY`."""
    return all(one.get(name) == other.get(name) for name in KEY)


class Results:
    """The rows of one file; ``path`` None keeps them in memory only.

    Raises ``ValueError`` for a path that cannot be written, or a file there that is not such rows.
    """

    def __init__(self, path: Path | None, circumstances: Row) -> None:
        self.path, self.circumstances = path, circumstances
        self.store = Store(path, SCHEMA, "task")

    @property
    def rows(self) -> list[Row]:
        return self.store.rows

    def holds(self, task: str, about: Mapping[str, Any] | None = None) -> bool:
        """Whether the task's rows are here, measured by this code and these versions on this device.

        ``about``: fields that all of them must have, besides: what the task's name leaves out.
        """
        same = {name: self.circumstances.get(name) for name in ("device_name", "driver", "versions", "code")}
        wanted = json.loads(json_text({**same, **(about or {})}))  # tuples are lists there
        rows = [row for row in self.rows if row["task"] == task]
        return bool(rows) and all(row.get(name) == value for row in rows for name, value in wanted.items())

    def add(self, rows: Sequence[Row]) -> list[Row]:
        """Takes rows with their circumstances, in place of older ones with the same key, and writes the file."""
        now = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        taken = [{**row, **self.circumstances, **now} for row in rows]
        self.store.put(taken, same)
        self.store.write(rows_as_lines(SCHEMA, self.rows))
        return taken


def read(path: Path) -> list[Row]:
    """The rows of a file.  Raises ``ValueError`` for one that is missing, broken or of another schema."""
    rows: list[Row] = read_rows(path, SCHEMA, "task")["rows"]
    return rows


def read_all(folder: Path = FOLDER) -> list[Row]:
    """The rows of every file in ``folder``.  Raises ``ValueError`` where there is none."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"no results in {folder}: record some with --record")
    return [row for path in paths for row in read(path)]


def circumstances(device: str, command: str) -> Row:
    """What belongs beside every row: device name, driver, versions, commit, the code's SHA-256, command."""
    from kvruntime.bench.harness.results import CODE, code_sha256, describe

    facts = describe(device, [])
    hardware = facts["device"]
    versions = {name: value for name, value in facts["versions"].items() if value is not None}
    out = {"device_name": hardware["name"], "driver": hardware.get("driver"), "versions": versions}
    return out | {"commit": facts["commit"], "code": code_sha256((*CODE, "validation/**/*.py")), "command": command}
