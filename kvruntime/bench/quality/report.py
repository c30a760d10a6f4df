"""Rows of ``kvruntime eval`` as plain tables, each under a line that says what it was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import BASE, groups, kernels
from kvruntime.bench.model.report import heading, note
from kvruntime.bench.quality.answers import KIND as ANSWERS
from kvruntime.bench.quality.windows import KIND
from kvruntime.eval.intervals import mean_interval, perplexity_change
from kvruntime.eval.tasks import TASKS
from kvsim.output.tables import plain

CONTROL = (
    "fp16 is the control: the same uncompressed cache under other kernels and chunks; KL and top-1 are against "
    "transformers' own cache"
)


HARNESS = "lm-eval"
"""The kind of lm-evaluation-harness' rows."""


def tables(rows: Sequence[Row]) -> str:
    """Every table that ``rows`` hold something for, then what is missing or failed."""
    blocks = []
    for group in groups(rows, KIND):
        blocks += [windows_table(group), positions_table(group)]
    blocks += answers_tables(rows)
    for group in harness_groups(rows):
        blocks.append("\n".join([heading("lm-eval", group[0], harness_what(group)), plain(*harness_cells(group))]))
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
    return "\n".join([heading("perplexity", first, what), plain(*windows_cells(group)) + kernels(group), CONTROL])


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
    return exp(nll)


def answers_tables(rows: Sequence[Row]) -> list[str]:
    """One table a task and model: scores of every method, over all examples and by part."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == ANSWERS and "failed" not in row:
            names = ("model", "weights", "model_sha256", "dtype", "seed", "task")
            found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return [answers_table(group) for group in found.values()]


def answers_cells(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of one task: the score over the examples that all methods answered, its interval, the paired
    difference from the uncompressed cache, and the score of each column of parts."""
    methods = list(dict.fromkeys(row["method"] for row in group))
    held = {method: {row["examples_sha256"]: row for row in group if row["method"] == method} for method in methods}
    shared = [key for key in held[methods[0]] if all(key in rows for rows in held.values())]
    columns = list(dict.fromkeys(column(held[methods[0]][key]) for key in shared))
    base = next((method for method in methods if method in BASE), None)
    body = []
    for method in methods:
        rows = [held[method][key] for key in shared]
        scores = [score for row in rows for score in row["scores"]]
        if not scores:
            continue
        mean, low, high = mean_interval(scores)
        cells = [
            method,
            f"{rows[0]['bits']:.3f}" if "bits" in rows[0] else "",
            f"{mean:.1%}",
            f"{low:.1%} to {high:.1%}",
        ]
        if base is None or method == base:
            cells.append("")
        else:
            plain_scores = [score for key in shared for score in held[base][key]["scores"]]
            off = mean_interval([own - theirs for own, theirs in zip(scores, plain_scores, strict=True)])
            cells.append(f"{100 * off[0]:+.1f} ({100 * off[1]:+.1f} to {100 * off[2]:+.1f})")
        for name in columns:
            own = [score for row in rows if column(row) == name for score in row["scores"]]
            cells.append(f"{sum(own) / len(own):.1%}")
        body.append(cells)
    return ["method", "bits", "score", "95 % interval", "points against fp16", *columns], body


def column(row: Row) -> str:
    """The column of a row's part: the dataset or kind, else the length, else all examples."""
    kind = row.get("dataset") or row.get("kind_of")
    length = f"{row['length']:,}" if "length" in row else ""
    return " ".join(filter(None, (kind, length))) or "all"


def answers_table(group: Sequence[Row]) -> str:
    first = group[0]
    task = TASKS.get(first["task"])
    what = f"{first['task']}: {task.what}" if task else first["task"]
    count = sum(row["num_examples"] for row in group if row["method"] == first["method"])
    lines = [heading("answers", first, f"{what}; {count:,} examples"), plain(*answers_cells(group))]
    lines += [task.caveat] if task and task.caveat else []
    return "\n".join(lines)


def harness_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each task of lm_eval, over the same examples of the same model."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == HARNESS and "failed" not in row:
            names = ("model", "model_sha256", "dtype", "task", "limit", "chat", "lm_eval")
            found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(found.values())


def harness_what(group: Sequence[Row]) -> str:
    """``gsm8k of lm_eval 0.4.13, 20 examples``."""
    first = group[0]
    return f"{first['task']} of lm_eval {first['lm_eval']}, {sum(first['num_examples'].values()):,} examples"


def harness_cells(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of one task of lm_eval: its metrics with their standard errors, a line a method."""
    names = dict[tuple[str, str], None]()
    for row in group:
        names |= {(task, name): None for task, values in row["metrics"].items() for name in values}
    shown = [(task, name) for task, name in names if "_stderr" not in name and name != "sample_len"]
    many = len(group[0]["metrics"]) > 1
    body = []
    for row in group:
        cells = []
        for task, name in shown:
            value = row["metrics"].get(task, {}).get(name)
            error = row["metrics"].get(task, {}).get(_stderr(name))
            cells.append("" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error else ""))
        body.append([row["method"], *cells])
    return ["method", *(f"{task} {name}" if many else name for task, name in shown)], body


def _stderr(name: str) -> str:
    """``exact_match,none`` -> ``exact_match_stderr,none``."""
    metric, comma, filtered = name.partition(",")
    return f"{metric}_stderr{comma}{filtered}"
