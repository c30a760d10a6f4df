"""The header of a GGUF file: its metadata and the shape, type and size of every tensor; the data stays on disk.

Pure standard library, every length checked against the file before it is believed, so that a truncated or corrupt
file ends in one clear ``ValueError``.  Format: github.com/ggml-org/ggml docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kvsim.regular_files import regular_nbytes, short

MAGIC = b"GGUF"
MOST = 1 << 17  # tensors, metadata entries
LONGEST = 1 << 26  # numbers of an array
VALUES = 1 << 21  # texts and other values that are walked one by one, over the whole header
NAME = 1 << 16  # bytes of a name, the format's own bound
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PARTS = 9999  # of a split model
KEPT = 4096  # longer arrays are vocabularies: walked, not kept

BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""ggml's tensor types: ``(numbers a block, bytes a block)``, as of the gguf package 0.19."""


@dataclass(frozen=True)
class Tensor:
    """``shape`` in ggml's order: the fastest axis, a matrix's input width, first."""

    shape: tuple[int, ...]
    type: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """``metadata`` holds every entry but long arrays, of which only the length is kept (``name.length``)."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Cursor:
    """Reads forward through a file's bytes; raises ``ValueError`` at the first length that cannot be."""

    def __init__(self, data: mmap.mmap, file: str) -> None:
        self.data, self.at, self.file = data, 0, file
        self.walked = 0

    def fail(self, why: str) -> ValueError:
        return ValueError(f"{self.file} is no whole GGUF file: {why} at byte {self.at:,}")

    def skip(self, size: int) -> int:
        """Moves on by ``size`` bytes; returns where they start."""
        start = self.at
        if size > len(self.data) - start:
            raise self.fail(f"{size:,} bytes are announced, {len(self.data) - start:,} are left")
        self.at += size
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def length(self, what: str, most: int) -> int:
        size: int = self.number("Q")
        if size > most:
            raise self.fail(f"{size:,} {what} are announced, allowed are {most:,}")
        return size

    def walk(self, count: int) -> None:
        """Counts values that are to be read one by one; raises ``ValueError`` where they are too many."""
        self.walked += count
        if self.walked > VALUES:
            raise self.fail(f"more than {VALUES:,} values in the header")

    def string(self) -> str:
        """A name, of a tensor or an entry."""
        size = self.length("bytes of a name", NAME)
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            self.at = start
            raise self.fail("a name that is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            size = self.length("bytes of text", len(self.data))
            start = self.skip(size)
            return self.data[start : start + min(size, KEPT)].decode("utf-8", "replace")
        if kind == ARRAY and depth < 4:
            return self.array(depth)
        raise self.fail(f"an unknown type of metadata {kind}")

    def array(self, depth: int) -> list[Any] | int:
        """The entries; of a long array their number."""
        kind, size = self.number("I"), self.length("entries", LONGEST)
        if size <= KEPT or kind == STRING:
            self.walk(size)
        if size <= KEPT:
            return [self.value(kind, depth + 1) for _ in range(size)]
        if kind in SCALARS:
            self.skip(size * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            unpack, data, end, at = struct.Struct("<Q").unpack_from, self.data, len(self.data), self.at
            for _ in range(size):
                if at + 8 > end:
                    self.at = at
                    raise self.fail("a list of texts is cut short")
                at += 8 + unpack(data, at)[0]
            self.at = min(at, end)
            if at > end:
                raise self.fail("a list of texts is cut short")
        else:
            raise self.fail(f"an array of type {kind}")
        return size


def is_gguf(file: Path) -> bool:
    """Whether a regular file starts as a GGUF file does."""
    try:
        regular_nbytes(file)
        with file.open("rb") as stream:
            return stream.read(4) == MAGIC
    except (OSError, ValueError):
        return False


def read_header(file: Path) -> Header:
    """The header of ``file``; of a split model (``name-00001-of-00003.gguf``) the tensors of all its parts.

    Raises ``ValueError``, naming the file, for one that is truncated, corrupt or of an unknown version.
    """
    header = _read(file)
    parts = _part_count(file, header)
    if parts <= 1:
        return header
    found = re.fullmatch(r"(.*-)(\d{5})(-of-(\d{5})\.gguf)", file.name)
    if not found or int(found[4]) != parts:
        raise ValueError(f"{short(file)} is one of {parts} parts: its name must end in -00001-of-{parts:05d}.gguf")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for part in range(1, parts + 1):
        other = file.with_name(f"{found[1]}{part:05d}{found[3]}")
        if not other.exists():
            raise ValueError(f"{short(file)} is one of {parts} parts, and {other.name} is not beside it")
        inner = _read(other)
        if _part_count(other, inner) != parts or inner.metadata.get("split.no", part - 1) != part - 1:
            raise ValueError(f"{short(other)} does not say of itself that it is part {part} of {parts}")
        twice = next(iter(tensors.keys() & inner.tensors.keys()), None)
        if twice is not None:
            raise ValueError(f"{short(other)}: tensor {twice[:60]!r} is in another part too")
        tensors |= inner.tensors
        metadata = inner.metadata | metadata
    return Header(metadata, tensors)


def _part_count(file: Path, header: Header) -> int:
    """``split.count``, 0 where it is absent.  Raises ``ValueError`` for anything but a whole number."""
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, bool) or not isinstance(parts, int) or not 0 <= parts <= PARTS:
        raise ValueError(f"{short(file)}: GGUF key split.count is {parts!r:.60}: allowed are whole numbers to {PARTS}")
    return parts


def _read(file: Path) -> Header:
    try:
        size = regular_nbytes(file)
        if size < 24:
            raise ValueError(f"{short(file)} is no whole GGUF file: {size} bytes")
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, short(file)))
    except OSError as error:
        raise ValueError(f"{short(file)} cannot be read: {error.strerror}") from None


