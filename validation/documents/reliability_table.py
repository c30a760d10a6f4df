"""The documents' table of the reliability runs: a line a run and device, what it went through and what it found."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsim.finite_json import read_json
from kvsim.output.tables import compact
from validation.claims.phases import judged
from validation.recorded import FOLDER

Row = dict[str, Any]

SCHEMA = "validation.reliability/1"
MOST = 420
"""Characters of what a line found, beyond which parts that hold are counted and not shown."""
PART = re.compile(r"; (?=[\w.(),+-]+(?: [\w.(),+-]+)?: )")
"""Between what was found of two layouts."""


def table(folder: Path = FOLDER / "reliability") -> str:
    """Rows of one run on one device are a line, which holds where all of them do; below it what measured them."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    sources: list[str] = []
    for path in sorted(folder.glob("*.json"), reverse=True):
        file = read_json(path, "record")
        if file["schema"] == SCHEMA:
            sources.append(circumstances(path, file["rows"]))
            for row in map(judged, file["rows"]):
                groups.setdefault((row["device"], row["size"], row["run"]), []).append(row)
    body = [[run, device, size, verdict(rows), found(rows)] for (device, size, run), rows in groups.items()]
    shown = compact(["run", "device", "size", "verdict", "found"], body, left=(0, 1, 2, 3, 4))
    return "\n\n".join((shown, *sources))


def circumstances(path: Path, rows: Sequence[Row]) -> str:
    """Device, driver, versions, commits and command lines of a record, with a link to it."""
    first = rows[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "triton", "transformers"))
    driver = f", driver {first['driver']}" if first["driver"] else ""
    commands = dict.fromkeys(f"`{quoted(row['command'])}` (commit {row['commit'][:12]})" for row in rows)
    link = f"[{path.name}](validation/results/reliability/{path.name})"
    return f"{first['device_name']}{driver}, {versions} ({link}): {', '.join(commands)}."


def quoted(command: str) -> str:
    """A recorded command line, whose values stand as they came, as a shell takes it."""
    return re.sub(r"(--[a-z-]+) (?!--)((?:(?! --).)+)", lambda match: f"{match[1]} {shlex.quote(match[2])}", command)


def verdict(rows: Sequence[Row]) -> str:
    return "holds" if all(row["holds"] for row in rows) else "FAILS"


def found(rows: Sequence[Row]) -> str:
    """What they found: all that fails, then what holds, of which what is too long is counted.

    Messages of other software are cut at their first sentence.
    """
    parts = [part for row in rows for part in PART.split(told(row))]
    failed = [part for part in parts if ": FAILS" in part]
    holding = [part for part in parts if part not in failed]
    kept = [*failed]
    for part in holding:
        if kept and len("; ".join([*kept, part])) > MOST:
            break
        kept.append(part)
    left = len(parts) - len(kept)
    return "; ".join(kept) + (f"; and {left} more that hold" if left else "")


def told(row: Row) -> str:
    """What a row found, with whole names of models: older rows cut them at their last dot."""
    text = re.sub(r"(CUDA out of memory)\.(?:(?!; [\w.()-]+: )[^|])*", r"\1", row["found"])
    text = re.sub(r"^Broken: |; reset\(\) the cache, or give it fewer", "", text)
    for model in dict.fromkeys(figure["model"] for figure in row.get("figures", [])):
        text = re.sub(rf"(?<![\w.-]){re.escape(Path(model).stem)} +", f"{model} ", text)
    return text
