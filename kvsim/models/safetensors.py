"""The headers of safetensors files: names, shapes, types and sizes of a checkpoint's tensors; the data stays on disk.

Pure standard library, every length checked against the file.  Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from kvsim.models.model import Model
from kvsim.regular_files import read_text, regular_nbytes, short

LONGEST = 1 << 25  # bytes of a header: some 200,000 tensors (the format's own bound is 100 MB)
AXES = 8
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
        size = regular_nbytes(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(LONGEST, size - 8):
                raise _broken(file, f"a header of {length:,} bytes in a file of {size:,}")
            text = stream.read(length)
    except OSError as error:
        raise ValueError(f"{short(file)} cannot be read: {error.strerror}") from None

    def once(rows: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(rows)
        if len(out) != len(rows):
            twice = next(name for name, count in Counter(name for name, _ in rows).items() if count > 1)
            raise _broken(file, f"its header has {twice[:60]!r} twice")
        return out

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except _BrokenError:
        raise
    except (ValueError, RecursionError):
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    told = header.pop("__metadata__", {})
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise _broken(file, "its __metadata__ is not an object of texts")
    held = size - 8 - length
    tensors = {name: _tensor(file, name, row, held) for name, row in header.items()}
    end = 0
    for start, stop, name in sorted((*row["data_offsets"], name) for name, row in header.items()):
        if start != end:
            what = "overlaps the one before it" if start < end else "leaves a hole before it"
            raise _broken(file, f"tensor {name[:60]!r} {what}, at byte {start:,}")
        end = stop
    if end != held:
        raise _broken(file, f"{held - end:,} bytes behind its last tensor")
    return tensors


class _BrokenError(ValueError):
    """A safetensors file that its format forbids."""


def _broken(file: Path, why: str) -> ValueError:
    return _BrokenError(f"{short(file)} is no whole safetensors file: {why}")


def _tensor(file: Path, name: str, row: Any, held: int) -> Tensor:
    row = row if isinstance(row, dict) else {}
    shape, dtype, ends = row.get("shape"), row.get("dtype"), row.get("data_offsets")
    if isinstance(shape, list) and len(shape) > AXES:
        raise _broken(file, f"tensor {name[:60]!r} of {len(shape):,} axes, allowed are up to {AXES}")
    fit = isinstance(shape, list) and isinstance(ends, list) and len(ends) == 2 and isinstance(dtype, str)
    numbers = [*(shape or []), *(ends or [])] if fit else [None]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 60 for one in numbers):
        raise _broken(file, f"tensor {name[:60]!r} is not described by a shape, a type and two offsets")
    if dtype not in BITS:
        raise _broken(file, f"tensor {name[:60]!r} is of the unknown type {str(dtype)[:20]!r}")
    start, end = row["data_offsets"]
    if 8 * (end - start) != prod(row["shape"]) * BITS[dtype]:
        raise _broken(file, f"tensor {name[:60]!r} of {row['shape']} {dtype} takes {end - start:,} bytes")
    if end > held:
        raise _broken(file, f"tensor {name[:60]!r} ends {end - held:,} bytes behind the end of the file (cut short?)")
    return Tensor(tuple(row["shape"]), dtype, end - start)


def checkpoint(folder: Path) -> dict[str, Tensor] | None:
    """The tensors that a loader takes of a model directory; ``None`` where it has none in safetensors.

    Raises ``ValueError``, naming the file, where one is missing, half downloaded or not what the index says.
    """
    files = weight_files(folder)
    if not files:
        return None
    tensors: dict[str, Tensor] = {}
    for file, expected in files.items():
        found = read_tensors(file)
        lost = next((name for name in expected if name not in found), None)
        if lost is not None:
            raise ValueError(f"{short(folder)}: the index says {lost[:80]!r} is in {file.name}, which does not have it")
        tensors |= found
    return tensors


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a directory that hold its weights, each with the tensors that its index names.

    As transformers and vLLM choose them: those of ``model.safetensors.index.json``; else ``model.safetensors``; else
    the parts ``model-00001-of-00003.safetensors``; else every other one (GPTQ's older names); ``consolidated.*``, the
    same weights under Mistral's own names, only where there is nothing else.  An adapter, or an optimizer's state, is
    no weight.  Raises ``ValueError``, naming the file, where one of those is missing or half downloaded.
    """
    names = {entry.name for entry in folder.iterdir() if not entry.is_dir()}
    halves = {}
    for name in names:
        base = name.removesuffix(next((end for end in HALF if name.endswith(end)), ""))
        if base != name and base.endswith(".safetensors") and (base not in names or name.endswith(".aria2")):
            halves[base] = name
    held = sorted({name for name in names if name.endswith(".safetensors")} | halves.keys())
    others = [name for name in held if not NO_WEIGHTS.search(name)]
    files: dict[Path, list[str]] = {}
    for stem in ("model", "consolidated"):
        index = folder / f"{stem}.safetensors.index.json"
        parts = [name for name in held if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", name)]
        whole = [name for name in held if name == f"{stem}.safetensors"]
        if index.name in names:
            files = _indexed(folder, index)
        else:
            files = {folder / name: [] for name in whole or parts or (others if stem == "model" else [])}
            _refuse_missing(folder, [path.name for path in files])
        if files:
            break
    half = next((halves[path.name] for path in files if path.name in halves), None)
    if half is not None:
        raise ValueError(f"{short(folder)}: {half} is half a download")
    return files


HALF = (".part", ".partial", ".incomplete", ".aria2", ".crdownload", ".download", ".tmp")
"""What a download adds to a file's name until it is whole (aria2: to the name of a file beside it)."""
PART = re.compile(r"(.*?)(\d{5})-of-(\d{5})(\.safetensors)")
NO_WEIGHTS = re.compile(r"(^|[^a-z])(adapter|lora|optimizer|scheduler|optim|training|consolidated)([^a-z]|$)", re.I)


def _refuse_missing(folder: Path, names: list[str]) -> None:
    """Refuses files of which one says that it is of several, where not all of those are there."""
    counts: dict[str, str] = {}
    for name in names:
        found = PART.fullmatch(name)
        if not found:
            continue
        stem, part, count = found[1], int(found[2]), int(found[3])
        if counts.setdefault(stem, found[3]) != found[3]:
            several = f"parts of {int(counts[stem])} and of {count}"
            raise ValueError(f"{short(folder)} has {several}: {name} is of another set")
        each = (f"{stem}{at:05d}-of-{found[3]}.safetensors" for at in range(1, count + 1))
        lost = next((other for other in each if other not in names), None)
        if lost is not None or not 1 <= part <= count:
            raise ValueError(f"{short(folder)} has {name} and not {lost or 'so many'}: half a download")


def _indexed(folder: Path, index: Path) -> dict[Path, list[str]]:
    """The files that an index names, with the tensors of each."""
    try:
        rows = json.loads(read_text(index))["weight_map"].items()
        files: dict[Path, list[str]] = {}
        for name, file in rows:
            files.setdefault(folder / file, []).append(name)
    except OSError as error:
        raise ValueError(f"{short(index)} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{short(index)} is no index of safetensors files") from None
    for path in files:
        inside = path.relative_to(folder) if path.is_relative_to(folder) else path
        odd = "\\" in str(inside) or not inside.name.isprintable() or not 0 < len(str(inside)) <= 255
        if ".." in inside.parts or inside.is_absolute() or odd:
            raise ValueError(f"{short(index)} names {str(inside)[:80]!r}: allowed are files of its own directory")
        if not path.exists():
            raise ValueError(f"{index.name} names {path.name[:80]}, which is not in {short(folder)}: half a download")
    return files


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
                f"{short(folder)}: tensor {name[-80:]} has {rows} rows, "
                f"config.json says kv heads x head dim = {expected}"
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
