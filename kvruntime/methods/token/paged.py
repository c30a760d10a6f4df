"""Tokens coded one by one in an engine's pages: the reference of :mod:`kvruntime.paged`.

Every token is coded when it is stored, and none is exact.  A page is one record a head: the codes of ``PAGE_TOKENS``
keys, those of as many values, the keys' scales and the values' scales, one behind the other, each token's in its order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, overload

import torch
from torch import Tensor

from kvruntime.methods.room import Batch, Pages, PageShape
from kvruntime.methods.token import coding, reference
from kvruntime.methods.token.cache import layout_of, shared, shared_names
from kvruntime.methods.token.reference import Layout, Stored
from kvsim.layout import LayerShape
from kvsim.methods.token import PAGE_TOKENS, PerTokenHead, TurboQuant, page

Method = PerTokenHead | TurboQuant


def check(method: Method) -> None:
    """Every coding of single tokens fits pages."""


def page_shape(method: Method, layer: LayerShape) -> PageShape:
    return PageShape(*page(method, layer)[:2], 0, 0, 0)


@overload
def num_packed(method: Method, length: int) -> int: ...
@overload
def num_packed(method: Method, length: Tensor) -> Tensor: ...
def num_packed(method: Method, length: int | Tensor) -> int | Tensor:
    return length


@lru_cache(maxsize=64)
def shared_of(method: Method, key_dim: int, value_dim: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """The signs of the rotations of keys and values, and what their levels are looked up in; None of codings without.

    They are made once, outside of any CUDA graph: before a graph is captured its calls run as they are.
    """
    if isinstance(method, PerTokenHead):
        return (None,) * 4
    shape = LayerShape(1, key_dim, value_dim)
    with torch.inference_mode(False):
        held = shared(method, method.shared_buffers([shape]), device)
    return tuple(held[name] for name in shared_names(layout_of(method, shape)))


def sections(method: Method, shape: LayerShape, records: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of ``records [blocks, num_kv_heads, words]`` int32: codes ``[blocks, num_kv_heads, PAGE_TOKENS, bytes]``
    uint8 and scales ``[blocks, num_kv_heads, PAGE_TOKENS]`` of keys, then of values."""
    layout, scale_type = layout_of(method, shape), scale_dtype(method)
    sizes = [coding.num_bytes(layout.key, layout.key_dim), coding.num_bytes(layout.value, layout.value_dim)]
    sizes += [scale_type.itemsize] * 2
    key, value, *scales = records.view(torch.uint8).split([PAGE_TOKENS * size for size in sizes], 2)
    key_scale, value_scale = (x.view(scale_type) for x in scales)
    return (
        key.unflatten(2, (PAGE_TOKENS, sizes[0])),
        key_scale,
        value.unflatten(2, (PAGE_TOKENS, sizes[1])),
        value_scale,
    )


def scale_dtype(method: Method) -> torch.dtype:
    found: torch.dtype = getattr(torch, getattr(method, "scale_dtype", "float16"))
    return found


def stored(method: Method, pages: Pages, lengths: Tensor, block_table: Tensor | None) -> tuple[Stored, Layout]:
    """What attention is told of a layer's pages: ``lengths [batch_size]`` tokens of each row."""
    assert pages.records is not None
    shape = LayerShape(pages.records.shape[1], pages.key.shape[3], pages.value.shape[3])
    shared = shared_of(method, shape.key_dim, shape.value_dim, pages.records.device)
    held = Stored(*sections(method, shape, pages.records), lengths, *shared)
    return held._replace(block_table=block_table), layout_of(method, shape)


