"""Files that a user names, read only where they are regular and of bounded size: no pipe, no device."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MIB = 1 << 20
CONFIG_NBYTES = 64 * MIB
"""Most bytes of a config, an index or a profile."""
TRACE_NBYTES = 256 * MIB
"""Most bytes of a log or a trace of requests."""
RESULTS_NBYTES = 1024 * MIB
"""Most bytes of a text to score or of recorded results."""


def regular_nbytes(path: Path) -> int:
    """Bytes of a regular file, links followed.

    Raises ``ValueError`` for anything else (a directory, a pipe, a device), ``OSError`` for one that is not there.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{short(path)} is not a regular file")
    return found.st_size


def read_bytes(path: Path, most: int = CONFIG_NBYTES) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises ``ValueError`` for a larger one or another kind of file, ``OSError`` for one that cannot be read.
    """
    size = regular_nbytes(path)
    if size <= most:
        with path.open("rb") as stream:
            content = stream.read(most + 1)  # it may have grown, or say 0 bytes as those of /proc do
        size = len(content)
        if size <= most:
            return content
    raise ValueError(f"{short(path)} has {size:,} bytes: allowed are up to {most:,}")


def read_text(path: Path, most: int = CONFIG_NBYTES, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file: :func:`read_bytes`, and ``UnicodeDecodeError`` for another encoding."""
    return read_bytes(path, most).decode(encoding, errors)


def read_named(path: str | os.PathLike[str], what: str, most: int = RESULTS_NBYTES) -> bytes:
    """:func:`read_bytes` where every failure is a ``ValueError`` that calls the file ``what``."""
    try:
        return read_bytes(Path(path), most)
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {what}: {error}") from None


def signature(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """What changes when a file is written: number, size and time of change; None where there is none."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def short(path: Path) -> str:
    """The path on one line, in up to 200 characters."""
    text = str(path).replace("\n", "\\n")
    return text if len(text) <= 200 else f"{text[:60]}...{text[-130:]}"
