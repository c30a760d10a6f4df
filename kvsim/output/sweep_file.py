"""Rows of a sweep as a file: CSV, JSON or Parquet, by the file's suffix; written in parts, so that a sweep resumes.

Each chunk becomes one part, put in place whole and sealed with a checksum; parts lie in ``<file>.parts`` beside a
description of what they were computed from.  A sweep that was interrupted goes on with the chunks that are missing or
broken, and refuses where the description is another's.  When all are there they are checked and joined into one file,
again put in place whole.  One process at a time writes a file: it holds a lock on the folder of parts.

Text is laid out with NumPy: every column becomes a matrix of digits, and leading zeros are cut out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Any
from zlib import crc32

from kvsim.analysis.sweep import Cell, Chunk, Grid, evaluate, origin, spread
from kvsim.atomic import check_replaceable, replace_file, sync_files
from kvsim.install import install_hint
from kvsim.output.schema import envelope

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = (
    "model",
    "method",
    "gpu",
    "batch",
    "ctx",
    "nbytes",
    "state_nbytes",
    "index_nbytes",
    "read_nbytes",
    "fits",
    "tpot_seconds",
    "tpot_low",
    "tpot_high",
)
DECIMALS = 9
"""Decimals of seconds in text."""

SLAB_ROWS = 1 << 13
"""Rows laid out at a time: their digits stay in the processor's cache."""

SYNC_SECONDS = 1.0
"""Between syncs of the parts written meanwhile: one by one they would take longer than small chunks themselves."""

BLOCK = 1 << 20
"""Bytes of a part that are looked at together."""

PARQUET: dict[str, Any] = {"compression": "snappy", "use_dictionary": ["model", "method", "gpu"]}

Progress = Callable[[int, int], None]


def suffix(path: Path) -> str:
    """``csv``, ``json`` or ``parquet``.  Raises ``ValueError`` for another, or where Parquet's writer is missing."""
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("csv", "json", "parquet"):
        raise ValueError(f"file {path}: allowed are names that end in .csv, .json or .parquet")
    if kind == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            hint = install_hint("parquet")
            raise ValueError(f"Parquet needs pyarrow: {hint} (or write .csv or .json)") from None
    return kind


def write(
    grid: Grid,
    path: Path,
    inputs: dict[str, Any],
    executor: Executor | None = None,
    progress: Progress | None = None,
    ahead: int = 8,
) -> int:
    """Sweeps ``grid`` into ``path`` and returns the number of chunks that were already there.

    ``inputs`` describes the grid (JSON).  ``progress(done, total)`` is told of chunks.  Raises ``ValueError`` where
    the path cannot be written, another process writes it, or its parts were computed from something else.
    """
    kind = suffix(path)
    check_replaceable(path)
    parts = path.with_name(path.name + ".parts")
    with _locked(parts, path):
        _claim(parts, {"kind": kind, "inputs": inputs, **origin(grid)})
        missing = [index for index in range(grid.num_chunks) if not _is_whole(_part(parts, index))]
        there = grid.num_chunks - len(missing)
        encoded = spread(partial(_encoded, grid, kind), missing, executor, ahead)
        unsynced: list[Path] = []
        synced = monotonic()
        for done, (index, content) in enumerate(encoded, there + 1):
            replace_file(_part(parts, index), partial(_write_part, content), sync=False)
            unsynced.append(_part(parts, index))
            if monotonic() - synced > SYNC_SECONDS or done == grid.num_chunks:
                sync_files(unsynced)
                unsynced, synced = [], monotonic()
            if progress is not None:
                progress(done, grid.num_chunks)
        joined: dict[str, Callable[[Iterable[Path], IO[bytes]], None]] = {
            "csv": _join_csv,
            "json": partial(_join_json, grid, inputs),
            "parquet": _join_parquet,
        }
        whole = _checked(_part(parts, index) for index in range(grid.num_chunks))
        replace_file(path, partial(joined[kind], whole), folder=parts)
        for part in parts.glob("*.part"):  # before what says of what they are
            part.unlink()
        shutil.rmtree(parts)
    return there


def stream(grid: Grid, inputs: dict[str, Any], out: IO[bytes]) -> None:
    """The JSON document straight to ``out``: nothing kept, nothing to resume."""
    out.write(_json_head(grid, inputs))
    for index in range(grid.num_chunks):
        content = _encoded(grid, "json", index)
        out.write(content if index + 1 < grid.num_chunks else content[:-2])
    out.write(b"\n]}\n")


@contextmanager
def _locked(parts: Path, path: Path) -> Iterator[None]:
    """The folder of parts, made where it is not there, for this process alone; the lock ends with the process.

    Raises ``ValueError`` where another holds it.  A system without such locks has none.
    """
    try:
        import fcntl
    except ImportError:
        _make(parts, path)
        yield
        return
    descriptor = -1
    while descriptor < 0:
        _make(parts, path)
        descriptor = _lock(fcntl, parts, path)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # where nothing was computed
            parts.rmdir()
        raise
    finally:
        os.close(descriptor)


