"""What a user asks for, understood: ``kvsim``'s method options, with several values where that makes sense."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import click

from kvsim.commands.flags import LAYOUT_FLAGS, TOKENS, options
from kvsim.engines.kvruntime import check_runs, names
from kvsim.layout import Method
from kvsim.methods import METHODS
from kvsim.methods.defaults import COMPRESSED, DEFAULT_SPECS, EXAMPLE
from kvsim.methods.full import Full
from kvsim.nearest import hint
from kvsim.specs import Value, choose_methods, names_within, parse_dtype, parse_size

DEFAULT = DEFAULT_SPECS["kvruntime"]
SEED = click.IntRange(0, (1 << 63) - 1)
SWEPT = ("nbits", "group_size", "residual_length")
"""Options that may be given more than once: every combination is one method."""


method_options = options(
    click.option(
        "--method",
        "specs",
        multiple=True,
        help=f"{', '.join(names())}; or with options, {EXAMPLE}. Repeatable.  [default: {DEFAULT[0]}]",
    ),
    click.option("--nbits", type=int, multiple=True, help="Bits a code: 1, 2, 3, 4 or 8. Repeatable."),
    click.option("--group-size", type=int, multiple=True, help="Elements that share a scale. Repeatable."),
    click.option("--residual-length", type=TOKENS, multiple=True, help="Newest tokens kept exact. Repeatable."),
    *LAYOUT_FLAGS,
)


def parse_length(text: str) -> int:
    """Tokens of a prompt: ``2048``, ``2k``.  Raises ``ValueError``."""
    return parse_size(text, "length")


def chosen_methods(
    specs: Sequence[str], dtype: str | None, given: dict[str, Any], *, baseline: bool = True
) -> list[Method]:
    """The methods that the options name, the uncompressed ``baseline`` first, each once.

    Raises ``LookupError`` for an unknown method, ``ValueError`` for a bad option.
    """
    kind = parse_dtype(dtype) if dtype is not None else None
    named = {key: value for key, value in given.items() if value is not None and key not in SWEPT}
    swept = [[(key, value) for value in given[key]] for key in SWEPT if given.get(key)]
    out: list[Method] = [Full(kind or "float16")] if baseline else []
    _check_known(specs)
    for combination in product(*swept):
        shared: dict[str, Value] = {**named, **dict(combination)}
        chosen = specs or (DEFAULT if "nbits" not in shared else (COMPRESSED,))
        out += choose_methods(chosen, shared, kind)[0]
    for method in out:
        check_runs(method)
    return list(dict.fromkeys(out))


def _check_known(specs: Sequence[str]) -> None:
    """Raises ``LookupError``, with those that run here, for a name that is no method."""
    for name in (name for spec in specs for name in names_within(spec)):
        if name not in METHODS:
            meant = hint(name, names(), cutoff=0.4)
            raise LookupError(f"unknown method {name!r}: {meant}allowed are {', '.join(names())}")


def chosen_method(specs: Sequence[str], dtype: str | None, given: dict[str, Any]) -> Method:
    """The one method that the options name.  Raises ``ValueError`` when they name several."""
    methods = chosen_methods(specs, dtype, given, baseline=False)
    if len(methods) > 1:
        raise ValueError(f"one method at a time, not {', '.join(method.name for method in methods)}")
    return methods[0]


__all__ = ["check_runs", "chosen_method", "chosen_methods", "method_options", "options", "parse_length"]
