"""The documents' tables of memory and quality: what the recorded files hold, in short for the README and in full."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvruntime.bench.harness.results import Row, read
from kvruntime.bench.harness.tables import BASE, baseline, groups, ratio
from kvruntime.bench.model.report import MIB, compression, heading
from kvruntime.bench.model.report import tables as bench_tables
from kvsim.output.tables import compact
from validation.documents.tables import claims_table
from validation.recorded import FOLDER, read_all

BENCH = FOLDER / "bench"
SHOWN = ("bytes held, unique storages", "asked of the allocator, generate()", "live tensors, generate()")
"""What the short table of claims keeps: a word of each claim."""


def block(arguments: str, folder: Path = BENCH) -> str:
    """The table called ``arguments``, one of ``BLOCKS``, in Markdown.  Raises ``ValueError`` for other words."""
    if arguments.strip() not in BLOCKS:
        raise ValueError(f"table of results {arguments.strip()!r}: allowed are {', '.join(BLOCKS)}")
    return BLOCKS[arguments.strip()](folder)


def claims(folder: Path) -> str:
    """Predicted against measured, every claim."""
    return compact(*claims_table(read_all()))


def short_claims(folder: Path) -> str:
    """The cache's own bytes, and the peaks of ``generate()``."""
    head, body = claims_table(read_all())
    return compact(head, [cells for cells in body if any(word in cells[0] for word in SHOWN)])


def benchmarks(folder: Path) -> str:
    """Every recorded benchmark as it was printed, with the command that made it."""
    parts = []
    for path, file in recorded(folder):
        parts += [f"{circumstances(file)} ([{path.name}](../validation/results/bench/{path.name})):"]
        parts += [f"```text\n{bench_tables(file['rows'])}\n```"]
    return "\n\n".join(parts)


def memory(folder: Path) -> str:
    """MiB of one sequence's cache by length: a line a model and method, those of the file with the most methods."""
    lines: list[tuple[Row, dict[int, str]]] = []
    chosen = by_model(folder, "memory", lambda rows: len({row["method"] for row in rows}))
    lengths = sorted({row["num_tokens"] for group in chosen for row in group})
    for group in chosen:
        for method in dict.fromkeys(row["method"] for row in group):
            own = [row for row in group if row["method"] == method]
            lines.append((own[0], {row["num_tokens"]: mebibytes(row, group) for row in own}))
    head = ["model", "MiB of one sequence", *(f"{length:,}" for length in lengths)]
    body = [[row["model"], row["method"], *(cells.get(length, "") for length in lengths)] for row, cells in lines]
    off = max((abs(row["nbytes"] - row["predicted_nbytes"]) for group in chosen for row in group), default=0)
    return f"{compact(head, body)}\n\nLargest difference from kvsim's prediction in this table: {off} B."


def mebibytes(row: Row, group: Sequence[Row]) -> str:
    size = f"{row['nbytes'] / MIB:.2f}"
    return size if row["method"] in BASE else f"{size} ({ratio(compression(row, group))})"


def generate(folder: Path) -> str:
    """Tokens a second of transformers' own forward, one launch at a time: a line a device, model and batch size."""
    body: list[list[str]] = []
    found = [(file, group) for _, file in recorded(folder) for group in groups(file["rows"], "speed")]
    methods = list(dict.fromkeys(row["method"] for _, group in found for row in group))
    for file, group in found:
        for batch_size in sorted({row["batch_size"] for row in group}):
            rows = {row["method"]: row for row in group if row["batch_size"] == batch_size}
            what = [file["device"]["name"], group[0]["model"], f"{batch_size}"]
            body.append([*what, *(rate(rows.get(method), group) for method in methods)])
    body.sort(key=lambda cells: (cells[0], cells[1], int(cells[2])))
    commits = {(file["device"]["name"], commit(row, file)): None for file, group in found for row in group}
    said = ", ".join(f"{sha} ({device})" for device, sha in commits)
    table = compact(["device", "model", "batch", *(f"{method} tok/s" for method in methods)], body)
    return f"{table}\n\nRecorded at commits {said}."


