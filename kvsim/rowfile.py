"""Rows of a sweep as a file: CSV, JSON or Parquet, by the file's suffix; written in parts, so that a sweep resumes.

Each chunk becomes one part, put in place by a rename; parts lie in ``<file>.parts`` beside a description of the
grid.  A sweep that was interrupted goes on with the chunks that are missing, and refuses where the description is
another grid's.  When all are there they are joined into one file, again put in place by a rename.

Text is laid out with NumPy: every column becomes a matrix of digits, and leading zeros are cut out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvsim.install import install_hint
from kvsim.sweep import NOT_MODELLED, Cell, Chunk, Grid, evaluate, spread

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

    ``inputs`` describes the grid (JSON); the parts of a file with other inputs are refused with ``ValueError``.
    ``progress(done, total)`` is told of chunks.
    """
    kind = suffix(path)
    parts = path.with_name(path.name + ".parts")
    _claim(parts, {"schema": "kvsim.sweep/1", "kind": kind, "chunks": grid.num_chunks, "inputs": inputs})
    missing = [index for index in range(grid.num_chunks) if not _part(parts, index).exists()]
    there = grid.num_chunks - len(missing)
    for done, (index, content) in enumerate(spread(partial(_encoded, grid, kind), missing, executor, ahead), there + 1):
        _put(_part(parts, index), lambda file, content=content: file.write(content))  # type: ignore[misc]
        if progress is not None:
            progress(done, grid.num_chunks)
    files = [_part(parts, index) for index in range(grid.num_chunks)]
    joined: dict[str, Callable[[list[Path], IO[bytes]], None]] = {
        "csv": _join_csv,
        "json": partial(_join_json, grid, inputs),
        "parquet": _join_parquet,
    }
    _put(path, partial(joined[kind], files))
    shutil.rmtree(parts)
    return there


def stream(grid: Grid, inputs: dict[str, Any], out: IO[bytes]) -> None:
    """The JSON document straight to ``out``: nothing kept, nothing to resume."""
    out.write(_json_head(grid, inputs))
    for index in range(grid.num_chunks):
        content = _encoded(grid, "json", index)
        out.write(content if index + 1 < grid.num_chunks else content[:-2])
    out.write(b"\n]}\n")


def _claim(parts: Path, description: dict[str, Any]) -> None:
    """Makes the folder of parts this grid's, or raises ``ValueError`` where it is another's."""
    label = parts / "grid.json"
    text = json.dumps(description, indent=1)
    if label.exists():
        if label.read_text(encoding="utf-8") != text:
            raise ValueError(f"{parts} holds parts of another sweep: give the same grid, another --out, or remove it")
        return
    try:
        parts.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {parts.with_suffix('')}: {error.strerror}") from None
    _put(label, lambda file: file.write(text.encode()))


def _part(parts: Path, index: int) -> Path:
    return parts / f"{index:09d}.part"


def _put(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _join_csv(files: list[Path], out: IO[bytes]) -> None:
    out.write((",".join(COLUMNS) + "\n").encode())
    for file in files:
        _append(file, out)


def _append(file: Path, out: IO[bytes]) -> None:
    """Adds a file's bytes, without a way through this process where the system can."""
    out.flush()
    with open(file, "rb") as part:
        left = os.fstat(part.fileno()).st_size
        try:
            while left:
                left -= os.copy_file_range(part.fileno(), out.fileno(), left)
            out.seek(0, os.SEEK_END)
        except (AttributeError, OSError):  # not on this system, or not on these files
            out.seek(0, os.SEEK_END)
            part.seek(-left, os.SEEK_END)
            shutil.copyfileobj(part, out, 1 << 20)


def _json_head(grid: Grid, inputs: dict[str, Any]) -> bytes:
    head = {"schema": "kvsim.sweep/1", "inputs": inputs, "notes": grid.notes, "not_modelled": NOT_MODELLED}
    return f'{json.dumps(head)[:-1]},\n"rows": [\n'.encode()


def _join_json(grid: Grid, inputs: dict[str, Any], files: list[Path], out: IO[bytes]) -> None:
    out.write(_json_head(grid, inputs))
    for file in files:
        _append(file, out)
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


def _join_parquet(files: list[Path], out: IO[bytes]) -> None:
    import pyarrow.parquet as pq

    writer = None
    for file in files:
        table = pq.read_table(file)
        if writer is None:
            writer = pq.ParquetWriter(out, table.schema, **PARQUET)
        writer.write_table(table)
    if writer is not None:
        writer.close()
