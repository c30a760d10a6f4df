"""Files that appear whole or not at all: written beside the path, synced, and renamed into place."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO
from zlib import crc32

SYNCS_AT_ONCE = 16
"""A file system commits what several ask for together: twenty times as fast as one after another."""

Content = bytes | str | Callable[[IO[bytes]], object]


def replace_file(
    path: str | os.PathLike[str],
    content: Content,
    *,
    folder: Path | None = None,
    sync: bool = True,
    regular: bool = False,
) -> None:
    """Writes ``content`` (bytes, text as UTF-8, or what it writes into the binary file it is called with) to ``path``.

    A reader, an error and a kill at any moment find the old file or the new one whole.  A link is followed; the mode
    of a file that was there is kept; a device or a pipe is written to, or with ``regular`` refused.  ``folder``: where
    the file is written before it is renamed (of the same file system; default: the path's own).  ``sync``: whether it
    reaches the disk before the name does; what is left unsynced needs a digest, and :func:`sync_files` later.
    What killed processes left of the same file is removed.
    Raises ``ValueError`` with one line for a path that cannot be written; then the old file is as it was.
    """
    try:
        _replace(Path(path), content, folder, sync, regular)
    except OSError as error:
        raise ValueError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from None


def _replace(path: Path, content: Content, folder: Path | None, sync: bool, regular: bool) -> None:
    target = Path(os.path.realpath(path))
    mode = None
    if target.exists():
        mode = target.stat().st_mode
        if regular and not stat.S_ISREG(mode):
            raise ValueError(f"cannot write {os.fspath(path)}: it is not a regular file")
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            with open(target, "wb") as file:
                _fill(file, content)
            return
        _open_to_write(target)
    temporary = (folder or target.parent) / f".{target.name[:40]}.{_place()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            _fill(file, content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync(target.parent)
    if sync and folder is None:  # parts lie in a folder of their own, which goes as a whole
        _remove_orphans(target)


def _remove_orphans(target: Path) -> None:
    """Removes the temporaries of ``target`` whose processes are no more: a kill had no time for it."""
    if os.name != "posix":  # elsewhere a signal 0 is one
        return
    pattern = re.compile(re.escape(f".{target.name[:40]}.{_place()}-") + r"(\d{1,9})-[0-9a-f]{8}\.tmp")
    with suppress(OSError):
        for name in os.listdir(target.parent):
            match = pattern.fullmatch(name)
            if match and not _lives(int(match[1])):
                (target.parent / name).unlink(missing_ok=True)


@cache
def _place() -> str:
    """Eight digits for where this process's number counts: a folder may be shared with other machines, containers."""
    where = os.uname().nodename if hasattr(os, "uname") else ""
    with suppress(OSError):
        where += os.readlink("/proc/self/ns/pid")
    return f"{crc32(where.encode()):08x}"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raises ``ValueError`` where a file is there that cannot be written, or a directory: before long work."""
    try:
        if os.path.exists(path):
            _open_to_write(path)
    except OSError as error:
        raise ValueError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from None


def _open_to_write(path: str | os.PathLike[str]) -> None:
    with open(path, "r+b"):
        pass


def _fill(file: IO[bytes], content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_files(paths: Sequence[Path]) -> None:
    """Has files of one folder, and their names, reach the disk.  Raises ``ValueError`` where they cannot."""
    if not paths:
        return
    from concurrent.futures import ThreadPoolExecutor

    try:
        with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
            list(pool.map(_sync, paths))
        _sync(paths[0].parent)
    except OSError as error:
        raise ValueError(f"cannot write {paths[0].parent}: {error.strerror or error}") from None


def _sync(path: Path) -> None:
    """Of a file its content, of a folder its names, where a system can be asked to."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
