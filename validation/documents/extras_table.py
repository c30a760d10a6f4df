"""The README's table of extras: what each is for and what it installs, from pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from kvsim.output.tables import compact

ROOT = Path(__file__).resolve().parents[2]
PURPOSE = {
    "plan": "`kvsim plan`, `sweep`, `report --users`",
    "plot": "`kvsim plot`",
    "parquet": "`kvsim sweep --out grid.parquet`",
    "cluster": "`kvsim sweep --scheduler`: a dask cluster",
    "serve": "`kvsim serve`",
    "runtime": "`kvruntime`, all of it, under transformers",
    "vllm": "the plugin of vLLM",
    "harness": "`kvruntime eval --lm-eval`, `kvruntime lm-eval`",
    "peers": "`--peers`: other libraries' caches in the same runs",
    "validation": "`python -m validation`",
    "all": "everything above but vllm, harness and peers",
    "test": "the tests, and all that they need",
}
"""Extra -> what a user wants it for, in the table's order."""


def block() -> str:
    """The table.  Raises ``ValueError`` for an extra without a purpose, or a purpose without one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if extras.keys() != PURPOSE.keys():
        raise ValueError(f"extras without a purpose, or the other way: {sorted(extras.keys() ^ PURPOSE.keys())}")
    rows = [(f"`[{name}]`", what, ", ".join(map(_name, extras[name]))) for name, what in PURPOSE.items()]
    return compact(["extra", "for", "installs"], rows, left=(0, 1, 2))


def _name(requirement: str) -> str:
    inner = re.fullmatch(r"kvsim\[([\w,]+)\]", requirement)
    return f"[{inner[1]}]" if inner else re.split(r"[<>=!; \[]", requirement)[0]
