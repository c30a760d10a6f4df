"""Rows as plain tables, each under a line that says what it was measured on, weights included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import baseline, groups, kernels, ratio
from kvsim.install import install_hint
from kvsim.output.tables import plain

MIB = 1 << 20


def tables(rows: Sequence[Row]) -> str:
    """Memory, speed, quality and axes tables of whatever ``rows`` hold, and what is missing, skipped or failed."""
    blocks = []
    for kind, table in TABLES.items():
        for group in groups(rows, kind):
            blocks.append(table(group))
    blocks += [note(row) for row in rows if row["kind"] in ("missing", "skipped") or "failed" in row]
    return "\n\n".join(blocks)


def figures(row: Row) -> str:
    """What a row found, in a few words, for the line of progress."""
    if "failed" in row:
        return f"failed, {row['failed']}"
    if row["kind"] == "memory":
        return f"{row['nbytes'] / MIB:.2f} MiB"
    if row["kind"] == "speed":
        return f"{row['tokens_per_second'][0]:.1f} tokens/s, {row['ms_per_token'][0]:.2f} ms a step"
    return f"perplexity {row['ppl']:.3f}"


def compression(row: Row, group: Iterable[Row]) -> float | None:
    """Times smaller than the uncompressed cache with the same tokens, both measured."""
    base = baseline(row, group, "num_tokens", "batch_size")
    return None if base is None else base["nbytes"] / row["nbytes"]


def memory_table(group: list[Row]) -> str:
    body = []
    for row in sorted(group, key=lambda row: row["num_tokens"]):
        predicted = row.get("predicted_nbytes")
        off = "" if predicted is None else f"{row['nbytes'] - predicted:+,} B"
        cells = [row["method"], f"{row['num_tokens']:,}", f"{row['nbytes'] / MIB:.2f}", ratio(compression(row, group))]
        cells += [off, row["how"]]
        if "decode_allocated_nbytes" in row:
            cells += [f"{row[name] / MIB:.2f}" for name in ALLOCATOR]
        body.append(cells)
    head = ["method", "tokens", "MiB", "smaller", "against prediction", "how"]
    head += ["allocated MiB", "prefill peak MiB", "decode peak MiB"] * any(len(cells) > 6 for cells in body)
    filled = any(row["how"] == "filled" for row in group)
    tail = "\nfilled: beyond the model's positions; random keys and values put into the layers, no forward" * filled
    return heading("memory", group[0], "batch 1, unique storages weighed") + "\n" + plain(head, body) + tail


ALLOCATOR = ("decode_allocated_nbytes", "prefill_peak_nbytes", "decode_peak_nbytes")


def speed_table(group: list[Row]) -> str:
    body = []
    for row in sorted(group, key=lambda row: row["batch_size"]):
        base = baseline(row, group, "batch_size")
        share = None if base is None else row["tokens_per_second"][0] / base["tokens_per_second"][0]
        middle, low, high = row["tokens_per_second"]
        cells = [row["method"], f"{row['batch_size']}", f"{row['prefill_seconds'][0]:.3f}", f"{middle:.1f}"]
        body.append([*cells, f"{low:.1f} to {high:.1f}", f"{row['ms_per_token'][0]:.2f}", ratio(share)])
    head = ["method", "batch", "prefill s", "decode tok/s", "min to max", "ms/step", "against fp16"]
    first = group[0]
    what = f"{first['prompt_tokens']} prompt + {first['decode_tokens']} decoded tokens, medians of {first['repeats']}"
    return heading("speed", first, what) + "\n" + plain(head, body) + kernels(group)


def quality_table(group: list[Row]) -> str:
    body = []
    for row in group:
        base = baseline(row, group)
        off = "" if base is None else f"{row['ppl'] / base['ppl'] - 1:+.2%}"
        body.append([row["method"], f"{row['ppl']:.4f}", f"{row['nll']:.5f}", off, f"{row['num_tokens']:,}"])
    first = group[0]
    what = f"{first['text']}, windows of {first['window']}, {first['chunk']} token(s) a step through the cache"
    head = ["method", "perplexity", "nll", "against fp16", "tokens"]
    return heading("quality", first, what) + "\n" + plain(head, body)


def axes_table(group: list[Row]) -> str:
    body = []
    exact = next((row for row in group if row["axes"] == "exact"), None)
    for row in group:
        off = "" if exact is None else f"{row['ppl'] / exact['ppl'] - 1:+.2%}"
        body.append([row["axes"], f"{row['ppl']:.4f}", f"{row['nll']:.5f}", off, f"{row['num_tokens']:,}"])
    first = group[0]
    what = f"{first['method']}, simulated (error only, no memory), {first['text']}, windows of {first['window']}"
    return heading("axes", first, what) + "\n" + plain(["axes", "perplexity", "nll", "against exact", "tokens"], body)


def note(row: Row) -> str:
    """One line on a measurement that is not there."""
    if row["kind"] == "missing":
        return f"missing: {row['method']} needs {row['package']}: {install_hint('peers')}"
    if row["kind"] == "skipped":
        return f"skipped: {row['what']}: {row['reason']}"
    return f"failed: {row['kind']} {row.get('method', '')} {row.get('num_tokens', '')}: {row['failed']}"


def heading(kind: str, row: Row, what: str) -> str:
    return f"{kind}: {row['model']}, weights: {row['weights']}, {row['dtype']}; {what}"


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "memory": memory_table,
    "speed": speed_table,
    "quality": quality_table,
    "axes": axes_table,
}
