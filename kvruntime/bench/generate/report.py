"""What ``bench generate`` recorded, every cache beside the best of transformers' own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import isfunction
from math import ceil
from statistics import median_low

from kvruntime.bench.engine.report import groups
from kvruntime.bench.generate.calls import CALLS, DRAFTED, UNDRAFTED
from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import kernels, ratio
from kvruntime.bench.kernels.report import done, size
from kvruntime.bench.model.report import heading, note
from kvsim.methods import METHODS
from kvsim.output.tables import plain

GIB = 1 << 30
FIRST_CALL = 8
"""New tokens of a first call."""
STOCK = ("transformers-dynamic", "transformers-static")
"""What an uncompressed cache costs: as it comes, and compiled by ``generate()``."""


PRESETS = {make().name: name for name, make in METHODS.items() if isfunction(make)}
"""What a method that is settings of another is asked for by, by its own name."""
QUANTIZED = ("optimum-quanto", "hqq")
"""The libraries under transformers' own quantized cache."""
SIZE = ("kind", "model", "weights", "dtype", "batch_size", "num_tokens", "new_tokens", "prompt")


def label(row: Row) -> str:
    """The cache, and how its steps run where there are several ways."""
    name = PRESETS.get(row["method"], str(row["method"]))
    return f"{name}, {row['runs']}" if row["runs"] else name


def call(row: Row) -> str:
    """What kind of call a row timed: ``greedy`` and others."""
    return str(row.get("call", "greedy"))


def same_size(row: Row, rows: Iterable[Row]) -> list[Row]:
    """Finished rows of transformers' own caches, the quantized ones too, at a row's size and under its kind of call;
    beside drafted ones those at the same prompt without drafts."""
    own = (one for one in done(rows, row["kind"]) if one["method"] in STOCK or one.get("package") in QUANTIZED)
    calls = (DRAFTED, UNDRAFTED) if call(row) == DRAFTED else (call(row),)
    return [one for one in own if call(one) in calls and all(one.get(name) == row.get(name) for name in SIZE)]


def best_stock(row: Row, rows: Iterable[Row]) -> Row | None:
    """The fastest of transformers' own caches at the same size; None before its static cache was measured, which is
    the fastest but at long lengths, of drafted calls at the same prompt without drafts.  Conversations do without: it
    does not run them."""
    own = same_size(row, rows)
    if row["kind"] == "generate" and all(one["method"] != STOCK[1] for one in own):
        return None
    return min(own, key=seconds, default=None)


def seconds(row: Row) -> float:
    """Of a step, the median of the calls, or of a conversation.  Of the dynamic cache without its first call: lengths
    are new to the process there, and cuDNN plans its attention for each (:func:`new_lengths`).  It waits for
    the host, which is now faster, now slower: of two calls the faster one counts."""
    return spread(row)[0]


def spread(row: Row) -> tuple[float, float, float]:
    """:func:`seconds`, and the least and the most of as many calls."""
    if row["kind"] != "generate":
        return (float(row["seconds"]),) * 3
    middle, least, most = map(float, row["seconds_per_step"])
    if row["method"] != STOCK[0]:
        return middle, least, most
    seen = row.get("calls", [])[1:] or [least]
    return median_low(seen), min(seen), max(seen)


def new_lengths(row: Row) -> float | None:
    """Seconds of a step of the dynamic cache at lengths that are new to the process: of its first call, where no other
    process ran beside it."""
    if row["kind"] != "generate" or row["method"] != STOCK[0] or row.get("beside"):
        return None
    return float(row["calls"][0] if "calls" in row else row["seconds_per_step"][2])


def tokens_per_second(row: Row) -> float:
    """Of all rows, by :func:`seconds`."""
    return float(row["batch_size"] / seconds(row))


def line(row: Row, rows: Sequence[Row]) -> str:
    """A row in a line, as soon as it is measured."""
    best = best_stock(row, rows)
    beside = "" if best is None or best is row or row["method"] in STOCK else f", {ratio(seconds(best) / seconds(row))}"
    if row["kind"] == "conversation":
        return f"    {label(row)}: {row['turns']} turns in {row['seconds']:.2f} s{beside}"
    return f"    {label(row)}: {1e3 * seconds(row):.2f} ms a step, first call {row['first_call_seconds']:.1f} s{beside}"


def tables(rows: Sequence[Row]) -> str:
    """A table a model, and what failed."""
    blocks = [generate_table(group) for group in groups(rows, "generate")]
    blocks += [conversation_table(group) for group in groups(rows, "conversation")]
    blocks += [absent(row) for row in rows if "failed" in row or row["kind"] == "missing"]
    return "\n\n".join(blocks)


