"""The table of mutants in docs/reliability.md, and the survivors by name, from what was recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsim.output.tables import compact
from validation.recorded import FOLDER
from validation.reliability.equivalents import EQUIVALENT, ON_GPU

RECORD = FOLDER / "reliability" / "mutants.json"


def block(path: Path = RECORD) -> str:
    """The score a group, then every survivor with what is known of it."""
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    rows, survivors = [], []
    for name, group in groups.items():
        left = [mutant for mutant in group["mutants"] if not mutant["found"]]
        same = sum(_key(mutant) in EQUIVALENT or "gone" in mutant for mutant in left)
        device = sum(_key(mutant) in ON_GPU for mutant in left)
        total, found = len(group["mutants"]), len(group["mutants"]) - len(left)
        counts = (group["possible"], total, group["found_at_first"], found, same, device, len(left) - same - device)
        rows.append((name, *map(str, counts)))
        survivors += [(f"`{each['module']}`", f"`{each['before']}` to `{each['after']}`", _why(each)) for each in left]
    head = ["modules", "possible", "sample", "found at first", "found", "equivalent or gone", "on a GPU alone", "left"]
    return "\n\n".join(
        [compact(head, rows, left=(0,)), compact(["survivor", "change", "why"], survivors, left=(0, 1, 2))]
    )


def _key(mutant: Mapping[str, Any]) -> tuple[str, str, str]:
    return mutant["module"], mutant["before"], mutant["after"]


def _why(mutant: Mapping[str, Any]) -> str:
    key = _key(mutant)
    if "gone" in mutant:
        return "gone: the line was mended"
    if key in EQUIVALENT:
        return f"equivalent: {EQUIVALENT[key]}"
    return f"on a GPU alone: {ON_GPU[key]}" if key in ON_GPU else "left"
