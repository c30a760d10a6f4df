"""What ``kvruntime generate`` says of its texts: what each cache weighed, and two of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from kvruntime.bench.model.generate import Generation
from kvsim.output.tables import plain, terminal_width

MIB = 1 << 20
WIDTH = 99
"""Columns where the output is no terminal."""


def summary(out: Generation) -> str:
    """A line: tokens, seconds, and what the cache weighed against float16; or that nothing of it was quantized."""
    said = f"{out.num_new} tokens in {out.seconds:.1f} s; the cache, made for {out.num_provided} tokens, weighed "
    said += f"{out.nbytes:,} B ({out.nbytes / MIB:.2f} MiB) against fp16's {out.fp16_nbytes:,} B: "
    if out.exact_alone:
        return f"{said}{out.num_tokens} tokens fit the residual: nothing was quantized"
    return f"{said}{out.fp16_nbytes / out.nbytes:.2f}x smaller"


def comparison(names: Sequence[str], outs: Sequence[Generation]) -> str:
    """Both texts in columns, where they part, and both weights."""
    width = max(20, ((terminal_width() or WIDTH) - 3) // 2)
    columns = [
        [name, "-" * min(width, len(name)), *_lines(out.text, width)] for name, out in zip(names, outs, strict=True)
    ]
    shown = [f"{left:<{width}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue="")]
    first = next(
        (place for place, pair in enumerate(zip(outs[0].ids, outs[1].ids, strict=False)) if len(set(pair)) > 1), None
    )
    if outs[0].ids == outs[1].ids:
        said = f"The same {outs[0].num_new} tokens."
    elif first is None:
        said = "One text goes on where the other ends."
    else:
        said = f"The texts part at new token {first + 1} of {min(out.num_new for out in outs)}."
    body = [
        [name, f"{out.nbytes / MIB:.2f}", f"{out.fp16_nbytes / out.nbytes:.2f}", f"{out.num_new / out.seconds:.1f}"]
        for name, out in zip(names, outs, strict=True)
    ]
    figures = plain(["cache", "MiB", "x fp16", "tokens/s"], body)
    exact = [out for out in outs if out.exact_alone]
    note = [f"{exact[0].num_tokens} tokens fit the residual: nothing was quantized"] if exact else []
    return "\n\n".join(["\n".join(shown), said, figures, *note])


def _lines(text: str, width: int) -> list[str]:
    return [line for each in text.strip().splitlines() for line in wrap(each, width) or [""]]


def as_row(name: str, out: Generation) -> dict[str, Any]:
    """A method's row of the JSON answer."""
    return {
        "method": name,
        "text": out.text,
        "num_new": out.num_new,
        "num_tokens": out.num_tokens,
        "seconds": out.seconds,
        "nbytes": out.nbytes,
        "fp16_nbytes": out.fp16_nbytes,
        "quantized": out.quantized,
    }