def _parse(cursor: _Cursor) -> Header:
    if cursor.data[:4] != MAGIC:
        raise cursor.fail("it does not start with GGUF")
    cursor.skip(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise cursor.fail(f"version {version}, allowed are 2 and 3")
    num_tensors, num_entries = cursor.length("tensors", MOST), cursor.length("entries", MOST)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        name = cursor.string()
        if name in metadata:
            raise cursor.fail(f"entry {name[:60]!r} for the second time")
        value = cursor.value(cursor.number("I"))
        if isinstance(value, list) and len(value) > KEPT:
            value = len(value)
        metadata[name] = value
    tensors: dict[str, Tensor] = {}
    offsets: list[tuple[str, int, int]] = []
    for _ in range(num_tensors):
        name, axes = cursor.string(), cursor.number("I")
        if not 0 < axes <= 8:
            raise cursor.fail(f"tensor {name[:60]!r} of {axes} axes")
        shape = tuple(cursor.length("numbers on one axis", 1 << 40) for _ in range(axes))
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in BLOCKS:
            raise cursor.fail(f"tensor {name[:60]!r} of the unknown type {kind}")
        per_block, size = BLOCKS[kind]
        if name in tensors:
            raise cursor.fail(f"tensor {name[:60]!r} for the second time")
        if not shape[0] or shape[0] % per_block:
            raise cursor.fail(f"tensor {name[:60]!r} of the shape {list(shape)}, type {kind}")
        tensors[name] = Tensor(shape, kind, prod(shape) // per_block * size)
        offsets.append((name, offset, tensors[name].nbytes))
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise cursor.fail(f"general.alignment {str(alignment)[:20]}")
    if alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment {alignment}, which is no power of 2")
    start, end = _aligned(cursor.at, alignment), 0
    for name, offset, nbytes in offsets:
        # as ggml reads them: one tensor right behind the other, each at a multiple of the alignment
        if offset != _aligned(end, alignment):
            expected = _aligned(end, alignment)
            raise cursor.fail(f"tensor {name[:60]!r} at offset {offset:,}, the one before makes it {expected:,}")
        end = offset + nbytes
    if offsets and start + end > len(cursor.data):
        missing = start + end - len(cursor.data)
        raise cursor.fail(f"its tensors end {missing:,} bytes behind the end of the file (cut short?), header read")
    return Header(metadata, tensors)


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment
