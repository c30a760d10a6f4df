"""New tokens, where records and exact tokens lie, and the tensors of many layers, as kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvruntime.methods.kivi import reference

COLUMNS = tl.constexpr(6)
"""Addresses a layer: keys, values, their exact slots, records, key scales."""
ALIGNMENT = tl.constexpr(16)
"""Bytes that a thread loads at once: the tensors of :func:`kvruntime.methods.kivi.append.addresses`
begin at a multiple."""


@triton.jit
def of_layer(x_ptr, layers_ptr, COLUMN: tl.constexpr):
    """This program's layer of what ``x_ptr`` is in the first.

    It is from the table of :func:`kvruntime.methods.kivi.append.addresses`, where there is one.
    """
    if layers_ptr is not None:
        x_ptr = tl.multiple_of(tl.load(layers_ptr + tl.program_id(2) * COLUMNS + COLUMN).to(x_ptr.dtype), ALIGNMENT)
    return x_ptr


class New(NamedTuple):
    """New tokens as the kernels take them."""

    key: Tensor
    value: Tensor
    num_heads: int
    length: int
    """Tokens a row at most."""
    counts: Tensor | None
    starts: Tensor | None

    def strides(self) -> tuple[int, ...]:
        """From row to row, head to head, token to token, of keys and then of values."""
        if self.starts is None:
            return (*self.key.stride()[:3], *self.value.stride()[:3])
        return tuple(stride for x in (self.key, self.value) for stride in (0, x.stride(1), x.stride(0)))


class Places(NamedTuple):
    """Where records and exact tokens lie, as the kernels take it: tables and strides,
    None where rows have their own."""

    block_table: Tensor | None
    exact_table: Tensor | None
    strides: tuple[int | None, ...]
    """Of a pool of exact tokens, from page to page, head to head, token to token: keys', then values'."""
    num_slots: int
    num_records: int
    num_pages: int | None
    page: int
    """Tokens a page; 0: there are none."""


def places(stored: reference.Stored, layout: reference.Layout) -> Places:
    """Raises ``ValueError`` where :func:`kvruntime.methods.kivi.reference.check` does."""
    reference.check(stored, layout, len(stored.lengths))
    table, pages = (x if x is None else x.contiguous() for x in (stored.block_table, stored.exact_table))
    num_records, size = reference.records_a_row(stored), stored.exact_key.shape[2]
    if pages is None:
        return Places(table, None, (None,) * 6, size, num_records, None, 0)
    strides = (*stored.exact_key.stride()[:3], *stored.exact_value.stride()[:3])
    return Places(table, pages, strides, layout.residual, num_records, pages.shape[1], size)
