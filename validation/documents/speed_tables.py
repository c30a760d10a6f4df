"""The documents' tables of speed: what ``bench kernels``, ``engine`` and ``generate`` recorded, short and in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvruntime.bench.engine import report as engine_report
from kvruntime.bench.generate import report as generate_report
from kvruntime.bench.harness.results import Row, read
from kvruntime.bench.harness.tables import BASE, ratio
from kvruntime.bench.kernels import report as kernel_report
from kvsim.output.tables import compact
from validation.documents.memory_tables import circumstances, commit
from validation.recorded import FOLDER


def block(arguments: str, folder: Path = FOLDER) -> str:
    """``kernels``, ``packing``, ``engine``, ``generate``, ``again`` (its second process) or ``compiled``; Markdown.

    With ``short``: what the README shows, and with a card's word after it of that card alone (``h200``).

    Raises ``ValueError`` for other words.
    """
    words = arguments.split()
    what = words[0] if words else ""
    if what not in FULL or words[1:2] not in ([], ["short"]) or len(words) > 3:
        raise ValueError(f"speed table {arguments!r}: allowed are {', '.join(FULL)}, and short after it")
    kind = what if what in ("engine", "generate", "again", "compiled") else "kernels"
    paths = [path for path in sorted((folder / kind).glob("*.json")) if not words[2:] or words[2] in path.stem]
    parts = []
    for path in paths:
        file = read(path)
        body = (SHORT if words[1:] else FULL)[what](file["rows"])
        if body:
            about = summary(file) if words == ["generate", "short"] else circumstances(file)
            parts.append(f"{about} ([{path.name}]({link(path, short=bool(words[1:]))})):\n\n{body}")
    name = "validation/record.sh"
    return "\n\n".join(parts) or f"Nothing is recorded yet: `{name}` does it on a machine with a GPU."


def summary(file: dict[str, Any]) -> str:
    """Device, versions and commits of a results file; the commands stand beside the full table."""
    versions = ", ".join(f"{name} {file['versions'][name]}" for name in ("torch", "triton", "transformers"))
    commits = ", ".join(dict.fromkeys(commit(row, file) for row in file["rows"]))
    return f"{file['device']['name']}, {versions}, commit {commits}"


def link(path: Path, short: bool) -> str:
    """The file as the README, or a document one folder down, links to it."""
    return ("" if short else "../") + f"validation/results/{path.parent.name}/{path.name}"


def short_kernels(rows: Sequence[Row]) -> str:
    """One line a shape: microseconds and the ratio to the best float16 attention of the same run.

    A column a layout that was asked for; of each the shortest residual that was measured.
    """
    layouts = kernel_report.layouts_asked()
    found = [row for row in kernel_report.done(rows, "attend") if kernel_report.asked(row) is not None]
    shapes = dict.fromkeys(kernel_report.title(row) for row in found)
    body = []
    for shape in shapes:
        own = [row for row in found if kernel_report.title(row) == shape]
        base = kernel_report.baseline(own[0], rows)
        cells = [shape, kernel_report.micro(base["seconds"][0]) if base else ""]
        for layout in layouts:
            row = min((row for row in own if row["method"].startswith(layout + "-r")), key=residual, default=None)
            cells.append(
                f"{kernel_report.micro(row['seconds'][0])} ({ratio(kernel_report.speedup(row, rows))})" if row else "–"
            )
        body.append(cells)
    head = [
        "one layer, batch x tokens",
        "fp16 µs",
        *(layout.partition("-")[2].replace("-", " ") for layout in layouts),
    ]
    return f"{kernel_report.ceilings(rows)}\n\n{compact(head, body, left=(0,))}" if body else ""


def residual(row: Row) -> int:
    """The residual length that a method's name ends in."""
    return int(row["method"].rpartition("-r")[2].partition("-")[0])


def full_kernels(rows: Sequence[Row]) -> str:
    return fenced(
        kernel_report.ceilings(rows), kernel_report.attention_table(rows), *failures(rows, "sdpa", "full", "attend")
    )


def full_packing(rows: Sequence[Row]) -> str:
    tables = kernel_report.pack_table(rows), kernel_report.append_table(rows)
    return fenced(*tables, *failures(rows, "pack", "append"))


def failures(rows: Sequence[Row], *kinds: str) -> list[str]:
    """A line each: a shape that a method or a baseline does not run is part of the record."""
    failed = [row for row in rows if "failed" in row and row["kind"] in kinds]
    lines = [f"failed: {kernel_report.name(row)} {kernel_report.title(row)}: {row['failed']}" for row in failed]
    return ["\n".join(lines)] * bool(lines)


