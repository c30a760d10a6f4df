"""The two commands: what is measured, in which order, and the line that a reader needs of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvruntime.bench.engine.suite import chosen, size_of
from kvsim.specs import parse_dtype
from validation.ranks.all_reduce import SIZES, curve
from validation.ranks.fit import fitted
from validation.ranks.group import Rows, chosen_path, join, leave, say


def all_reduces(sizes: Sequence[int], record: bool, out: Path | None) -> int:
    """``python -m validation all-reduce``; its exit code."""
    group = join()
    rows = Rows(group, chosen_path(group, record, out), _command())
    for row in curve(group, sizes or SIZES):
        rows.add(row)
    for way in dict.fromkeys(row["way"] for row in rows.store.rows):
        own = [row for row in rows.store.rows if row.get("way") == way and row["kind"] == "all_reduce"]
        if len({row["nbytes"] for row in own}) > 1:
            latency, speed = fitted(own)
            say(group, f"{way}: {1e6 * latency:.2f} us times log2(2 ranks), and a ring at {speed / 1e9:.0f} GB/s")
    leave()
    return 0


def tensor_parallel(given: dict[str, Any], record: bool, out: Path | None) -> int:
    """``python -m validation tensor-parallel``; its exit code: 1 where tokens or bytes are not as they should be.

    Raises ``ValueError`` and ``LookupError`` for what cannot be run.
    """
    import torch

    from validation.ranks.model import config_of, split_model
    from validation.ranks.steps import WAYS, Load

    names = dict(zip(("model", "engine", "silent"), WAYS, strict=True))
    for way in given["ways"]:
        if way not in names:
            raise LookupError(f"unknown way {way!r}: allowed are {', '.join(names)}")
    batch_size, num_tokens = size_of(given["size"])
    dtype = parse_dtype(given["dtype"])
    methods = chosen(given["specs"], dtype)
    config = config_of(given["model"], given["layers"], num_tokens)
    group = join()
    rows = Rows(group, chosen_path(group, record, out), _command())
    model = split_model(config, group, getattr(torch, dtype))
    weights = sum(weight.nbytes for weight in map(_local, model.parameters()))
    say(group, f"{given['model']}, {config.num_hidden_layers} layers: {weights:,} B of weights a rank, random")
    load = Load(group, model, batch_size, num_tokens)
    about = {"model": given["model"], "num_layers": config.num_hidden_layers, "dtype": dtype}
    about |= {"weights": "random", "weights_nbytes": weights}
    wrong = 0
    for way in given["ways"] or names:
        for row in load.rows(names[way], methods):
            rows.add({**row, **about})
            differs = row.get("equal_tokens") is False or row.get("nbytes") != row.get("kvsim_nbytes")
            wrong += differs or "failed" in row
    leave()
    return 1 if wrong else 0


def _local(weight: Any) -> Any:
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _command() -> str:
    return " ".join(["python -m validation", *sys.argv[1:]])
