"""KIVI in an engine's pages: the reference of :mod:`kvruntime.paged`.

How many tokens of a row are packed is a function of its length alone, so nothing is kept a request.  Rotated values
lie rotated in exact pages too, and attention turns its output back.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from kvruntime.kernels.reference import store_slots
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.reference import Layout, Stored
from kvruntime.methods.room import Batch, Pages, PageShape
from kvsim.layout import LayerShape
from kvsim.methods.kivi import Kivi, Record


def check(method: Kivi) -> None:
    method.check_pages()


def page_shape(method: Kivi, layer: LayerShape) -> PageShape:
    tokens, nbytes, exact_tokens, residual = method.page(layer)
    token = layer.num_kv_heads * (layer.key_dim + layer.value_dim) * getattr(torch, method.dtype).itemsize
    return PageShape(tokens, nbytes, exact_tokens, exact_tokens * token, residual)


@overload
def num_packed(method: Kivi, length: int) -> int: ...
@overload
def num_packed(method: Kivi, length: Tensor) -> Tensor: ...
def num_packed(method: Kivi, length: int | Tensor) -> int | Tensor:
    if not isinstance(length, Tensor):
        return method.num_packed(length)
    size = method.record_length
    return ((length - method.residual_length).clamp(min=0) + (size - 1)) // size * size


def layout_of(method: Kivi, pages: Pages) -> Layout:
    return Layout(record_of(method, pages), 0, method.residual_length)


def record_of(method: Kivi, pages: Pages) -> Record:
    return method.record(LayerShape(pages.key.shape[1], pages.key.shape[3], pages.value.shape[3]))


def stored(pages: Pages, batch: Batch, lengths: Tensor) -> Stored:
    assert pages.records is not None
    tables = {"block_table": batch.block_table, "exact_table": batch.exact_table}
    return Stored(pages.records, pages.key, pages.value, lengths, batch.packed, **tables)


def store(method: Kivi, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    value = reference.stored_values(value, record_of(method, pages), pages.value.dtype)
    store_slots(key, value, pages.key, pages.value, batch.slots)
    _pack(method, pages, batch, single=True)


def pack(method: Kivi, pages: Pages, batch: Batch) -> None:
    if batch.most > 1:
        _pack(method, pages, batch, single=False)


def _pack(method: Kivi, pages: Pages, batch: Batch, single: bool) -> None:
    """Whole records out of exact pages, of rows that bring one token or of those that bring more."""
    assert batch.block_table is not None
    assert pages.records is not None
    record, size = record_of(method, pages), pages.key.shape[2]
    counts = batch.starts.diff().tolist()
    for row, (after, count) in enumerate(zip(batch.lengths.tolist(), counts, strict=True)):
        first, last = method.num_packed(after - count), method.num_packed(after)
        if not count or first == last or (count == 1) != single:
            continue
        token = torch.arange(first, last, device=pages.key.device)
        page = batch.exact_table[row, token // size].long()
        key, value = (pool[page, :, token % size].transpose(0, 1) for pool in (pages.key, pages.value))
        places = batch.block_table[row, first // record.num_tokens : last // record.num_tokens]
        pages.records[places.long()] = reference.pack_records(key, value, record).transpose(0, 1)


def attend(method: Kivi, query: Tensor, key: Tensor, value: Tensor, pages: Pages, batch: Batch, scale: float) -> Tensor:
    layout = layout_of(method, pages)
    if batch.most == 1:
        held = stored(pages, batch, batch.lengths)
        return reference.attend(query[: len(batch.lengths), :, None], held, layout, scale)[:, :, 0]
    return reference.attend(query, stored(pages, batch, batch.before), layout, scale, (key, value, None), batch.starts)


def gather(
    method: Kivi, key: Tensor, value: Tensor, pages: Pages, batch: Batch, begins: Tensor, into: tuple[Tensor, Tensor]
) -> None:
    assert batch.block_table is not None
    assert pages.records is not None
    record, size = record_of(method, pages), pages.key.shape[2]
    rows = zip(*(x.tolist() for x in (batch.starts, batch.before, batch.lengths, batch.packed, begins)), strict=False)
    for row, (start, before, after, packed, begin) in enumerate(rows):
        blocks = batch.block_table[row, : packed // record.num_tokens].long()
        old = reference.unpack_records(pages.records[blocks].transpose(0, 1), record)
        token = torch.arange(packed, before, device=key.device)
        page = batch.exact_table[row, token // size].long()
        for out, held, pool, new in zip(into, old, (pages.key, pages.value), (key, value), strict=True):
            stored = torch.cat([held.transpose(0, 1), pool[page, :, token % size].float()])
            if pool is pages.value and record.rotation:
                stored = reference.rotated(stored, record.rotation)
            fresh = new[start : start + after - before]
            out[begin : begin + after] = torch.cat([x.to(out.dtype) for x in (stored, fresh)])


def read_row(layer: Any, row: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of a layer that keeps its books: a row's ``records [blocks, num_kv_heads, words]``, and its exact ``key`` and
    ``value [tokens, num_kv_heads, dim]`` behind them."""
    packed = layer.row_packed[row]
    token = torch.arange(packed, layer.row_lengths[row], device=layer.device)
    slot = token % layer.method.residual_length
    held = layer.tensors
    exact = (held[name][row][:, slot].transpose(0, 1) for name in ("exact_key", "exact_value"))
    key, value = exact
    return held["records"][row, : packed // layer.record.num_tokens], key, value


def write_rows(layer: Any, num_tokens: int, records: Tensor | None, key: Tensor, value: Tensor) -> None:
    """The other way, to every row of a layer that holds nothing yet."""
    assert records is not None
    packed = len(records) * layer.record.num_tokens
    layer.provide(num_tokens)
    slot = torch.arange(packed, num_tokens, device=layer.device) % layer.method.residual_length
    layer.tensors["records"][:, : len(records)] = records
    layer.tensors["exact_key"][:, :, slot] = key.transpose(0, 1)
    layer.tensors["exact_value"][:, :, slot] = value.transpose(0, 1)
    for i, count in enumerate((num_tokens, packed)):
        layer.tensors["lengths"][i] = count
    layer.catch_up(layer.tensors["lengths"][0])
