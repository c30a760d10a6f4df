"""Faults where files are written: an error or a kill at any one open, write, sync or rename below a folder.

``steps`` counts what a call does, ``failing`` has one of these steps fail.  Writes are those that reach the operating
system, so that buffers fail where they do on a full disk.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Step = tuple[str, int]
"""What, and the how manyeth of its kind."""


class Killed(BaseException):
    """Ends the process at this step, as far as a test can."""


ERRORS: dict[str, Callable[[], BaseException]] = {
    "full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "forbidden": lambda: OSError(errno.EACCES, os.strerror(errno.EACCES)),
    "killed": Killed,
}


class Watched(io.FileIO):
    """A file whose writes are steps."""

    def __init__(self, path: Any, mode: str, step: Callable[[str], None]) -> None:
        super().__init__(path, mode)
        self.step = step

    def write(self, content: Any) -> int:
        self.step("write")
        return super().write(content)


@contextmanager
def watched(folder: Path, step: Callable[[str], None]) -> Iterator[None]:
    """Calls ``step(kind)`` before each open for writing, write, sync and rename in ``folder``."""
    opened, synced, replaced = builtins.open, os.fsync, os.replace

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and str(folder) in os.path.realpath(path)

    def opening(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *more: Any, **named: Any) -> Any:
        if not inside(file) or not set(mode) & set("wxa+"):
            return opened(file, mode, buffering, encoding, *more, **named)
        step("open")
        raw = Watched(file, mode.replace("b", "").replace("t", ""), step)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=encoding)

    def syncing(descriptor: int) -> None:
        step("sync")
        synced(descriptor)

    def replacing(source: Any, target: Any, **named: Any) -> None:
        if inside(target):
            step("replace")
        replaced(source, target, **named)

    builtins.open = io.open = opening
    os.fsync, os.replace = syncing, replacing
    try:
        yield
    finally:
        builtins.open = io.open = opened
        os.fsync, os.replace = synced, replaced


def steps(folder: Path, call: Callable[[], object]) -> list[Step]:
    """The first, the second and the last step of each kind that ``call`` does in ``folder``, in this order."""
    found: dict[str, int] = {}

    def count(kind: str) -> None:
        found[kind] = found.get(kind, 0) + 1

    with watched(folder, count):
        call()
    return [(kind, at) for kind, times in found.items() for at in sorted({1, min(2, times), times})]


@contextmanager
def failing(folder: Path, at: Step, error: str) -> Iterator[None]:
    """Has one step in ``folder`` fail, once."""
    left = dict([at])

    def fail(kind: str) -> None:
        if kind in left:
            left[kind] -= 1
            if not left[kind]:
                raise ERRORS[error]()

    with watched(folder, fail):
        yield
