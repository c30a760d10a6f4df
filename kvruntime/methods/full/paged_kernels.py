"""Triton: the uncompressed cache in an engine's pages (:mod:`kvruntime.paged`)."""

from __future__ import annotations

from torch import Tensor

from kvruntime.kernels.slots import store_slots
from kvruntime.methods.full import decode
from kvruntime.methods.full.paged import stored
from kvruntime.methods.room import Batch, Pages
from kvsim.methods.full import Full


def store(method: Full, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    store_slots(key, value, pages.key, pages.value, batch.slots)


def pack(method: Full, pages: Pages, batch: Batch) -> None:
    """Nothing is."""


def attend(
    method: Full,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Pages,
    batch: Batch,
    scale: float,
    *,
    out: Tensor | None = None,
    arrivals: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    held = stored(pages, batch)
    if batch.most == 1:
        made = decode.attend(query[: len(batch.lengths), :, None], held, scale, num_tokens=num_tokens)[:, :, 0]
    else:
        made = decode.attend(query, held, scale, (key, value, None), batch.starts, num_tokens=num_tokens)
    if out is None:
        return made
    out[: len(made)].copy_(made)
    return out
