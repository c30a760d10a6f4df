"""The README's tables of results: what the recorded files hold, file by file, with the command that made each."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from kvruntime.bench.report import tables as bench_tables
from validation.results import FOLDER, read_all
from validation.tables import claims_table

BENCH = FOLDER / "bench"


def tables(folder: Path = BENCH) -> str:
    """Markdown: predicted against measured in short, then every recorded benchmark."""
    head, body = claims_table(read_all())
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    parts = ["Predicted against measured, all recorded rows (`python -m validation memory --record`):"]
    parts += ["\n".join(lines)]
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"{circumstances(file)} ([{path.name}](validation/results/bench/{path.name})):"]
        parts += [f"```text\n{bench_tables(file['rows'])}\n```"]
    return "\n\n".join(parts)


def circumstances(file: dict[str, Any]) -> str:
    """Device, versions, and every command and commit that measured rows of a results file, in one sentence."""
    versions = ", ".join(f"{name} {file['versions'][name]}" for name in ("torch", "triton", "transformers"))
    runs: dict[str, None] = {}
    for row in file["rows"]:
        command = row.get("command", file["command"])
        commit = row.get("commit", file.get("commit")) or "unknown"
        runs[f"`{shlex.join(command)}` (commit {commit[:12]})"] = None
    return f"{', '.join(runs)} on {file['device']['name']}, {versions}"
