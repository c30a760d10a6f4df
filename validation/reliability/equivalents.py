"""Mutants that no test can notice, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""``(module, before, after)`` -> why nobody could tell them apart."""


def reason(row: Mapping[str, Any]) -> str | None:
    """Why a survivor is none; None where it is one."""
    return EQUIVALENT.get((row["module"], row["before"], row["after"]))
