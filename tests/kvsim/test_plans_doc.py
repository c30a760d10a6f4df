"""docs/plans.md names exactly the keys that the commands' rows have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.cli import run

TEXT = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
MODEL = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm:1", "--json"]
COMMANDS = {
    "kvsim.plan/1": ["plan", *MODEL, "--users", "20"],
    "kvsim.goodput/1": ["goodput", *MODEL, "--rate", "2", "--requests", "20"],
    "kvsim.offload/1": ["offload", *MODEL, "--ctx", "4k"],
    "kvsim.breakeven/1": ["breakeven", *MODEL, "--batch", "8", "--ctx", "4k"],
    "kvsim.sweep/1": ["sweep", "--model", "gpt2", "--ctx", "1k", "--json"],
    "kvsim.page/1": ["report", *MODEL],
}


@pytest.mark.parametrize("schema", COMMANDS)
def test_the_rows_hold_what_the_document_says(schema: str, capfd) -> None:
    assert run(COMMANDS[schema]) == 0
    document = json.loads(capfd.readouterr().out)
    line = re.search(rf"^\| `{schema}` \| (.+) \|$", TEXT, re.MULTILINE)[1]
    assert document["schema"] == schema
    assert {"schema", "inputs", "notes", "not_modelled", "rows"} <= set(document)
    for row in document["rows"]:
        assert list(row) == re.findall(r"`(\w+)`", line)