def absent(row: Row) -> str:
    """One line on a measurement that is not there."""
    if row["kind"] != "generate":
        return note(row)
    at = f"{row['model']} {row['batch_size']} x {size(row['num_tokens'])} {call(row)}"
    return f"failed: {at}, {label(row)}: {row['failed']}"


def pays_from(row: Row, rows: Iterable[Row]) -> str:
    """New tokens after which this cache's first call and steps have taken less time than any of transformers' own."""
    stock = [one for one in same_size(row, rows) if one is not row]
    if row["method"] in STOCK or best_stock(row, rows) is None:
        return ""
    if any(seconds(one) <= seconds(row) for one in stock):
        return "never"
    behind = [(row["first_call_seconds"] - one["first_call_seconds"]) / (seconds(one) - seconds(row)) for one in stock]
    return f"{FIRST_CALL + max(0, ceil(max(behind))):,}"


def generate_table(group: Sequence[Row]) -> str:
    """The greedy calls, then the other kinds, one after the other."""
    body = []
    for row in sorted(group, key=lambda row: CALLS.index(call(row))):
        best = best_stock(row, group)
        share = "" if best is None or row["method"] in STOCK else ratio(seconds(best) / seconds(row))
        at = f"{row['batch_size']} x {size(row['num_tokens'])} {call(row)}".removesuffix(" greedy")
        at += f", {row['new_tokens']} new" if "new_tokens" in row else ""
        at += f", {row['calls_of_model']} calls" if call(row) == DRAFTED else ""
        middle, least, most = (1e3 * value for value in spread(row))
        cells = [at, label(row), f"{middle:.2f}", f"{least:.2f} to {most:.2f}", share]
        cells += [f"{tokens_per_second(row):,.0f}", f"{1e3 * row['first_token_seconds'][0]:,.0f}"]
        peak = f"{row['peak_nbytes'] / GIB:.1f}" if "peak_nbytes" in row else ""
        new = new_lengths(row)
        cells.append("" if new is None else f"{1e3 * new:.2f}")
        body.append([*cells, f"{row['first_call_seconds']:.1f}", peak, pays_from(row, group)])
    head = ["prompt", "cache", "ms/step", "spread", "of best stock", "tok/s", "first token ms", "new lengths ms"]
    head += ["first call s", "peak GiB", "pays from"]
    repeats = [row["repeats"] for row in group if row.get("package") not in QUANTIZED]
    what = "medians of " + " to ".join(f"{count}" for count in sorted({min(repeats), max(repeats)}))
    if len(repeats) < len(group):
        what += ", of other libraries' caches one call"
    if any(row.get("beside") for row in group):
        what += "; first calls beside other processes"
    under = kernels(group) + ways(group) + drafts(group)
    return heading("generate()", group[0], what) + "\n" + plain(head, body) + under


def ways(group: Iterable[Row]) -> str:
    """A line on how decode steps ran under each kind of call, where rows say it."""
    said: dict[str, None] = {}
    for row in group:
        if "steps" in row:
            alone = call(row) == DRAFTED and row["steps"] == "CUDA graph"
            several = ", several tokens planned by the host" if alone else ""
            said[f"{call(row)}: {row['steps']}{several}"] = None
    return f"\nsteps: {'; '.join(said)}" if said else ""


def undrafted(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row of the same cache at the same prompt of the same run, without drafts."""
    names = (*SIZE, "method", "runs", "package")
    alike = (one for one in rows if call(one) == UNDRAFTED and "failed" not in one)
    return next((one for one in alike if all(one.get(name) == row.get(name) for name in names)), None)


def drafts(group: Sequence[Row]) -> str:
    """What drafts gave each cache, in a line a prompt: tokens a call of the model, and how many times as fast as
    without them."""
    said: dict[str, list[str]] = {}
    for row in group:
        if call(row) == DRAFTED and (beside := undrafted(row, group)) is not None:
            gave = f"{label(row)} {beside['calls_of_model'] / row['calls_of_model']:.1f} tokens a call, "
            new = f", {row['new_tokens']} new" if "new_tokens" in row else ""
            at = f"{row['batch_size']} x {size(row['num_tokens'])}{new} of {row['prompt']}"
            said.setdefault(at, []).append(gave + ratio(seconds(beside) / seconds(row)))
    return "".join(f"\ndrafts against none, {at}: {'; '.join(each)}" for at, each in said.items())


def conversation_table(group: Sequence[Row]) -> str:
    body = []
    for row in group:
        best = best_stock(row, group)
        share = "" if best is None or row["method"] in STOCK else ratio(seconds(best) / seconds(row))
        body.append([size(row["num_tokens"]), label(row), f"{row['seconds']:.2f}", share])
    first = group[0]
    what = f"{first['turns']} turns on one cache, {first['tokens_a_turn']} tokens said and as many answered in each"
    return heading("conversation", first, what) + "\n" + plain(["prompt", "cache", "s", "of best stock"], body)
