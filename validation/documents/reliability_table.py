"""The documents' table of the reliability runs: a line a run and device, what it went through and what it found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsim.finite_json import read_json
from kvsim.output.tables import compact
from validation.recorded import FOLDER

Row = dict[str, Any]

SCHEMA = "validation.reliability/1"
MOST = 420
"""Characters of what a line found."""


def table(folder: Path = FOLDER / "reliability") -> str:
    """Rows of one run on one device are one line, which holds where all of them do; Markdown."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    files = [read_json(path, "record") for path in sorted(folder.glob("*.json"), reverse=True)]
    for row in (row for file in files if file["schema"] == SCHEMA for row in file["rows"]):
        groups.setdefault((row["device"], row["size"], row["run"]), []).append(row)
    body = [[run, device, size, verdict(rows), found(rows)] for (device, size, run), rows in groups.items()]
    return compact(["run", "device", "size", "verdict", "found"], body, left=(0, 1, 2, 3, 4))


def verdict(rows: Sequence[Row]) -> str:
    return "holds" if all(row["holds"] for row in rows) else "FAILS"


def found(rows: Sequence[Row]) -> str:
    """What they found, messages of other software cut at their first sentence."""
    told = "; ".join(re.sub(r"(CUDA out of memory)\.[^;]*", r"\1", row["found"]) for row in rows)
    told = re.sub(r"^Broken: ", "", told)
    return told if len(told) <= MOST else f"{told[: MOST - 2]} …"
