"""The documents' tables of serving: loads beside bf16's of the same run, pools, and runs replayed in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsim.output.tables import compact
from validation.claims import serving
from validation.documents.memory_tables import commit
from validation.recorded import FOLDER

Row = dict[str, Any]


def block(arguments: str) -> str:
    """``loads``, ``pools`` or ``agreement``; Markdown.  Raises ``ValueError`` for another word."""
    made = TABLES.get(arguments.strip())
    if made is None:
        raise ValueError(f"serving table {arguments!r}: allowed are {', '.join(TABLES)}")
    rows = serving.rows_of()
    paths = sorted((FOLDER / "serving").glob("*.json"))
    links = ", ".join(f"[{path.name}](validation/results/serving/{path.name})" for path in paths)
    return f"{circumstances(rows)} ({links}):\n\n{made(rows)}"


def circumstances(rows: Sequence[Row]) -> str:
    """Cards and versions, each once."""
    return "; ".join(
        dict.fromkeys(
            ", ".join([row["device_name"], *(f"{name} {value}" for name, value in row["versions"].items())])
            for row in rows
        )
    )


def loads(rows: Sequence[Row]) -> str:
    """A table a run: of each load three lines, a step of decoding, kvsim's, and the whole with its tokens a second over
    bf16's."""
    found = [row for row in rows if row["kind"] == "load"]
    out = []
    for run in dict.fromkeys(row["run"] for row in found):
        own = [row for row in found if row["run"] == run]
        names = sorted({row["method"]["name"] for row in own}, key=_place)
        body = []
        for load in dict.fromkeys(map(serving.load_of, own)):
            cells = {row["method"]["name"]: row for row in own if serving.load_of(row) == load}
            requests, prompt, new, computed = load
            title = f"{requests} x {prompt:,}, {new} new{', prompts computed' if computed else ''}"
            body.append([f"{title}: ms a step", *(_step(cells.get(name)) for name in names)])
            body.append(["the same by kvsim", *(_predicted(cells.get(name)) for name in names)])
            body.append(["the same: s for all", *(_whole(cells.get(name), cells.get(serving.BASE)) for name in names)])
        hashes = ", ".join(dict.fromkeys(commit(row, row) for row in own))
        out.append(compact([f"{run} (commit {hashes})", *names], body, left=(0,)))
    return "\n\n".join(out)


def _place(name: str) -> tuple[int, str]:
    """The uncompressed caches come last."""
    return ([*("fp8", serving.BASE)].index(name) + 1 if name in ("fp8", serving.BASE) else 0), name


def _step(row: Row | None) -> str:
    if row is None or not row["step_seconds"]:
        return "–"
    few = f" ({row['at_once']} at once)" if row["at_once"] < row["requests"] else ""
    return f"{1e3 * serving.steady(row['step_seconds']):.2f}{few}"


def _predicted(row: Row | None) -> str:
    return "–" if row is None or not row["step_seconds"] else f"{1e3 * serving.step(row).seconds.value:.2f}"


def _whole(row: Row | None, base: Row | None) -> str:
    if row is None:
        return "–"
    times = f" ({serving.gain(row, base):.2f}x)" if base is not None and base is not row else ""
    return f"{serving.steady(row['seconds']):.2f}{times}"


def pools(rows: Sequence[Row]) -> str:
    """A line a cache: blocks, tokens, requests, and today's kvsim beside them."""
    found = {row["method"]["name"]: row for row in rows if row["kind"] == "pool"}
    base = found[serving.BASE]
    body = []
    for name in sorted(found, key=_place):
        row = found[name]
        blocks, tokens = serving.pools(row)
        times = row["concurrency"] / base["concurrency"]
        body.append(
            [
                *(name, f"{row['num_gpu_blocks']:,}", f"{blocks:,}", f"{row['num_tokens']:,}", f"{tokens:,}"),
                *(f"{row['concurrency']:.2f}", f"{times:.2f}"),
            ]
        )
    longest = f"requests of {base['max_model_len']:,} tokens"
    head = ["cache", "blocks", "kvsim's", "KV cache size, tokens", "kvsim's", longest, "times bf16's"]
    return compact(head, body, left=(0,))


def agreement(rows: Sequence[Row]) -> str:
    """A line a run: likeliest tokens that are the same, and differences of log probabilities."""
    body = [
        [
            *(row["what"], f"{row['greedy']} of {row['tokens']}", _small(row["mean"]), _small(max(row["worst"]))),
            commit(row, row),
        ]
        for row in rows
        if row["kind"] == "agreement"
    ]
    return compact(["vLLM", "likeliest token is the same", "mean", "worst", "commit"], body, left=(0, 4))


def _small(value: float) -> str:
    """Two digits; what rounds to nothing is said so."""
    return f"{value:.2g}" if value >= 1e-7 else "below 1e-7"


TABLES = {"loads": loads, "pools": pools, "agreement": agreement}
