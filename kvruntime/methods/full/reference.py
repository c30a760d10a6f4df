"""The uncompressed cache in plain PyTorch, over rows' own slots or a pool of blocks: the meaning of the kernels.

Lengths: ``Stored.lengths`` counts what lies in its tensors when a call begins, without what the call brings;
the caller counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvruntime.kernels.reference import Partial, behind, check_table, embedded, padded, row_counts, table_places

BLOCK_TOKENS = 1024


class Stored(NamedTuple):
    """What a layer holds.

    | tensor | shape |
    |---|---|
    | key, value | [batch_size, num_kv_heads, slots, dim]: token t in slot t |
    | lengths | [batch_size] int32: tokens stored |
    | block_table | [batch_size, num_blocks] int32, or None |

    With a block table, key and value are pools [pool_size, num_kv_heads, n, dim] of any strides but the last, 1: token
    t of row b lies in slot ``t % n`` of block ``block_table[b, t // n]``.  Rows may share blocks.  Entries for tokens
    that a row does not have are not looked at.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor
    block_table: Tensor | None = None


Fresh = tuple[Tensor, Tensor, Tensor | None]
"""Tokens not yet stored: key, value, and how many each row has of them (None in a line with starts)."""


def check(stored: Stored) -> None:
    """Raises ``ValueError`` for a block table of another shape or type."""
    check_table(stored.block_table, len(stored.lengths), "[pool_size, num_kv_heads, n, dim]")


def places(stored: Stored, token: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Index and slot of tokens ``token [batch_size, n]``; something that exists where they are not ``wanted``."""
    return table_places(stored.block_table, stored.key.shape[2], token, wanted)


def append(
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | Tensor | None,
    stored: Stored,
    starts: Tensor | None = None,
) -> None:
    """Store new tokens behind what each row holds.

    | tensor | shape |
    |---|---|
    | key, value | [batch_size, num_kv_heads, L, dim]; row b's tokens are the last counts[b] of the L |
    | counts | a number a row; None: all are |
    | starts | [batch_size + 1] int32: key and value are one line [tokens, num_kv_heads, dim], row b's from starts[b] |
    """
    check(stored)
    counts = row_counts(counts, starts, len(stored.lengths), key.shape[2])
    if starts is not None:
        key, value = padded(key, counts), padded(value, counts)
    ahead = behind(counts, key.shape[2], key.device)
    wanted = ahead >= 0
    index, slot = places(stored, stored.lengths[:, None] + ahead, wanted)
    for store, new in ((stored.key, key), (stored.value, value)):
        store[index[wanted], :, slot[wanted]] = new.transpose(1, 2)[wanted].to(store.dtype)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stored: Stored,
    positions: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store one token a row.

    | tensor | shape |
    |---|---|
    | query | [batch_size, num_q_heads, 1, key_dim]; with ``rotary`` it is embedded in place |
    | key, value | [batch_size, num_kv_heads, 1, dim] |
    | positions | [batch_size] int32: of the rotary embedding; it may be ``stored.lengths`` |
    | rotary | (cos, sin), each [positions, key_dim]; None: already embedded |
    """
    turned, key = embedded(query, key, rotary, positions)
    if rotary is not None:
        query.copy_(turned)
    append(key, value, None, stored)


def attend(
    query: Tensor,
    stored: Stored,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    stepped: bool = False,
) -> Tensor:
    """Attention over everything a layer stores.

    | tensor | shape |
    |---|---|
    | query | [batch_size, num_q_heads, L, key_dim] |
    | fresh | (key, value [batch_size, num_kv_heads, L, dim], counts [batch_size]): not yet stored, causal |
    | out | [batch_size, num_q_heads, L, value_dim], query's dtype |
    | starts | [batch_size + 1] int32, or None |

    With ``starts`` all rows' queries are one line [tokens, num_q_heads, key_dim], in which row b's begin at
    ``starts[b]``, the fresh key and value lie alike, [tokens, num_kv_heads, dim], their counts are None, and so comes
    the output.  ``stepped``: each row holds one token more than its length says, which :func:`step` has just stored.
    """
    if starts is not None:
        counts = row_counts(None, starts, len(stored.lengths), 0)
        if fresh is not None:
            key, value = (padded(x, counts) for x in fresh[:2])
            fresh = (key, value, torch.tensor(counts, dtype=torch.int32, device=query.device))
        out = attend(padded(query, counts), stored, scale, fresh, None, stepped)
        ends = zip(out, counts, strict=True)
        return torch.cat([row[:, row.shape[1] - count :].transpose(0, 1) for row, count in ends])
    check(stored)
    batch, q_heads, length, _ = query.shape
    heads = stored.key.shape[1]
    lengths = stored.lengths + int(stepped)
    state = Partial(query.reshape(batch, heads, q_heads // heads * length, -1), stored.value.shape[-1], scale)
    most = int(lengths.max()) if batch else 0
    for first in range(0, most, BLOCK_TOKENS):
        token = torch.arange(first, min(first + BLOCK_TOKENS, most), device=query.device).expand(batch, -1)
        held = token < lengths[:, None]
        index, slot = places(stored, token, held)
        held_key, held_value = (x[index, :, slot].transpose(1, 2) for x in (stored.key, stored.value))
        state.add(held_key, held_value, held[:, None, None])
    real = None
    if fresh is not None:
        key, value, number = fresh
        assert number is not None
        index = torch.arange(length, device=query.device)
        real = index >= length - number[:, None]  # [batch_size, L]
        causal = (index[None, :] <= index[:, None]) & real[:, None, :]
        state.add(key, value, causal.repeat(1, q_heads // heads, 1)[:, None])
    out = state.result().reshape(batch, q_heads, length, -1)
    if real is not None:
        out = torch.where(real[:, None, :, None], out, 0.0)
    return out.to(query.dtype)
