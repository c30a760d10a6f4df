"""Files that appear whole or not at all: written beside the path, synced, and renamed into place."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

Content = bytes | str | Callable[[IO[bytes]], object]


def replace_file(path: str | os.PathLike[str], content: Content, folder: Path | None = None) -> None:
    """Writes ``content`` (bytes, text as UTF-8, or what it writes into the binary file it is called with) to ``path``.

    A reader, an error and a kill at any moment find the old file or the new one whole.  A link is followed; the mode
    of a file that was there is kept; a device or a pipe is written to.  ``folder``: where the file is written before
    it is renamed (of the same file system; default: the path's own).
    Raises ``ValueError`` with one line for a path that cannot be written; then the old file is as it was.
    """
    try:
        _replace(Path(path), content, folder)
    except OSError as error:
        raise ValueError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from None


def _replace(path: Path, content: Content, folder: Path | None) -> None:
    target = Path(os.path.realpath(path))
    mode = None
    if target.exists():
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            with open(target, "wb") as file:
                _fill(file, content)
            return
        with open(target, "r+b"):  # a directory, and what is protected against writing, are refused
            pass
    temporary = (folder or target.parent) / f".{target.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            _fill(file, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _fill(file: IO[bytes], content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Has the names in ``folder`` reach the disk, where a system can be asked to."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
