"""What a user types, understood: sizes such as ``128k``, method specs such as ``kivi:nbits=2``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence

from kvsim.layout import Method
from kvsim.methods import METHODS, make_method
from kvsim.methods.full import SHORT

SIZE = re.compile(r"(\d{1,15})([kKmM]?)")
FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20}
LONG = {short: dtype for dtype, short in SHORT.items()}

Value = int | str


def parse_size(text: str, what: str = "ctx") -> int:
    """``131072``, ``128k`` (1024s), ``1M`` -> a whole number from 1.  Raises ``ValueError``."""
    match = SIZE.fullmatch(text.strip())
    size = int(match[1]) * FACTOR[match[2].lower()] if match else 0
    if size < 1:
        raise ValueError(f"{what} {text!r}: allowed are whole numbers from 1, such as 4096, 128k or 1M")
    return size


def parse_sizes(text: str, what: str = "ctx") -> list[int]:
    """Sizes with commas between them, ascending, each once."""
    return sorted({parse_size(part, what) for part in text.split(",")})


def parse_dtype(text: str) -> str:
    """``fp16`` or ``float16``, and so on -> ``float16``.  Raises ``ValueError``."""
    dtype = LONG.get(text.lower(), text.lower())
    if dtype not in SHORT:
        raise ValueError(f"dtype {text!r}: allowed are {', '.join((*SHORT, *LONG))}")
    return dtype


def parse_reserve(text: str) -> float:
    """``10%`` or ``0.1`` -> 0.1.  Raises ``ValueError``."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"reserve {text!r}: allowed are 0% to below 100%, or 0 to below 1")
    return share


def parse_value(text: str) -> Value:
    """A method option's value: a whole number, else the text itself (``sequence``, ``head``, ``bfloat16``)."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def fields(name: str) -> frozenset[str]:
    """The options that a named method takes."""
    return frozenset(inspect.signature(METHODS[name]).parameters) if name in METHODS else frozenset()


def parse_method(spec: str, shared: Mapping[str, Value], dtype: str | None = None) -> Method:
    """``name`` or ``name:field=value,field=value``; ``shared`` options apply where the method has the field.

    Raises ``LookupError`` for an unknown method, ``ValueError`` for an unknown field or a bad value.
    """
    name, _, given = spec.partition(":")
    name = name.strip().lower()
    options: dict[str, Value] = {key: value for key, value in shared.items() if key in fields(name)}
    if dtype is not None and "dtype" in fields(name):
        options["dtype"] = dtype
    for item in filter(None, given.split(",")):
        field, equals, value = item.partition("=")
        field = field.strip().replace("-", "_")
        if not equals or (name in METHODS and field not in fields(name)):
            allowed = ", ".join(sorted(fields(name))) or "none"
            raise ValueError(f"method {spec!r}: option {item!r} is not one of {allowed} (field=value)")
        options[field] = parse_dtype(value) if field == "dtype" else parse_value(value.strip())
    return make_method(name, **options)


def choose_methods(specs: Sequence[str], shared: Mapping[str, Value], dtype: str | None) -> tuple[list[Method], bool]:
    """The methods asked for, each once, and whether they are merely the default ones.

    Without ``specs``: the uncompressed cache and ``kivi``, at 8, 4 and 2 bits or with the ``shared`` options.
    Raises ``ValueError`` for a shared option that none of the methods takes.
    """
    chosen: Sequence[str] = specs
    if not specs:
        baseline = SHORT[dtype or "float16"]
        bits_given = any("nbits" in key for key in shared)
        chosen = [baseline, "kivi"] if bits_given else [baseline, *(f"kivi:nbits={bits}" for bits in (8, 4, 2))]
    names = [spec.partition(":")[0].strip().lower() for spec in chosen]
    for key in shared:
        if all(name in METHODS and key not in fields(name) for name in names):
            raise ValueError(f"no method of {', '.join(names)} takes --{key.replace('_', '-')}")
    if dtype is not None and all(name in METHODS and "dtype" not in fields(name) for name in names) and specs:
        raise ValueError(f"no method of {', '.join(names)} takes --dtype: each names its own type")
    methods = [parse_method(spec, shared, dtype) for spec in chosen]
    return list(dict.fromkeys(methods)), not specs and not shared
