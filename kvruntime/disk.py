"""Files on disk: read only where they are regular and of bounded size, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_NBYTES = 1 << 30
"""Bytes of the largest text or results file that is read."""


def read_regular(path: str | os.PathLike[str], what: str, most: int = MOST_NBYTES) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises ``ValueError``, which calls the file ``what``, for a missing file, one that cannot be read, a directory, a
    pipe or a device, and for a larger one.
    """
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError(f"cannot read {what} {path}: it is not a regular file")
        if state.st_size > most:
            raise ValueError(f"cannot read {what} {path}: it has {state.st_size:,} bytes, allowed are {most:,}")
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror}") from None


def read_json(path: str | os.PathLike[str], what: str, most: int = MOST_NBYTES) -> Any:
    """The JSON of a regular file.  Raises ``ValueError`` as ``read_regular`` does, and for what is no valid JSON."""
    try:
        return json.loads(read_regular(path, what, most).decode("utf-8"), parse_constant=_no_number)
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


def replace_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes ``content`` (text as UTF-8) in one step: after a failure or a kill the old file or the new one is whole.

    A new file has the permissions that any new file gets; of a symbolic link the target is replaced.  Raises
    ``ValueError`` for a path that cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    real = Path(os.path.realpath(path))
    new = real.with_name(f".{real.name}-{os.getpid()}")
    try:
        if real.exists() and not real.is_file():
            raise ValueError(f"cannot write {path}: it is not a regular file")
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, real)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def signature(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """What changes when a file is written: number, size and time of change; None where there is none."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


class _NoNumber(ValueError):
    """``NaN`` or ``Infinity`` in a file."""


def _no_number(text: str) -> float:
    raise _NoNumber(f"{text} is no number")
