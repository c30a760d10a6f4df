"""The documents' tables of models split over ranks: what ``python -m validation all-reduce`` and ``tensor-parallel``
recorded, beside kvsim's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvruntime.bench.harness.store import Row
from kvsim.finite_json import read_json
from kvsim.output.tables import compact
from validation.latency.links import STOCK, all_reduce, parts
from validation.recorded import FOLDER

WITHOUT = " without all-reduces"
WAYS = {"engine": "`Engine`", "model": "the model's forward"}


def block(arguments: str, folder: Path = FOLDER) -> str:
    """``all-reduces`` or ``steps``; Markdown.  Raises ``ValueError`` for other words."""
    what = arguments.strip()
    if what not in TABLES:
        raise ValueError(f"table of ranks {arguments!r}: allowed are {', '.join(TABLES)}")
    out = []
    for path in sorted((folder / "ranks").glob("*.json")):
        rows = [row for row in read_json(path, "record")["rows"] if "failed" not in row]
        for ranks in sorted({row["ranks"] for row in rows}):
            own = [row for row in rows if row["ranks"] == ranks]
            out.append(f"{summary(own, path)}:\n\n{TABLES[what](own)}")
    return "\n\n".join(out) or "Nothing is recorded yet."


def summary(rows: Sequence[Row], path: Path) -> str:
    """Cards, versions and commits."""
    first = rows[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "transformers"))
    commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in rows))
    link = f"[{path.name}](validation/results/ranks/{path.name})"
    return f"{first['ranks']} x {first['device']}, {versions}, NCCL {first['nccl']}, commit {commits} ({link})"


def all_reduces(rows: Sequence[Row]) -> str:
    """A line a size, microseconds."""
    seconds = {(row["way"], row["nbytes"]): row["seconds"][0] for row in rows if row["kind"] == "all_reduce"}
    graphs = [row for row in rows if row["kind"] == "all_reduce" and row["way"] == "graph"]
    body = [
        [
            f"{row['nbytes']:,}",
            f"{1e6 * seconds['eager', row['nbytes']]:.1f}",
            f"{1e6 * row['seconds'][0]:.1f}",
            f"{1e6 * all_reduce(row):.1f}",
            f"{all_reduce(row) / row['seconds'][0] - 1:+.0%}",
        ]
        for row in graphs
    ]
    return compact(["bytes", "one by one, µs", "in a graph, µs", "kvsim, µs", "error"], body)


def steps(rows: Sequence[Row]) -> str:
    """A line a load, way and method; of ``Engine`` the step without its all-reduces behind it."""
    timed = [row for row in rows if row["kind"] == "step"]
    about = ("model", "num_layers", "method", "batch_size", "num_tokens")
    silent = {
        tuple(
            row[name] for name in about
        ): f"{1e3 * row['seconds_per_step'][0]:.2f}; {1e3 * sum(parts(row).values()):.2f}"
        for row in timed
        if row["way"].endswith(WITHOUT)
    }
    body = []
    for row in timed:
        if row["way"].endswith(WITHOUT):
            continue
        seconds, predicted = row["seconds_per_step"][0], sum(parts(row).values())
        alone = silent.get(tuple(row[name] for name in about), "") if row["way"] == "engine" else ""
        body.append(
            [
                f"{row['model']}, {row['batch_size']} x {row['num_tokens']:,}",
                WAYS[row["way"]],
                row["method"],
                f"{1e3 * seconds:.2f}",
                f"{1e3 * predicted:.2f}",
                f"{predicted / seconds - 1:+.1%}",
                alone,
                "" if row["method"] == STOCK else f"{row['nbytes']:,}",
            ]
        )
    head = ["load", "step of", "cache", "ms", "kvsim, ms", "error", "without all-reduces; kvsim, ms", "bytes a rank"]
    return compact(head, body, left=(0, 1, 2))


TABLES = {"all-reduces": all_reduces, "steps": steps}
