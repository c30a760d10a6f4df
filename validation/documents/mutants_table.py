"""The table of mutants in docs/reliability.md, and the survivors by name, from what was recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsim.output.tables import compact
from validation.recorded import FOLDER

RECORD = FOLDER / "reliability" / "mutants.json"
EXCUSED = Path(__file__).parents[1] / "reliability" / "excused.json"
"""Survivors that no test can notice, or none without a GPU: module, change, kind and reason."""


def block(path: Path = RECORD) -> str:
    """The score a group, then every survivor with what is known of it."""
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    excused = {_key(each): each for each in json.loads(EXCUSED.read_text(encoding="utf-8"))}
    kinds = {key: each["kind"] for key, each in excused.items()}
    rows, survivors = [], []
    for name, group in groups.items():
        left = [mutant for mutant in group["mutants"] if not mutant["found"]]
        same = sum(kinds.get(_key(mutant)) == "equivalent" or "gone" in mutant for mutant in left)
        device = sum(kinds.get(_key(mutant)) == "on a GPU alone" for mutant in left)
        total, found = len(group["mutants"]), len(group["mutants"]) - len(left)
        counts = (group["possible"], total, group["found_at_first"], found, same, device, len(left) - same - device)
        rows.append((name, *map(str, counts)))
        for each in left:
            reason = _why(each, excused.get(_key(each)))
            survivors.append((f"`{each['module']}`", f"`{each['before']}` to `{each['after']}`", reason))
    head = ["modules", "possible", "sample", "found at first", "found", "equivalent or gone", "on a GPU alone", "left"]
    return "\n\n".join(
        [compact(head, rows, left=(0,)), compact(["survivor", "change", "why"], survivors, left=(0, 1, 2))]
    )


def _key(mutant: Mapping[str, Any]) -> tuple[str, str, str]:
    return mutant["module"], mutant["before"], mutant["after"]


def _why(mutant: Mapping[str, Any], excused: Mapping[str, Any] | None) -> str:
    if "gone" in mutant:
        return "gone: the line was mended"
    return "left" if excused is None else f"{excused['kind']}: {excused['why']}"
