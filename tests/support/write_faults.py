"""Faults where files are written: an error or a kill at any one step of writing below a folder.

A step is an open for writing, a write (half of it done), a sync, a rename, or the making of a folder.  ``steps`` counts
what a call does, ``failing`` has one of these steps fail.  Writes are those that reach the operating system, so that
buffers fail where they do on a full disk.  A process that is killed removes nothing afterwards.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

    def __init__(self, path: Any, mode: str, step: Callable[[str], None], opener: Any = None) -> None:
        super().__init__(path, mode, opener=opener)
        self.step = step

    def write(self, content: Any) -> int:
        try:
            self.step("write")
        except BaseException:
            super().write(content[: len(content) // 2])
            raise
        return super().write(content)


@contextmanager
def watched(folder: Path, step: Callable[[str], None], dead: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Calls ``step(kind)`` before each step in ``folder``; from when ``dead()`` on nothing is removed any more."""
    below = os.path.realpath(folder)
    opened, synced, made = builtins.open, os.fsync, os.mkdir
    moved = {name: getattr(os, name) for name in ("replace", "rename")}
    removed = {(os, name): getattr(os, name) for name in ("unlink", "remove", "rmdir")}
    removed[shutil, "rmtree"] = shutil.rmtree

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and below in os.path.realpath(path)

    def opening(file: Any, mode: str = "r", buffering: int = -1, *text: Any, opener: Any = None, **named: Any) -> Any:
        if not inside(file) or not set(mode) & set("wxa+"):
            return opened(file, mode, buffering, *text, opener=opener, **named)
        step("open")
        raw = Watched(file, mode.replace("b", "").replace("t", ""), step, opener)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **named)

    def syncing(descriptor: int) -> None:
        step("sync")
        synced(descriptor)

    def making(path: Any, *given: Any, **named: Any) -> None:
        if inside(path) and not os.path.isdir(path):  # a folder that is there is not made
            step("mkdir")
        made(path, *given, **named)

    def moving(name: str) -> Callable[..., None]:
        def move(source: Any, target: Any, **named: Any) -> None:
            if inside(target):
                step(name)
            moved[name](source, target, **named)

        return move

    def living(remove: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: None if dead() else remove(*given, **named)

    builtins.open = io.open = opening
    os.fsync, os.mkdir = syncing, making
    os.replace, os.rename = moving("replace"), moving("rename")
    for (module, name), remove in removed.items():
        setattr(module, name, living(remove))
    try:
        yield
    finally:
        builtins.open = io.open = opened
        os.fsync, os.mkdir = synced, made
        os.replace, os.rename = moved["replace"], moved["rename"]
        for (module, name), remove in removed.items():
            setattr(module, name, remove)


def steps(folder: Path, call: Callable[[], object], *, every: bool = False) -> list[Step]:
    """The steps of ``call`` in ``folder``, kind by kind: the first, the second and the last, or ``every`` one."""
    found: dict[str, int] = {}

    def count(kind: str) -> None:
        found[kind] = found.get(kind, 0) + 1

    with watched(folder, count):
        call()
    return [
        (kind, at)
        for kind, times in found.items()
        for at in (range(1, times + 1) if every else sorted({1, min(2, times), times}))
    ]


@contextmanager
def failing(folder: Path, at: Step, error: str) -> Iterator[None]:
    """Has one step in ``folder`` fail, once; where it was a kill, nothing is removed from then on."""
    left = dict([at])
    killed = False

    def fail(kind: str) -> None:
        nonlocal killed
        if kind in left:
            left[kind] -= 1
            if not left[kind]:
                killed = error == "killed"
                raise ERRORS[error]()

    with watched(folder, fail, lambda: killed):
        yield


def everything(folder: Path) -> dict[str, bytes]:
    """Relative names and contents of the files below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def visible(names: Any) -> set[str]:
    """Of relative names those that are not hidden: what a kill leaves is."""
    return {name for name in names if not any(part[0] == "." for part in name.split("/"))}


def remove_all(folder: Path) -> None:
    """Empties ``folder``, which is there afterwards."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
