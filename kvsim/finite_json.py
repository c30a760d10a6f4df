"""JSON of finite numbers alone: none that is written holds NaN or infinity, and none that is read."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from kvsim.regular_files import RESULTS_NBYTES, read_named


def read_json(path: str | os.PathLike[str], what: str, most: int = RESULTS_NBYTES) -> Any:
    """The JSON of a regular file.  Raises ``ValueError`` as ``read_named`` does, and for what is no valid JSON."""
    try:
        return json.loads(read_named(path, what, most).decode("utf-8"), parse_constant=_no_number)
    except (json.JSONDecodeError, UnicodeDecodeError, _NoNumber) as error:
        raise ValueError(f"{what} {path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{what} {path} is not valid JSON: nested too deeply") from None


def json_text(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON.  Raises ``ValueError`` for NaN and infinity, which JSON does not have."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        raise ValueError(f"{not_finite(value) or 'a value'}: JSON holds finite numbers only") from None


def not_finite(value: Any, name: str = "") -> str | None:
    """Where ``value`` (objects, lists, numbers) holds NaN or infinity, as ``decode_runs[1] is nan``; else None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{name} is {value}".strip()
    if isinstance(value, dict):
        parts = [(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{name}[{index}]", each) for index, each in enumerate(value)]
    else:
        return None
    return next((found for where, each in parts if (found := not_finite(each, where))), None)


class _NoNumber(ValueError):
    """``NaN`` or ``Infinity`` in a file."""


def _no_number(text: str) -> float:
    raise _NoNumber(f"{text} is no number")
