"""Files that a user names, read only where they are regular and of bounded size: no pipe, no device."""

from __future__ import annotations

import stat
from pathlib import Path

MIB = 1 << 20
CONFIG_NBYTES = 64 * MIB
"""Most bytes of a config, an index or a profile."""
TRACE_NBYTES = 256 * MIB
"""Most bytes of a log or a trace of requests."""


def regular_nbytes(path: Path) -> int:
    """Bytes of a regular file, links followed.

    Raises ``ValueError`` for anything else (a directory, a pipe, a device), ``OSError`` for one that is not there.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{short(path)} is not a regular file")
    return found.st_size


def read_text(path: Path, most: int = CONFIG_NBYTES, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file of at most ``most`` bytes.

    Raises ``ValueError`` for a larger one or another kind of file (``UnicodeDecodeError`` for another encoding),
    ``OSError`` for one that cannot be read.
    """
    size = regular_nbytes(path)
    if size <= most:
        with path.open("rb") as stream:
            content = stream.read(most + 1)  # it may have grown, or say 0 bytes as those of /proc do
        size = len(content)
        if size <= most:
            return content.decode(encoding, errors)
    raise ValueError(f"{short(path)} has {size:,} bytes: allowed are up to {most:,}")


def short(path: Path) -> str:
    """The path on one line, in up to 200 characters."""
    text = str(path).replace("\n", "\\n")
    return text if len(text) <= 200 else f"{text[:60]}...{text[-130:]}"
