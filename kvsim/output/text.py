"""The words of a screen: the only place where bytes become text.  Units stand in the column heads.

Tables are Markdown with aligned columns (:mod:`kvsim.output.tables`): they read well in a terminal and paste into a
document.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim.layout import KINDS, LayerShape, layer_label
from kvsim.memory.estimate import Estimate
from kvsim.output.not_modelled import NOT_MODELLED
from kvsim.output.tables import table as table

if TYPE_CHECKING:
    from kvsim.analysis.doctor import Diagnosis
    from kvsim.analysis.explain import Explanation
    from kvsim.catalog import Row
    from kvsim.hardware import Hardware
    from kvsim.methods.formulas import Number
    from kvsim.models.model import Model

WHOLE = ("tokens", "blocks", "cells", "layers")
"""Units whose figures are whole numbers."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


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
    """The name, and a line of what was understood of the model: one a kind of layer where there are several."""
    params = f"{model.num_params:,} parameters" if model.num_params else "parameters not known"
    kinds = Counter(model.layers)
    if len(kinds) == 1 and model.cache_layers:
        layer = model.cache_layers[0]
        dims = f"{layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim}+{layer.value_dim}"
        kind = "" if layer.kind == "full" else f" {layer.kind}"
        window = f", window {layer.window:,}" if layer.window is not None else ""
        known = f", {params}" if model.num_params else ""
        return (
            f"{model.name}\n{model.num_layers}{kind} layers, {layer.num_kv_heads} kv heads of {dims}{window}, "
            f"{model.num_q_heads} query heads{known}"
        )
    lines = [f"{model.name}", f"{model.num_q_heads} query heads, {params}"]
    for kind_of, count in kinds.items():
        if isinstance(kind_of, LayerShape):
            lines.append(f"  {layer_label(kind_of, count, None)}")
        else:
            size = sum(buffer.nbytes for buffer in kind_of.buffers(1))
            plural = "s" if count > 1 else ""
            lines.append(f"  {count} {kind_of.kind} layer{plural}: constant state, {size:,} B a sequence and layer")
    return "\n".join(lines)


def request(tokens: int, batch: int, engine: str, shared_prefix: int) -> str:
    """What was asked, in a line."""
    under = "" if engine == "ideal" else f", engine {engine}"
    prefix = f", the first {shared_prefix:,} tokens shared" if shared_prefix else ""
    return f"context {tokens:,} tokens, batch {batch:,}{prefix}{under}"


def not_modelled(command: str) -> str:
    """The last words of a screen."""
    return "\n".join(["Not modelled:", *(f"  {line}" for line in NOT_MODELLED[command])])


def not_modelled_line(command: str) -> str:
    """The same in a line."""
    return f"Not modelled: {'; '.join(NOT_MODELLED[command])}."


def notes(lines: Iterable[str]) -> str:
    return "\n".join(f"note: {line}" for line in lines)


def components(rows: Sequence[Estimate]) -> str:
    """What the bytes of one sequence are, a row a method."""
    name, scale = unit(max(row.nbytes // row.batch_size for row in rows))
    heads = ["method", *(f"{kind} {name}" for kind in KINDS[:-1]), "other B", f"total {name}"]
    return table(
        heads,
        (
            (
                row.method.name,
                *(amount(row.split[kind] / row.batch_size, scale) for kind in KINDS[:-1]),
                count(row.split["other"] / row.batch_size),
                amount(row.nbytes / row.batch_size, scale),
            )
            for row in rows
        ),
    )


def engines(rows: Sequence[Estimate], reasons: Sequence[Mapping[str, Any]], contexts: Sequence[int]) -> str:
    """Engines down, contexts across, a table a method; then why they differ from the ideal."""
    name, scale = unit(max(row.total_nbytes for row in rows))
    if min(row.total_nbytes for row in rows) < 0.01 * scale:
        name, scale = ("MiB", MIB) if scale == GIB else ("KiB", KIB)
    found = {(row.method.name, row.engine, row.num_tokens): row.total_nbytes for row in rows}
    heads = ["engine", *(f"{ctx:,}" for ctx in contexts), "over ideal"]
    blocks = []
    for method in dict.fromkeys(reason["method"] for reason in reasons):
        own = [reason for reason in reasons if reason["method"] == method]
        body = []
        for reason in own:
            sizes = [found.get((method, reason["engine"], ctx)) for ctx in contexts]
            ideal = found.get((method, "ideal", contexts[-1]))
            over = f"{sizes[-1] / ideal - 1:+.2%}" if sizes[-1] is not None and ideal else "-"
            body.append((reason["engine"], *("-" if s is None else amount(s, scale) for s in sizes), over))
        why = [
            f"  {reason['engine']}: {line}"
            for reason in own
            for line in ([f"not possible: {reason['error']}"] if reason["error"] else reason["notes"])
        ]
        title = f"{method}: cache, state and index keys in {name} at a context of"
        blocks.append("\n".join([f"{title}\n\n{table(heads, body)}", "", "Why they differ", *why]))
    return "\n\n".join(blocks)


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


def diagnosis(found: Diagnosis) -> str:
    """What the log is, and its figures: predicted, reported, error, and the cause a line below where there is one."""
    title = f"{found.engine} {found.version}".strip() + (f", {found.model}" if found.model else "")
    told = ", ".join(f"{name} {value}" for name, value in found.settings.items())

    def figure(number: float | None, unit: str) -> str:
        if number is None:
            return "-"
        return f"{number:,.0f}" if unit in WHOLE else f"{number:,.2f}"

    body = [
        (
            str(each.line),
            each.what,
            each.unit,
            figure(each.predicted, each.unit),
            figure(each.reported, each.unit),
            "-" if each.error is None else f"{each.error:+.2%}",
        )
        for each in found.findings
    ]
    heads = ["line", "figure", "unit", "predicted", "reported", "error"]
    causes = [f"  {each.line}: {each.what}: {each.cause}" for each in found.findings if each.cause]
    return "\n\n".join([title, told, table(heads, body, left=(1, 2)), "\n".join(["Causes", *causes])])


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
                short_source(row["source"], 18),
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
                short_source(card.source, 24),
            )
            for card in rows
        ),
        left=(0, 4),
    )


def model_detail(row: Row, model: Model) -> str:
    """All about one model, a line a fact, with the config key of every number."""
    sources = dict(model.sources)

    def told(value: object, name: str) -> str:
        return f"{value} ({sources[name]})" if name in sources else f"{value}"

    cached = "" if model.num_layers == model.num_blocks else f"; {model.num_layers} streams of keys and values"
    facts = {
        "id": row["id"],
        "aliases": ", ".join(row["aliases"]),
        "source": row["source"],
        "note": row["note"],
        "layers": told(model.num_blocks, "num_layers") + cached,
        "query heads": told(model.num_q_heads, "num_q_heads"),
        "kv heads": told(model.cache_layers[0].num_kv_heads, "num_kv_heads"),
        "head dim": told(model.cache_layers[0].key_dim, "head_dim"),
        "positions": model.max_positions and told(f"{model.max_positions:,}", "max_positions"),
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
        "units": card.num_sms
        and f"{card.num_sms} multiprocessors, L2 of {(card.l2_nbytes or 0) / 2**20:g} MiB ({card.sms_source})",
        "source": card.source,
        "note": card.note,
    }
    return _facts(facts)


def _facts(facts: Mapping[str, Any]) -> str:
    width = max(len(key) for key in facts)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in facts.items() if value)