def rate(row: Row | None, group: Sequence[Row]) -> str:
    if row is None:
        return ""
    base, middle = baseline(row, group, "batch_size"), row["tokens_per_second"][0]
    if row["method"] in BASE or base is None:
        return f"{middle:,.0f}"
    return f"{middle:,.0f} ({ratio(middle / base['tokens_per_second'][0])})"


def quality(folder: Path) -> str:
    """Perplexity through the cache, of the group that was measured over the most tokens."""
    found = [(path, file, group) for path, file in recorded(folder) for group in groups(file["rows"], "quality")]
    path, file, group = max(found, key=lambda one: one[2][0]["num_tokens"])
    first = group[0]
    steps = f"{first['num_tokens']:,} tokens scored, {first['chunk']} a step through the cache"
    what = heading("Quality", first, f"{first['text']}, windows of {first['window']}, {steps}")
    body = [[row["method"], f"{row['ppl']:.3f}", against(row, baseline(row, group))] for row in group]
    table = compact(["cache", "perplexity", "against fp16"], body)
    return f"{what}; on {file['device']['name']} ([{path.name}](validation/results/bench/{path.name})):\n\n{table}"


def axes(folder: Path) -> str:
    """The ladder of axes: perplexity with keys and values quantized along the right and the wrong ones."""
    found = [(path, group) for path, file in recorded(folder) for group in groups(file["rows"], "axes")]
    path, group = max(found, key=lambda one: one[1][0]["num_tokens"])
    exact = next((row for row in group if row["axes"] == "exact"), None)
    body = [[row["axes"], f"{row['ppl']:.3f}", against(row, exact)] for row in group]
    first = group[0]
    what = f"{first['method']}, {first['text']}, {first['num_tokens']:,} tokens"
    table = compact(["axes", "perplexity", "against exact"], body)
    return f"{what} ([{path.name}](../validation/results/bench/{path.name})):\n\n{table}"


def against(row: Row, base: Row | None) -> str:
    return "" if base is None or base is row else f"{row['ppl'] / base['ppl'] - 1:+.2%}"


def recorded(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files of recorded benchmarks, by name."""
    return [(path, read(path)) for path in sorted(folder.glob("*.json"))]


def by_model(folder: Path, kind: str, rank: Callable[[list[Row]], int]) -> list[list[Row]]:
    """Of every model the group of rows that ranks first, smallest caches first."""
    best: dict[str, list[Row]] = {}
    for _, file in recorded(folder):
        for group in groups(file["rows"], kind):
            model = group[0]["model"]
            if model not in best or rank(group) > rank(best[model]):
                best[model] = group
    return sorted(best.values(), key=lambda group: max(int(row["nbytes"]) for row in group))


def circumstances(file: dict[str, Any], most: int | None = None) -> str:
    """Device, versions, and every command and commit that measured rows of a results file, in one sentence.  Of more
    commands than ``most`` their number and the commits alone."""
    versions = ", ".join(f"{name} {file['versions'][name]}" for name in ("torch", "triton", "transformers"))
    runs: dict[str, None] = {}
    for row in file["rows"]:
        command = row.get("command", file["command"])
        runs[f"`{shlex.join(command)}` (commit {commit(row, file)})"] = None
    said = ", ".join(runs)
    if most is not None and len(runs) > most:
        commits = dict.fromkeys(commit(row, file) for row in file["rows"])
        said = f"{len(runs)} commands, which the rows name, of commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{said} on {file['device']['name']}, {versions}"


def commit(row: Row, file: dict[str, Any]) -> str:
    """The commit that a row was measured at, in short."""
    return (row.get("commit", file.get("commit")) or "unknown")[:12]


BLOCKS: dict[str, Callable[[Path], str]] = {
    "claims": claims,
    "claims short": short_claims,
    "benchmarks": benchmarks,
    "memory": memory,
    "generate": generate,
    "quality": quality,
    "axes": axes,
}
