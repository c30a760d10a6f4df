"""Packed prefixes in files: what many requests begin with is computed once, kept packed, and read back.

A file holds what one row's cache holds of its first tokens, for pages of an engine (:mod:`kvruntime.paged`:
:func:`from_pages`, :func:`to_pages`) and for caches under transformers (:mod:`kvruntime.hf.prefixes`) alike::

    store = PrefixStore(folder, method, shapes, model)      # a folder in memory (/dev/shm) is the host's
    store.put(tokens, layers)
    found = store.get(prompt)                               # the longest stored prefix, or None

It is a safetensors file, ``<tokens>-<hash of them>.safetensors``, with three tensors a layer: ``records.<layer>``
``[blocks, num_kv_heads, words]`` int32 (none of a method that packs nothing), ``keys.<layer>`` and ``values.<layer>``
``[exact tokens, num_kv_heads, dim]``, the tokens from :func:`kvruntime.paged.num_packed` on (none of a method that
codes every token; its last record is zero behind the prefix).  Its metadata say format
and version, method, shapes, the model's name, the hash of the tokens, and each tensor's CRC-32; all are checked.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvruntime import paged
from kvruntime.methods import room_of, spelled
from kvsim.atomic import replace_file
from kvsim.layout import LayerShape, Method

FORMAT, VERSION = "kvruntime prefix", 1
SUFFIX = ".safetensors"
PARTS = ("records", "keys", "values")


class LayerPrefix(NamedTuple):
    """A prefix in one layer: ``records [blocks, num_kv_heads, words]`` int32, and exact ``key`` and ``value
    [tokens, num_kv_heads, dim]`` of the tokens behind them; each None of a method that has none."""

    records: Tensor | None
    key: Tensor | None
    value: Tensor | None


class Prefix(NamedTuple):
    """The first ``num_tokens`` of a row, layer by layer."""

    num_tokens: int
    layers: list[LayerPrefix]


class PrefixStore:
    """Prefixes of one model under one method, a file each in ``folder``, which is made.

    ``shapes``: what a token leaves in each layer.  ``model``: a name that tells its weights from others'; a file of
    another model, method or shape is never returned.
    Raises ``ValueError`` for a method that does not fit pages.
    """

    def __init__(self, folder: str | Path, method: Method, shapes: Sequence[LayerShape], model: str) -> None:
        paged.check(method)
        self.folder, self.method, self.shapes, self.model = Path(folder), method, list(shapes), model
        about = {"method": spelled(method), "shapes": [[x.num_kv_heads, x.key_dim, x.value_dim] for x in shapes]}
        self._about: dict[str, Any] = {"format": FORMAT, "version": VERSION, **about, "model": model}
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, tokens: Sequence[int]) -> Path:
        """Where a prefix is kept, there or not."""
        own = sha256(json.dumps(self._about, sort_keys=True).encode())
        return self.folder / f"{len(tokens)}-{hash_of(tokens, own.digest())[:40]}{SUFFIX}"

    @property
    def lengths(self) -> list[int]:
        """Tokens of the files there, each once, the longest first."""
        found = {path.name.partition("-")[0] for path in self.folder.glob(f"*-*{SUFFIX}")}
        return sorted((int(name) for name in found if name.isdigit()), reverse=True)

    def find(self, tokens: Sequence[int]) -> int:
        """Tokens of the longest stored prefix that leaves one of ``tokens`` to compute; 0 where there is none."""
        for length in self.lengths:
            if 0 < length < len(tokens) and self.path(tokens[:length]).exists():
                return length
        return 0

    def put(self, tokens: Sequence[int], layers: Sequence[LayerPrefix]) -> Path:
        """Keeps what the layers hold of exactly ``tokens``.  A file appears whole or not at all.

        Raises ``ValueError`` for tensors of other shapes or types than the method says.
        """
        from safetensors.torch import save

        own = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}  # views may share memory
        given = {name: x.detach().to(**own) for name, x in _named(layers).items()}
        self._check(given, len(tokens), "the prefix")
        about = self._about | {"tokens": len(tokens), "sha256": hash_of(tokens)}
        about["crc32"] = {name: crc_of(x) for name, x in given.items()}
        path = self.path(tokens)
        replace_file(path, save(given, {"kvruntime": json.dumps(about)}), sync=False)  # each tensor has its digest
        return path

    def get(self, tokens: Sequence[int], device: torch.device | str = "cpu", *, check: bool = True) -> Prefix | None:
        """The longest stored prefix that leaves one of ``tokens`` to compute, on ``device``; None where there is none.

        ``check``: whether every byte is held against its CRC-32.  Raises ``ValueError`` for a file that is no prefix,
        of another version, or not what it says.
        """
        length = self.find(tokens)
        if not length:
            return None
        path = self.path(tokens[:length])
        try:
            about, given = read(path)
        except FileNotFoundError:  # taken away meanwhile
            return None
        wanted = self._about | {"tokens": length, "sha256": hash_of(tokens[:length])}
        wrong = [name for name, value in wanted.items() if about.get(name) != value]
        if wrong:
            raise ValueError(f"{path} is a prefix of another {', '.join(wrong)} than its name says")
        self._check(given, length, str(path))
        if check:
            digests = about.get("crc32")
            known = digests if isinstance(digests, dict) else {}
            bad = [name for name, x in given.items() if known.get(name) != crc_of(x)]
            if bad:
                raise ValueError(f"{path} is damaged: {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''}")
        placed = {name: x.to(device) for name, x in given.items()}
        layers = [LayerPrefix(*(placed.get(f"{part}.{i}") for part in PARTS)) for i in range(len(self.shapes))]
        return Prefix(length, layers)

    def _check(self, given: dict[str, Tensor], num_tokens: int, what: str) -> None:
        """Raises ``ValueError`` unless the tensors are those of ``num_tokens`` under the method."""
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        exact = num_tokens - paged.num_packed(self.method, num_tokens)
        for i, shape in enumerate(self.shapes):
            page, heads = paged.page_shape(self.method, shape), shape.num_kv_heads
            if page.record_tokens:
                words = page.record_nbytes // heads // 4
                wanted[f"records.{i}"] = (-(-(num_tokens - exact) // page.record_tokens), heads, words), torch.int32
            if page.exact_tokens:
                dtype = getattr(torch, self.method.dtype)  # type: ignore[attr-defined]
                wanted[f"keys.{i}"] = (exact, heads, shape.key_dim), dtype
                wanted[f"values.{i}"] = (exact, heads, shape.value_dim), dtype
        found = {name: (tuple(x.shape), x.dtype) for name, x in given.items()}
        if found != wanted:
            name = min(found.items() ^ wanted.items(), key=str)[0]
            raise ValueError(
                f"{what} of {num_tokens:,} tokens has {name} {found.get(name)}, {self.method.name} says "
                f"{wanted.get(name)}"
            )


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file says of itself, and its tensors on the host.

    Raises ``ValueError`` for a file that is no prefix, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("kvruntime", "{}"))
            if not isinstance(about, dict):
                raise ValueError(f"{path} is no prefix that kvruntime kept")
            if about.get("format") == FORMAT and about.get("version") == VERSION:
                return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is no prefix that kvruntime kept")
    raise ValueError(f"{path} is a prefix of version {about.get('version')}: this kvruntime reads {VERSION}")


def from_pages(method: Method, pages: paged.Pages, blocks: Tensor, places: Tensor, num_tokens: int) -> LayerPrefix:
    """A row's first ``num_tokens`` of a layer, out of an engine's pages: all that it holds.

    ``blocks`` and ``places``: the row's block tables, of records and of exact tokens.
    """
    packed, size = paged.num_packed(method, num_tokens), pages.key.shape[2]
    records = None
    if pages.records is not None:
        shape = LayerShape(pages.key.shape[1], pages.key.shape[3], pages.value.shape[3])
        each = paged.page_shape(method, shape).record_tokens
        records = pages.records[blocks[: -(-packed // each)].long()]
        if packed % each:
            room_of(method).paged.blank(method, shape, records, packed)
    if not size:
        return LayerPrefix(records, None, None)
    token = torch.arange(packed, num_tokens, device=places.device)
    page = places[token // size].long()
    return LayerPrefix(records, pages.key[page, :, token % size], pages.value[page, :, token % size])


def to_pages(
    method: Method, held: LayerPrefix, pages: paged.Pages, blocks: Tensor, places: Tensor, num_tokens: int
) -> None:
    """The other way: a prefix of ``num_tokens`` to the pages that a row's tables name, on their device."""
    packed, size = paged.num_packed(method, num_tokens), pages.key.shape[2]
    if pages.records is not None and held.records is not None:
        pages.records[blocks[: len(held.records)].long()] = held.records.to(pages.records.device)
    if held.key is None or held.value is None:
        return
    token = torch.arange(packed, num_tokens, device=places.device)
    page = places[token // size].long()
    for pool, exact in ((pages.key, held.key), (pages.value, held.value)):
        pool[page, :, token % size] = exact.to(pool.device)


def hash_of(tokens: Sequence[int], salt: bytes = b"") -> str:
    """SHA-256 of token ids as little-endian int64, behind ``salt``."""
    return sha256(salt + torch.tensor(list(tokens), dtype=torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


def crc_of(x: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes on the host."""
    return zlib.crc32(x.reshape(-1).view(torch.uint8).numpy()) if x.numel() else 0


def _named(layers: Sequence[LayerPrefix]) -> dict[str, Tensor]:
    out = {}
    for i, held in enumerate(layers):
        for part, x in zip(PARTS, held, strict=True):
            if x is not None:
                out[f"{part}.{i}"] = x
    return out
