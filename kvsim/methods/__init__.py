"""The methods by name: one table row a method, one file each."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from kvsim.layout import Method
from kvsim.methods.full import Full
from kvsim.methods.kivi import Kivi, kivi_seed

METHODS: dict[str, Callable[..., Method]] = {
    "fp16": lambda: Full("float16"),
    "bf16": lambda: Full("bfloat16"),
    "fp32": lambda: Full("float32"),
    "kivi": Kivi,
    "kivi-seed": kivi_seed,
}
"""Name -> factory; keyword arguments are the method's own fields."""


def make_method(name: str, **options: object) -> Method:
    """The named method with its options.

    Raises ``LookupError`` for an unknown name and ``ValueError`` for an option the method does not have.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise LookupError(f"unknown method {name!r}: {hint}allowed are {', '.join(METHODS)}")
    try:
        return METHODS[name](**options)
    except TypeError:
        raise ValueError(f"method {name!r} does not take {', '.join(sorted(options))}") from None


__all__ = ["METHODS", "Full", "Kivi", "kivi_seed", "make_method"]
