"""Mutants that the tests cannot notice, each with its reason: ``excused.json`` beside this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("excused.json")


@cache
def reasons() -> dict[tuple[str, str, str], str]:
    """``(module, before, after)`` -> why nobody can tell them apart, or none without a GPU."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    return {(row["module"], row["before"], row["after"]): f"{row['kind']}: {row['why']}" for row in rows}


def reason(row: Mapping[str, Any]) -> str | None:
    """Why a survivor is none here; None where it is one."""
    return reasons().get((row["module"], row["before"], row["after"]))
