"""Rows that belong together in a table, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvruntime.bench.harness.results import Row

BASE = ("fp16", "bf16", "fp32")


def groups(rows: Iterable[Row], kind: str) -> list[list[Row]]:
    """The finished rows of one kind, those of one model, weights, dtype, seed and setting together."""
    setting = ("prompt_tokens", "decode_tokens", "text_sha256", "window", "chunk", "num_windows", "prompt_length")
    names = ("model", "weights", "model_sha256", "dtype", "seed", *setting)
    out: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == kind and "failed" not in row:
            out.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(out.values())


def baseline(row: Row, group: Iterable[Row], *same: str) -> Row | None:
    """The uncompressed row of ``group`` that agrees with ``row`` in the fields ``same``."""
    return next((b for b in group if b["method"] in BASE and all(b[name] == row[name] for name in same)), None)


def of_kernel(cache: Any) -> Row:
    """``{"kernel": words}`` where a cache says what attends to one query a row, as kvruntime's do."""
    words = getattr(cache, "kernel", "")
    return {"kernel": words} if words else {}


def kernels(group: Iterable[Row]) -> str:
    """A line on what attended under each method, where rows say it."""
    group = list(group)
    said = dict.fromkeys(f"{row['method']}: {row['kernel']}" for row in group if "kernel" in row)
    layers = dict.fromkeys(row["layers"] for row in group if "layers" in row)
    out = f"\nkernels: {'; '.join(said)}" if said else ""
    return out + (f"\nlayers but attention: {', '.join(layers)}" if layers else "")


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