def _lock(fcntl: Any, parts: Path, path: Path) -> int:
    """The descriptor that holds the lock; -1 where another process has just removed the folder, its file being whole.

    Raises ``ValueError`` where another process holds it.
    """
    try:
        descriptor = os.open(parts, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    held = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(descriptor), os.stat(parts))
    except FileNotFoundError:
        pass
    except BlockingIOError:
        raise ValueError(f"another sweep writes {path}: let it end, or give another --out") from None
    except OSError as error:
        raise ValueError(f"cannot lock {parts}: {error.strerror}") from None
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else -1


def _make(parts: Path, path: Path) -> None:
    try:
        parts.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def _claim(parts: Path, description: dict[str, Any]) -> None:
    """Makes the folder of parts this sweep's.  Raises ``ValueError`` where it is another's, saying what differs."""
    label, mine = parts / "origin.json", json.loads(json.dumps(description))
    advice = "give the same again, another --out, or remove it"
    if label.exists():
        try:
            theirs = json.loads(label.read_text(encoding="utf-8"))
        except ValueError:
            theirs = None
        if not isinstance(theirs, dict):
            raise ValueError(f"{parts} does not say what its parts were computed from: {advice}")
        other = [name for name in mine if theirs.get(name) != mine[name]]
        if other:
            raise ValueError(f"{parts} holds parts of another sweep ({', '.join(other)} changed): {advice}")
        return
    if any(parts.glob("*.part")):
        raise ValueError(f"{parts} does not say what its parts were computed from: {advice}")
    replace_file(label, json.dumps(mine, indent=1) + "\n")


def _part(parts: Path, index: int) -> Path:
    return parts / f"{index:09d}.part"


def _seal(checksum: int, length: int) -> bytes:
    """The first line of a part: of what follows, the CRC-32 and the length."""
    return b"%08x %020d\n" % (checksum, length)


SEAL = len(_seal(0, 0))


def _write_part(content: bytes, out: IO[bytes]) -> None:
    out.write(_seal(crc32(content), len(content)))
    out.write(content)


def _is_whole(part: Path) -> bool:
    """Whether a part is there and holds what was sealed."""
    checksum, length, block = 0, 0, memoryview(bytearray(BLOCK))
    try:
        with open(part, "rb", buffering=0) as file:
            seal = file.readline(SEAL)
            while size := file.readinto(block):
                checksum, length = crc32(block[:size], checksum), length + size
    except FileNotFoundError:
        return False
    return length > 0 and seal == _seal(checksum, length)


def _checked(parts: Iterable[Path]) -> Iterator[Path]:
    """The parts, each after a look that it is whole.  Raises ``ValueError`` where one is not."""
    for part in parts:
        if not _is_whole(part):
            raise ValueError(f"{part} was changed while the sweep ran: the same command makes it again")
        yield part


def _encoded(grid: Grid, kind: str, index: int) -> bytes:
    chunk = evaluate(grid, index)
    return _parquet(chunk) if kind == "parquet" else _text(chunk, json_rows=kind == "json")


def _names(cell: Cell) -> tuple[str, str, str | None]:
    return cell.model.name, cell.method.name, None if cell.card is None else cell.card.id


def _text(chunk: Chunk, json_rows: bool) -> bytes:
    """Rows as CSV lines, or as JSON objects each followed by a comma and a line feed."""
    missing = b"null" if json_rows else b""
    fields: list[bytes | NDArray[Any]] = [
        *((json.dumps(name) if json_rows else _quoted(name)).encode() for name in _names(chunk.cell)),
        chunk.batch,
        chunk.ctx,
        chunk.nbytes,
        chunk.state_nbytes,
        chunk.index_nbytes,
        chunk.read_nbytes,
        *(missing if each is None else each for each in (chunk.fits, chunk.seconds, chunk.low, chunk.high)),
    ]
    pieces: list[bytes | NDArray[Any]] = []
    for number, (name, field) in enumerate(zip(COLUMNS, fields, strict=True)):
        if json_rows:
            pieces.append((("{" if not number else ",") + json.dumps(name) + ":").encode())
        elif number:
            pieces.append(b",")
        pieces.append(field)
    pieces.append(b"},\n" if json_rows else b"\n")
    slabs = range(0, len(chunk.batch), SLAB_ROWS)
    return b"".join(
        _lines([piece if isinstance(piece, bytes) else piece[at : at + SLAB_ROWS] for piece in pieces]) for at in slabs
    )


def _quoted(name: str | None) -> str:
    if name is None:
        return ""
    return '"' + name.replace('"', '""') + '"' if any(mark in name for mark in ',"\r\n') else name


