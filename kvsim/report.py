"""Strings and tables: the only place where bytes become text.  Units stand in the column heads.

Tables are Markdown with aligned columns: they read well in a terminal and paste into a document.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from kvsim.capacity import Room
from kvsim.catalog import Row
from kvsim.estimate import SPLIT, Estimate
from kvsim.explain import Explanation, Number
from kvsim.hardware import Hardware
from kvsim.model import Model

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table with aligned columns: those numbered in ``left`` flush left, the others right."""
    body = [list(row) for row in rows]
    widths = [max(3, *(len(row[column]) for row in [list(heads), *body])) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ("-" * width if column in left else "-" * (width - 1) + ":" for column, width in enumerate(widths))
    return "\n".join([line(heads), "| " + " | ".join(rule) + " |", *map(line, body)])


def unit(largest: int) -> tuple[str, int]:
    """The unit that suits a column whose largest entry is given: KiB, MiB, or GiB."""
    if largest < MIB:
        return "KiB", KIB
    return ("MiB", MIB) if largest < 4 * GIB else ("GiB", GIB)


def amount(nbytes: float, scale: int) -> str:
    return f"{nbytes / scale:,.{3 if scale == GIB else 2}f}"


def count(number: float) -> str:
    """Thousands with commas; one decimal where a small number is not whole."""
    return f"{number:,.0f}" if number >= 1000 or float(number).is_integer() else f"{number:,.1f}"


def heading(model: Model) -> str:
    """The name, and a line of what was understood of the model."""
    layer = model.cache_layers[0]
    dims = f"{layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim}+{layer.value_dim}"
    params = f", {model.num_params:,} parameters" if model.num_params else ""
    return (
        f"{model.name}\n{model.num_layers} layers, {layer.num_kv_heads} kv heads of {dims}, "
        f"{model.num_q_heads} query heads{params}"
    )


def notes(lines: Iterable[str]) -> str:
    return "\n".join(f"note: {line}" for line in lines)


def estimates(rows: Sequence[Estimate]) -> str:
    """Two tables: the whole cache, and what a sequence's bytes are."""
    name, scale = unit(max(row.nbytes for row in rows))
    read_name, read_scale = unit(max(row.read_nbytes for row in rows))
    heads = ["method", "stored B/token", "read B/token", f"read {read_name}/step", f"cache {name}", "x fp16"]
    whole = table(
        heads,
        (
            (
                row.method.name,
                count(row.nbytes_per_token),
                count(row.read_nbytes_per_token),
                amount(row.read_nbytes, read_scale),
                amount(row.nbytes, scale),
                f"{row.compression:.2f}",
            )
            for row in rows
        ),
    )
    return f"{whole}\n\nOne sequence (residual: every token in full precision):\n\n{_split(rows)}"


def _split(rows: Sequence[Estimate]) -> str:
    name, scale = unit(max(row.nbytes // row.batch_size for row in rows))
    heads = ["method", *(f"{kind} {name}" for kind in SPLIT[:-1]), "other B", f"total {name}"]
    return table(
        heads,
        (
            (
                row.method.name,
                *(amount(row.split[kind] / row.batch_size, scale) for kind in SPLIT[:-1]),
                count(row.split["other"] / row.batch_size),
                amount(row.nbytes / row.batch_size, scale),
            )
            for row in rows
        ),
    )


def fits(room: Room, rows: Sequence[Estimate], largest: Sequence[tuple[int | None, int | None]]) -> str:
    """What fits beside the weights: ``largest`` holds (batch, context) a row."""

    def gib(nbytes: int) -> str:
        return f"{nbytes / GIB:,.2f} GiB"

    batch, ctx = rows[0].batch_size, rows[0].num_tokens
    share = room.reserve_nbytes / room.memory_nbytes
    lines = [
        f"{room.hardware.id}: {gib(room.memory_nbytes)} ({room.hardware.memory_source})",
        f"  - {gib(room.reserve_nbytes)} held back ({share:.0%}, --reserve)",
        f"  - {gib(room.weight_nbytes)} weights at {room.weight_bits:g} bits",
        f"  = {gib(room.cache_nbytes)} for the cache",
    ]
    heads = ["method", "fits", f"batch at {ctx:,} tokens", f"tokens at batch {batch:,}"]
    body = [
        (
            row.method.name,
            "yes" if row.nbytes <= room.cache_nbytes else "no",
            *("no limit" if number is None else f"{number:,}" for number in pair),
        )
        for row, pair in zip(rows, largest, strict=True)
    ]
    return "\n".join(lines) + "\n\n" + table(heads, body)


def comparison(rows: Sequence[Estimate]) -> str:
    """Methods down, contexts across: bytes of the cache, and compression."""
    contexts = sorted({row.num_tokens for row in rows})
    methods = list(dict.fromkeys(row.method.name for row in rows))
    found = {(row.method.name, row.num_tokens): row for row in rows}
    name, scale = unit(max(row.nbytes for row in rows))
    if min(row.nbytes for row in rows) < 0.01 * scale:
        name, scale = "MiB", MIB
    heads = [f"{ctx:,}" for ctx in contexts]
    sizes = ((m, *(amount(found[m, ctx].nbytes, scale) for ctx in contexts)) for m in methods)
    ratios = ((m, *(f"{found[m, ctx].compression:.2f}" for ctx in contexts)) for m in methods)
    return (
        f"Cache in {name} at a context of\n\n{table(['method', *heads], sizes)}\n\n"
        f"Times smaller than fp16 at a context of\n\n{table(['method', *heads], ratios)}"
    )


def explanations(shared: Sequence[Number], rows: Sequence[Explanation]) -> str:
    """The numbers with their origin, then every section's formula."""
    out = [_numbers(shared)]
    for row in rows:
        apart = f", and {row.apart_nbytes:,} B that no method stores" if row.apart_nbytes else ""
        out.append(f"{row.method.name}: {row.nbytes:,} B{apart}")
        if row.numbers:
            out.append(_numbers(row.numbers))
        width = max(len(formula.section) for formula in row.formulas)
        size = max(len(f"{formula.nbytes:,}") for formula in row.formulas)
        lines: list[str] = []
        buffer = layer = ""
        for formula in row.formulas:
            if formula.layer != layer:
                layer, buffer = formula.layer, ""
                lines += ["", layer] if lines else [layer]
            if formula.buffer != buffer:
                buffer = formula.buffer
                lines.append(buffer)
            lines.append(f"  {formula.section:<{width}} {formula.nbytes:>{size},} B = {formula.text}")
        out.append("\n".join(lines))
    return "\n\n".join(out)


def _numbers(numbers: Iterable[Number]) -> str:
    return table(
        ["number", "value", "from"],
        ((n.name, f"{n.value:,}" if isinstance(n.value, int) else n.value, n.origin) for n in numbers),
        left=(0, 2),
    )


def short_source(source: str, width: int = 25) -> str:
    """``Lightning-AI/litgpt@26857050fe litgpt/config.py ...`` -> ``litgpt@26857050fe``."""
    first = source.split()[0]
    if "@" in first or "==" in first:
        return first.rsplit("/", 1)[-1][:width]
    return source if len(source) <= width else source[: width - 3].rstrip() + "..."


def model_list(rows: Sequence[tuple[Row, Model]]) -> str:
    heads = ["model", "L x kv x dim", "Gparams", "positions", "source"]
    return table(
        heads,
        (
            (
                row["id"].rsplit("/", 1)[-1],
                f"{model.num_layers} x {model.cache_layers[0].num_kv_heads} x {model.cache_layers[0].key_dim}",
                f"{model.num_params / 1e9:.2f}" if model.num_params else "-",
                f"{model.max_positions:,}" if model.max_positions else "-",
                short_source(row["source"]),
            )
            for row, model in rows
        ),
        left=(0, 4),
    )


def hardware_list(rows: Sequence[Hardware]) -> str:
    def scaled(number: float | None, scale: float) -> str:
        return "-" if number is None else f"{number / scale:,.5g}"

    heads = ["card", "memory GiB", "GB/s", "fp16 TFLOPS", "source"]
    return table(
        heads,
        (
            (
                card.id,
                "-" if card.memory_nbytes is None else f"{card.memory_nbytes / GIB:.1f}",
                "-" if card.bandwidth is None else f"{card.bandwidth / 1e9:,.0f}",
                scaled(card.fp16_flops, 1e12),
                short_source(card.source, 28),
            )
            for card in rows
        ),
        left=(0, 4),
    )


def model_detail(row: Row, model: Model) -> str:
    """All about one model, a line a fact, with the config key of every number."""
    sources = dict(model.sources)
    facts = {
        "id": row["id"],
        "aliases": ", ".join(row["aliases"]),
        "source": row["source"],
        "note": row["note"],
        "layers": f"{model.num_layers} ({sources['num_layers']})",
        "query heads": f"{model.num_q_heads} ({sources['num_q_heads']})",
        "kv heads": f"{model.cache_layers[0].num_kv_heads} ({sources['num_kv_heads']})",
        "head dim": f"{model.cache_layers[0].key_dim} ({sources['head_dim']})",
        "positions": model.max_positions and f"{model.max_positions:,} ({sources['max_positions']})",
        "parameters": model.num_params and f"{model.num_params:,}",
        "dtype": model.dtype,
        "config": json.dumps(row["config"]),
    }
    return _facts(facts)


def hardware_detail(card: Hardware, aliases: Sequence[str]) -> str:
    """All about one card, a line a fact."""

    def scaled(number: float | None, scale: float, unit: str) -> str | None:
        return None if number is None else f"{number / scale:,.6g} {unit}"

    facts = {
        "id": card.id,
        "aliases": ", ".join(aliases),
        "vendor": f"{card.vendor}, {card.arch}",
        "memory": card.memory_nbytes and f"{card.memory_nbytes / GIB:,.2f} GiB ({card.memory_source})",
        "bandwidth": scaled(card.bandwidth, 1e9, "GB/s"),
        "fp16 or bf16": scaled(card.fp16_flops, 1e12, "TFLOPS, dense"),
        "fp8": scaled(card.fp8_flops, 1e12, "TFLOPS, dense"),
        "fp4": scaled(card.fp4_flops, 1e12, "TFLOPS, dense"),
        "int8": scaled(card.int8_ops, 1e12, "TOPS, dense"),
        "link": scaled(card.link_bandwidth, 1e9, "GB/s, both directions"),
        "source": card.source,
        "note": card.note,
    }
    return _facts(facts)


def _facts(facts: Mapping[str, Any]) -> str:
    width = max(len(key) for key in facts)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in facts.items() if value)
