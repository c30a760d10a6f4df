"""Rows of ``kvruntime eval`` as plain tables, each under a line that says what it was measured on."""

from __future__ import annotations

from collections.abc import Sequence

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import BASE, groups
from kvruntime.bench.model.report import heading, note
from kvruntime.bench.quality.windows import KIND
from kvruntime.eval.intervals import perplexity_change
from kvsim.output.tables import plain

CONTROL = (
    "fp16 is the control: the same uncompressed cache under other kernels and chunks; KL and top-1 are against "
    "transformers' own cache"
)


def tables(rows: Sequence[Row]) -> str:
    """Every table that ``rows`` hold something for, then what is missing or failed."""
    blocks = []
    for group in groups(rows, KIND):
        blocks += [windows_table(group), positions_table(group)]
    blocks += [note(row) for row in rows if row["kind"] in ("missing", "skipped") or "failed" in row]
    return "\n\n".join(blocks)


def uncompressed(group: Sequence[Row]) -> Row | None:
    """The row of the group's uncompressed cache."""
    return next((row for row in group if row["method"] in BASE), None)


def change(row: Row, base: Row | None) -> tuple[float, float, float] | None:
    """Perplexity against the uncompressed cache's: ``(share, low, high)``, a paired bootstrap over windows."""
    if base is None or row is base:
        return None
    return perplexity_change(row["window_nll"], base["window_nll"])


def windows_cells(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of one text and length of window, fewest bits first below the uncompressed."""
    base = uncompressed(group)
    body = []
    for row in sorted(group, key=lambda row: (row["method"] not in BASE, row["bits"] or row["held_bits"])):
        off = change(row, base)
        cells = ["", ""] if off is None else [f"{off[0]:+.2%}", f"{off[1]:+.2%} to {off[2]:+.2%}"]
        cells = [row["method"], f"{row['bits']:.3f}", f"{row['held_bits']:.3f}", f"{row['ppl']:.3f}", *cells]
        body.append([*cells, f"{row['kl']:.5f}", f"{row['agreement']:.2%}"])
    head = ["method", "bits", "bits held", "perplexity", "against fp16", "95 % interval", "KL, nats", "top-1"]
    return head, body


def windows_table(group: list[Row]) -> str:
    first = group[0]
    fed = f"{first['num_tokens']:,} tokens scored, {first['chunk']} a step through the cache"
    what = f"{first['text']}, {first['num_windows']} windows of {first['window']:,}, {fed}"
    return "\n".join([heading("perplexity", first, what), plain(*windows_cells(group)), CONTROL])


def position_cells(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of perplexity against the uncompressed cache's, by a token's position in its window."""
    base = uncompressed(group)
    first = base or group[0]
    head = ["method", *(f"{low:,} to {high:,}" for low, high, *_ in first["by_position"])]
    body = []
    for row in group:
        if base is None or row is base:
            cells = [f"{_ppl(nll):.2f}" for _, _, nll, *_ in row["by_position"]]
        else:
            pairs = zip(row["by_position"], base["by_position"], strict=True)
            cells = [f"{_ppl(own[2] - plain_[2]) - 1:+.2%}" for own, plain_ in pairs]
        body.append([row["method"], *cells])
    return head, body


def positions_table(group: list[Row]) -> str:
    return "by a token's position in its window, against fp16:\n" + plain(*position_cells(group))


def _ppl(nll: float) -> float:
    from math import exp

    return exp(nll)
