"""The headers of safetensors files: names, shapes, types and sizes of a checkpoint's tensors; the data stays on disk.

Pure standard library, every length checked against the file.  Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from kvsim.model import Model

LONGEST = 100_000_000  # bytes of a header, the format's own bound
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
KEYS = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|attention)\.k_proj\.weight$")
WHOLE = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of one file.  Raises ``ValueError``, naming the file, for one that is truncated or corrupt."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(LONGEST, size - 8):
                raise _broken(file, f"a header of {length:,} bytes in a file of {size:,}")
            text = stream.read(length)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    return {name: _tensor(file, name, row, size - 8 - length) for name, row in header.items() if name != "__metadata__"}


def _broken(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is no whole safetensors file: {why}")


def _tensor(file: Path, name: str, row: Any, held: int) -> Tensor:
    row = row if isinstance(row, dict) else {}
    shape, dtype, ends = row.get("shape"), row.get("dtype"), row.get("data_offsets")
    fit = isinstance(shape, list) and isinstance(ends, list) and len(ends) == 2 and isinstance(dtype, str)
    numbers = [*(shape or []), *(ends or [])] if fit else [None]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 60 for one in numbers):
        raise _broken(file, f"tensor {name[:60]!r} is not described by a shape, a type and two offsets")
    if dtype not in BITS:
        raise _broken(file, f"tensor {name[:60]!r} is of the unknown type {str(dtype)[:20]!r}")
    start, end = row["data_offsets"]
    if end - start != prod(row["shape"]) * BITS[dtype] // 8:
        raise _broken(file, f"tensor {name[:60]!r} of {row['shape']} {dtype} takes {end - start:,} bytes")
    if end > held:
        raise _broken(file, f"tensor {name[:60]!r} ends {end - held:,} bytes behind the end of the file (cut short?)")
    return Tensor(tuple(row["shape"]), dtype, end - start)


def checkpoint(folder: Path) -> dict[str, Tensor] | None:
    """The tensors of a model directory, over all its files; ``None`` where it has no safetensors.

    Raises ``ValueError`` where the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted({folder / str(name) for name in names})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{index} is no index of safetensors files") from None
        lost = next((file for file in files if not file.is_file()), None)
        if lost is not None:
            raise ValueError(f"{index.name} names {lost.name}, which is not in {folder}")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return tensors


def weighed(model: Model, folder: Path) -> Model:
    """``model`` with the bytes of the checkpoint beside its config: ``weight_bits`` so that they come out.

    Raises ``ValueError`` where a key projection's shape is not what the config says.
    """
    tensors = checkpoint(folder)
    if not tensors:
        return model
    for name, rows, expected in _keys(model, tensors):
        if rows != expected:
            raise ValueError(
                f"{folder}: tensor {name} has {rows} rows, config.json says kv heads x head dim = {expected}"
            )
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    notes = (*model.notes, f"weights of {nbytes:,} B in {len(tensors):,} tensors beside the config")
    sources = tuple((name, key) for name, key in model.sources if name != "weight_bits")
    sources += (("weight_bits", "the checkpoint's tensors"),)
    bits = 8 * nbytes / model.num_params if model.num_params else model.weight_bits
    return replace(model, weight_bits=bits, notes=notes, sources=sources)


def _keys(model: Model, tensors: dict[str, Tensor]) -> Iterator[tuple[str, int, int]]:
    """Every plain key projection: its name, its rows, and the rows that the config means."""
    if sum(count for kind, count in model.kinds if kind in ("full", "sliding", "chunked")) != len(model.layers):
        return
    if len(model.kinds) and sum(count for _, count in model.kinds) != len(model.layers):
        return
    for name, tensor in tensors.items():
        found = KEYS.search(name)
        if not found or "vision" in name or len(found[1]) > 5 or int(found[1]) >= len(model.cache_layers):
            continue
        if tensor.dtype in WHOLE and len(tensor.shape) == 2:
            shape = model.cache_layers[int(found[1])]
            yield name, tensor.shape[0], shape.num_kv_heads * shape.key_dim