def store(method: Method, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    held, layout = stored(method, pages, batch.packed, None)
    kept = (batch.slots >= 0).nonzero()[:, 0]
    kept = kept[kept < len(key)]
    page, place = batch.slots[kept] // PAGE_TOKENS, batch.slots[kept] % PAGE_TOKENS
    for new, name, codes, scale, signs in (
        (key, layout.key, held.key_codes, held.key_scale, held.key_signs),
        (value, layout.value, held.value_codes, held.value_scale, held.value_signs),
    ):
        codes[page, :, place], scale[page, :, place] = reference.encode(
            new[kept], name, scale.dtype, signs, layout.corrected
        )


def pack(method: Method, pages: Pages, batch: Batch) -> None:
    """Nothing is left to pack: tokens are stored as they will be read."""


def attend(
    method: Method, query: Tensor, key: Tensor, value: Tensor, pages: Pages, batch: Batch, scale: float
) -> Tensor:
    held, layout = stored(method, pages, batch.packed, batch.block_table)
    if batch.most == 1:
        return reference.attend(query[: len(batch.lengths), :, None], held, layout, scale)[:, :, 0]
    assert batch.block_table is not None
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    for row, (start, count) in enumerate(zip(batch.starts.tolist(), batch.starts.diff().tolist(), strict=False)):
        if not count:
            continue
        own = held._replace(lengths=held.lengths[row : row + 1], block_table=batch.block_table[row : row + 1])
        asked, new_key, new_value = (x[start : start + count].transpose(0, 1)[None] for x in (query, key, value))
        fresh = (new_key, new_value, torch.tensor([count], device=key.device))
        made = reference.attend(
            asked, own, layout, scale, None if count == 1 else fresh
        )  # one token reads itself coded
        out[start : start + count] = made[0].transpose(0, 1)
    return out


def gather(
    method: Method, key: Tensor, value: Tensor, pages: Pages, batch: Batch, begins: Tensor, into: tuple[Tensor, Tensor]
) -> None:
    assert batch.block_table is not None
    held, layout = stored(method, pages, batch.packed, batch.block_table)
    rows = zip(*(x.tolist() for x in (batch.starts, batch.before, batch.lengths, batch.packed, begins)), strict=False)
    for row, (start, before, after, packed, begin) in enumerate(rows):
        token = torch.arange(packed, device=key.device)
        block = batch.block_table[row, token // PAGE_TOKENS].long()[None]
        read = reference.read(held, layout, block, (token % PAGE_TOKENS)[None])
        for out, old, new in zip(into, read, (key, value), strict=True):
            fresh = new[start + packed - before : start + after - before]
            out[begin : begin + after] = torch.cat([x.to(out.dtype) for x in (old[0].transpose(0, 1), fresh)])


def blank(method: Method, shape: LayerShape, records: Tensor, num_tokens: int) -> None:
    """Zeros behind the first ``num_tokens`` of a row's ``records``: what a page held before is none of the row's."""
    for held in sections(method, shape, records):
        held[num_tokens // PAGE_TOKENS :, :, num_tokens % PAGE_TOKENS :] = 0


def read_row(layer: Any, row: int) -> tuple[Tensor, None, None]:
    """Of a layer that keeps its books: a row's ``records [blocks, num_kv_heads, words]``, zero behind its last token,
    and no exact tokens."""
    length, heads = layer.row_lengths[row], layer.shape.num_kv_heads
    words = page_shape(layer.method, layer.shape).record_nbytes // heads // 4
    records = torch.zeros(-(-length // PAGE_TOKENS), heads, words, dtype=torch.int32, device=layer.device)
    token = torch.arange(length, device=layer.device)
    for name, held in zip(NAMES, sections(layer.method, layer.shape, records), strict=True):
        tensor = layer.tensors[name]
        rows = tensor.view(held.dtype) if tensor.dtype.itemsize == 1 else tensor
        held[token // PAGE_TOKENS, :, token % PAGE_TOKENS] = rows[row, :, :length].transpose(0, 1)
    return records, None, None


NAMES = ("key_codes", "key_scale", "value_codes", "value_scale")
"""A layer's tensors in the order of :func:`sections`."""


def write_rows(layer: Any, num_tokens: int, records: Tensor | None, key: Tensor | None, value: Tensor | None) -> None:
    """The other way: the first ``num_tokens`` of ``records``, to every row of a layer that holds nothing yet."""
    assert records is not None
    layer.provide(num_tokens)
    token = torch.arange(num_tokens, device=layer.device)
    for name, held in zip(NAMES, sections(layer.method, layer.shape, records), strict=True):
        tensor = layer.tensors[name]
        rows = (tensor.view(held.dtype) if tensor.dtype.itemsize == 1 else tensor)[:, :, :num_tokens]
        rows.copy_(held[token // PAGE_TOKENS, :, token % PAGE_TOKENS].transpose(0, 1).expand_as(rows))
    layer.row_lengths = [num_tokens] * layer.batch_size