def fenced(*tables: str) -> str:
    text = "\n\n".join(table for table in tables if table)
    return f"```text\n{text}\n```" if text else ""


def short_engine(rows: Sequence[Row]) -> str:
    """One line a size: tokens a second of the 16-bit engine, and of each layout with milliseconds and ratio."""
    parts = []
    for group in engine_report.groups(rows, "step"):
        own = [row for row in group if row["package"] == "kvruntime"]
        methods = sorted(dict.fromkeys(row["method"] for row in own), key=lambda method: method not in BASE)
        body = []
        for batch_size, context in sorted({(row["batch_size"], row["num_tokens"]) for row in own}):
            cells = [f"{batch_size} x {kernel_report.size(context)}"]
            for method in methods:
                row = next(
                    (
                        r
                        for r in own
                        if (r["batch_size"], r["num_tokens"], r["method"]) == (batch_size, context, method)
                    ),
                    None,
                )
                cells.append(step_cell(row, group))
            body.append(cells)
        head = ["batch x context", *methods]
        parts.append(f"{group[0]['model']}, {group[0]['dtype']}, weights: {group[0]['weights']}; ms/step, tok/s, ratio")
        parts.append(compact(head, body, left=(0,)))
        lines = engine_report.line_body(group)[1]
        said = [
            f"{cells[0]}: {cells[3]} of the 16-bit slope, break-even (tokens) {cells[4]}"
            for cells in lines
            if len(cells) > 4
        ]
        if said:
            parts.append("Latency over context in batch 1: " + "; ".join(said) + ".")
    return "\n\n".join(parts)


def short_generate(rows: Sequence[Row]) -> str:
    """One line a size: milliseconds a step of stock caches, of each of ours with the ratio to the faster stock one.

    What was compiled by hand, a host's steps and calls that are not greedy stand in the full table alone.
    """
    greedy = [row for row in kernel_report.done(rows, "generate") if generate_report.call(row) == "greedy"]
    found = [row for row in greedy if not (row["runs"] and is_ours(row))]
    names = dict.fromkeys(generate_report.label(row) for row in found)
    body = []
    for group in engine_report.groups(found, "generate"):
        for batch_size, num_tokens in dict.fromkeys((row["batch_size"], row["num_tokens"]) for row in group):
            name = group[0]["model"] + ("" if group[0]["weights"].startswith("random") else ", real weights,")
            size = f"{name} {batch_size} x {kernel_report.size(num_tokens)}"
            body.append([size, *(generate_cell(name, batch_size, num_tokens, group) for name in names)])
    return compact(["ms a step, batch x prompt", *names], body, left=(0,)) if body else ""


def is_ours(row: Row) -> bool:
    """Whether a row of ``generate`` is of one of this package's caches."""
    return row["method"] not in generate_report.STOCK and row.get("package") not in generate_report.QUANTIZED


def generate_cell(name: str, batch_size: int, num_tokens: int, group: Sequence[Row]) -> str:
    same = [row for row in group if (row["batch_size"], row["num_tokens"]) == (batch_size, num_tokens)]
    row = next((row for row in same if generate_report.label(row) == name), None)
    if row is None:
        return "–"
    best, seconds = generate_report.best_stock(row, group), generate_report.seconds(row)
    new = generate_report.new_lengths(row)
    if new is not None:
        return f"{1e3 * seconds:.2f} ({1e3 * new:.2f})"
    beside = best is not None and is_ours(row)
    return f"{1e3 * seconds:.2f}" + (f" ({ratio(generate_report.seconds(best) / seconds)})" if beside and best else "")


def full_generate(rows: Sequence[Row]) -> str:
    return fenced(generate_report.tables(rows))


def step_cell(row: Row | None, group: Sequence[Row]) -> str:
    if row is None:
        return "–"
    text = f"{1e3 * row['seconds_per_step'][0]:.3f} ms, {row['tokens_per_second'][0]:,.0f}"
    return text if row["method"] in BASE else f"{text} ({ratio(engine_report.speedup(row, group))})"


def full_engine(rows: Sequence[Row]) -> str:
    return fenced(engine_report.tables(rows))


FULL: dict[str, Any] = {
    "kernels": full_kernels,
    "packing": full_packing,
    "engine": full_engine,
    "generate": full_generate,
    "again": full_generate,
    "compiled": full_generate,
}
SHORT: dict[str, Any] = FULL | {"kernels": short_kernels, "engine": short_engine, "generate": short_generate}