def _lines(pieces: Iterable[bytes | NDArray[Any]]) -> bytes:
    """One line a row: literal bytes, and columns of whole numbers, truth values or seconds."""
    import numpy as np

    blocks: list[tuple[NDArray[np.uint8], NDArray[np.bool_] | bool]] = []
    literal = b""
    for piece in pieces:
        if isinstance(piece, bytes):
            literal += piece
            continue
        if literal:
            blocks.append((np.frombuffer(literal, np.uint8)[None, :], True))
            literal = b""
        if piece.dtype == np.bool_:
            words = np.frombuffer(b"falsetrue\0", np.uint8).reshape(2, 5)
            block = words[piece.astype(np.int8)]
            blocks.append((block, block > 0))
        elif piece.dtype == np.float64:
            blocks.append(_digits(np.rint(piece * 10**DECIMALS).astype(np.int64), DECIMALS))
        else:
            blocks.append(_digits(piece, 0))
    if literal:
        blocks.append((np.frombuffer(literal, np.uint8)[None, :], True))
    width = sum(block.shape[1] for block, _ in blocks)
    num_rows = max(len(block) for block, _ in blocks)
    text, keep = np.empty((num_rows, width), np.uint8), np.ones((num_rows, width), bool)
    start = 0
    for block, mask in blocks:
        end = start + block.shape[1]
        text[:, start:end] = block
        if mask is not True:
            keep[:, start:end] = mask
        start = end
    return text[keep].tobytes()


def _digits(column: NDArray[np.int64], decimals: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """ASCII digits of numbers from 0, right-aligned ``[rows, width]``, a point before ``decimals``; which to keep."""
    import numpy as np

    point = 1 if decimals else 0
    width = max(len(str(int(column.max()))), decimals + 1)
    text = np.empty((len(column), width + point), np.uint8)
    rest = column
    place = width + point - 1
    for digit in range(width):
        if decimals and digit == decimals:
            text[:, place] = ord(".")
            place -= 1
        above = rest // 10
        text[:, place] = rest - above * 10 + ord("0")
        rest = above
        place -= 1
    keep = np.ones(text.shape, bool)
    whole = width - decimals
    keep[:, : whole - 1] = np.maximum.accumulate(text[:, : whole - 1] != ord("0"), axis=1)
    return text, keep


def _join_csv(parts: Iterable[Path], out: IO[bytes]) -> None:
    out.write((",".join(COLUMNS) + "\n").encode())
    for part in parts:
        _append(part, out)


def _append(part: Path, out: IO[bytes]) -> None:
    """Adds what a part holds, without a way through this process where the system can."""
    out.flush()
    with open(part, "rb") as file:
        at, end = SEAL, os.fstat(file.fileno()).st_size
        try:
            while at < end and (copied := os.copy_file_range(file.fileno(), out.fileno(), end - at, at)):
                at += copied
        except (AttributeError, OSError):  # not on this system, or not on these files
            pass
        out.seek(0, os.SEEK_END)
        file.seek(at)
        shutil.copyfileobj(file, out, BLOCK)


def _json_head(grid: Grid, inputs: dict[str, Any]) -> bytes:
    head = envelope("sweep", inputs, grid.notes)
    return f'{json.dumps(head)[:-1]},\n"rows": [\n'.encode()


def _join_json(grid: Grid, inputs: dict[str, Any], parts: Iterable[Path], out: IO[bytes]) -> None:
    out.write(_json_head(grid, inputs))
    for part in parts:
        _append(part, out)
    out.seek(-2, os.SEEK_CUR)  # the last comma
    out.truncate()
    out.write(b"\n]}\n")


def _parquet(chunk: Chunk) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = len(chunk.batch)
    arrays: list[Any] = [
        pa.DictionaryArray.from_arrays(pa.nulls(rows, pa.int32()), pa.array([], pa.string()))
        if name is None
        else pa.DictionaryArray.from_arrays(pa.array(_zeros(rows)), pa.array([name], pa.string()))
        for name in _names(chunk.cell)
    ]
    arrays += [pa.array(each) for each in (chunk.batch, chunk.ctx, chunk.nbytes)]
    arrays += [pa.array(each) for each in (chunk.state_nbytes, chunk.index_nbytes, chunk.read_nbytes)]
    arrays.append(pa.nulls(rows, pa.bool_()) if chunk.fits is None else pa.array(chunk.fits))
    for each in (chunk.seconds, chunk.low, chunk.high):
        arrays.append(pa.nulls(rows, pa.float64()) if each is None else pa.array(each))
    out = BytesIO()
    pq.write_table(pa.table(dict(zip(COLUMNS, arrays, strict=True))), out, row_group_size=rows, **PARQUET)
    return out.getvalue()


def _zeros(rows: int) -> NDArray[np.int32]:
    import numpy as np

    return np.zeros(rows, np.int32)


def _join_parquet(parts: Iterable[Path], out: IO[bytes]) -> None:
    import pyarrow.parquet as pq

    writer = None
    try:
        for part in parts:
            table = pq.read_table(BytesIO(part.read_bytes()[SEAL:]))
            if writer is None:
                writer = pq.ParquetWriter(out, table.schema, **PARQUET)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    except BaseException:
        if writer is not None:
            with suppress(Exception):  # else it closes itself, and says so, when the file is gone
                writer.close()
        raise
