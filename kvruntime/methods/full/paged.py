"""The uncompressed cache in an engine's pages: the reference of :mod:`kvruntime.paged`.

Every token is exact, and nothing is packed.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from kvruntime.kernels.reference import store_slots
from kvruntime.methods.full import reference
from kvruntime.methods.full.reference import Stored
from kvruntime.methods.room import Batch, Pages, PageShape
from kvsim.layout import LayerShape
from kvsim.methods.full import Full

PAGE_TOKENS = 16
"""vLLM's block where nothing is said."""


def check(method: Full) -> None:
    """Every uncompressed layout fits pages."""


def page_shape(method: Full, layer: LayerShape) -> PageShape:
    token = layer.num_kv_heads * (layer.key_dim + layer.value_dim) * getattr(torch, method.dtype).itemsize
    return PageShape(0, 0, PAGE_TOKENS, PAGE_TOKENS * token, 0)


@overload
def num_packed(method: Full, length: int) -> int: ...
@overload
def num_packed(method: Full, length: Tensor) -> Tensor: ...
def num_packed(method: Full, length: int | Tensor) -> int | Tensor:
    return torch.zeros_like(length) if isinstance(length, Tensor) else 0


def store(method: Full, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    store_slots(key, value, pages.key, pages.value, batch.slots)


def pack(method: Full, pages: Pages, batch: Batch) -> None:
    """Nothing is."""


def stored(pages: Pages, batch: Batch) -> Stored:
    lengths = batch.lengths if batch.most == 1 else batch.before
    return Stored(pages.key, pages.value, lengths, batch.exact_table)


def attend(method: Full, query: Tensor, key: Tensor, value: Tensor, pages: Pages, batch: Batch, scale: float) -> Tensor:
    if batch.most == 1:
        return reference.attend(query[: len(batch.lengths), :, None], stored(pages, batch), scale)[:, :, 0]
    return reference.attend(query, stored(pages, batch), scale, (key, value, None), batch.starts)


def read_row(layer: Any, row: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of a layer that keeps its books: no records, and a row's ``key`` and ``value [tokens, num_kv_heads, dim]``."""
    key, value = (x.transpose(0, 1) for x in layer.tokens(row))
    return None, key, value


def write_rows(layer: Any, num_tokens: int, records: Tensor | None, key: Tensor, value: Tensor) -> None:
    """The other way, to every row of a layer that holds nothing yet."""
    layer.append(*(x.transpose(0, 1).expand(layer.batch_size, -1, -1, -1) for x in (key, value)))
