"""What a serving engine needs of a method: shapes of pages, and three stateless calls a layer and step.

An engine owns the pools, the tables and the lengths.  Exact tokens and records lie in pages of one pool::

    batch = paged.batch(method, starts, lengths, block_table, exact_table, slots, most)   # once a step
    paged.store(method, key, value, pages, batch)                                         # then in every layer
    paged.pack(method, pages, batch)
    out = paged.attend(method, query, key, value, pages, batch, scale)

``query [tokens, num_q_heads, key_dim]``, ``key`` and ``value`` ``[tokens, num_kv_heads, dim]`` are the line of all
rows' tokens: chunks of prompts, single tokens and drafts beside each other.  Everything that a step decides it reads on
the device, so a CUDA graph of the calls holds for any lengths and tables of the same shapes.

**Lengths.**  ``Batch.lengths`` counts a row's tokens with those of this step, as an engine's ``seq_lens`` do, and
``Batch.before`` without them.  :func:`num_packed` of a length says how many tokens are in records, and nothing else
does: no state is kept a row.

**What a token sees.**  A row that brings one token stores it, packs what its exact tokens have no room for, and
attends: a decode step.  A row that brings several, a prompt's chunk or drafts, attends to what was stored before it
came and to its own tokens, as they are.  Outputs therefore depend on how an engine cuts a prompt, because a token that
was packed is read rounded.  Methods that code each token alone keep none exact: ``store`` codes them, ``pack`` does
nothing, and a token that comes alone reads itself as it is stored.

**What an engine keeps.**  The records of all packed tokens.  Before a step, the exact tokens of a row from
``num_packed(before)`` on: ``residual`` at most.  During it, a page for each new token.  A token's page may go once the
next step's ``before`` no longer needs it.  Drafts may be taken back: the shorter length's exact tokens are still in
their pages, and a record that was packed for the longer one is packed again, with the same words, when its time comes.

**Shared pages.**  What is written to a place is a function of the row's tokens there alone, to the bit, so two rows may
share pages and write them twice.  A row may also begin behind a prefix that another row stores in the same step: where
the engine cuts a step into several batches, all of them are stored and packed before any attends.

**What runs before.**  On compute capability 9.0 and above two launches may begin while their predecessor ends: that of
single tokens' ``store``, and the tensor-core kernel.  Over pools both wait until it is complete before they read or
write memory, so whatever kernel an engine runs before them on the stream is safe.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, overload

import torch
from torch import Tensor

from kvruntime.methods import room_of
from kvruntime.methods.room import Batch, Pages, PageShape
from kvsim.engines.kvruntime import check_runs
from kvsim.layout import LayerShape, Method


def check(method: Method) -> None:
    """Raises ``ValueError``, naming it, for a method or an option that does not fit pages."""
    check_runs(method)
    room_of(method)
    _paged(method).check(method)


def page_shape(method: Method, layer: LayerShape) -> PageShape:
    """What a page of ``layer`` holds.  Raises ``ValueError`` where :func:`check` does."""
    check(method)
    shape: PageShape = _paged(method).page_shape(method, layer)
    return shape


@overload
def num_packed(method: Method, length: int) -> int: ...
@overload
def num_packed(method: Method, length: Tensor) -> Tensor: ...
def num_packed(method: Method, length: int | Tensor) -> int | Tensor:
    """How many tokens of a row of ``length`` are in records: of a number, or of a tensor on its device."""
    found: int | Tensor = _paged(method).num_packed(method, length)
    return found


def batch(
    method: Method,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    exact_table: Tensor,
    slots: Tensor,
    most: int,
    counted: tuple[Tensor, Tensor] | None = None,
) -> Batch:
    """A step, from what an engine has of it: the tensors are :class:`Batch`'s.

    ``counted``: two int32 tensors of ``lengths``' shape, for ``before`` and ``packed``, where a CUDA graph is to find
    them at the same place in every step.
    """
    counts = starts.diff()
    before = lengths - counts
    packed = num_packed(method, torch.where(counts == 1, lengths, before)).int()
    if counted is not None:
        before, packed = counted[0].copy_(before), counted[1].copy_(packed)
    return Batch(starts, lengths, before, packed, block_table, exact_table, slots, most)


def store(method: Method, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    """This step's tokens to their slots; rows that bring one token also pack what must make room for it."""
    _runs(method, key).store(method, key, value, pages, batch)


def attend(
    method: Method, query: Tensor, key: Tensor, value: Tensor, pages: Pages, batch: Batch, scale: float, **planned: Any
) -> Tensor:
    """Attention of the line ``query``, causal, over what is stored and this step's tokens: ``[tokens, num_q_heads,
    value_dim]``, of rows that bring one token each a line of as many.

    On CUDA ``planned`` may have ``out``, where the output goes, ``arrivals``, int32 zeros, two a query head of a row,
    which calls on one stream share, and ``num_tokens``, the length for which the work is split.
    """
    out: Tensor = _runs(method, query).attend(method, query, key, value, pages, batch, scale, **planned)
    return out


def pack(method: Method, pages: Pages, batch: Batch) -> None:
    """Whole records out of exact pages, of rows that bring several tokens; nothing where ``batch.most`` is 1.

    They stay in their exact pages, where this step's :func:`attend` reads them.
    """
    _runs(method, pages.key).pack(method, pages, batch)


def gather(
    method: Method,
    key: Tensor,
    value: Tensor,
    pages: Pages,
    batch: Batch,
    begins: Tensor,
    into: tuple[Tensor, Tensor],
) -> None:
    """All of each row's tokens as :func:`attend` would read them, this step's among them, where several come.

    ``begins [batch_size + 1]`` int32: where each row begins in ``into``, two contiguous tensors
    ``[tokens, num_kv_heads, dim]``: what attention of another maker may read.  Raises ``ValueError`` for a method whose
    tokens are all exact.
    """
    runs = _runs(method, key)
    if not hasattr(runs, "gather"):
        raise ValueError(f"{method.name} keeps every token exact: its pages are read as they are")
    runs.gather(method, key, value, pages, batch, begins, into)


def _paged(method: Method) -> Any:
    """The method's pages.  Raises ``ValueError`` for one that has none."""
    room = room_of(method)
    if room.paged is None:
        raise ValueError(f"{method.name} does not fit an engine's pages: {room.unpaged}")
    return room.paged


def _runs(method: Method, x: Tensor) -> Any:
    """The kernels on CUDA, the reference elsewhere."""
    pages = _paged(method)
    return import_module(f"{pages.__name__}_kernels") if x.is_cuda else pages


__all__ = [
    "Batch",
    "PageShape",
    "Pages",
    "attend",
    "batch",
    "check",
    "gather",
    "num_packed",
    "pack",
    "page_shape",
    "store",
]
