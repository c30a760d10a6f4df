"""Tokens that lie one by one in rows' own slots, or in a pool of blocks, in plain PyTorch.

Where they lie, where new ones go, and attention over them: what every method that stores each token alone means by its
kernels, whatever a slot holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Fresh, Partial, Scores, by_row, causal, padded, row_counts

BLOCK_TOKENS = 1024
"""Stored tokens that are read at a time."""


class Slots(NamedTuple):
    """Where the tokens of rows lie.

    ``lengths [batch_size]`` int32: tokens stored.  ``size``: slots of a row, token t in slot t.  With a block ``table
    [batch_size, num_blocks]`` int32, ``size`` are those of a block: token t of row b lies in slot ``t % size`` of block
    ``table[b, t // size]``.  Entries for tokens that a row does not have are not looked at.
    """

    lengths: Tensor
    size: int
    table: Tensor | None = None

    def check(self, pool: str) -> None:
        """Raises ``ValueError`` for a table of another shape or type; ``pool``: the shape of what it leads to."""
        table, rows = self.table, len(self.lengths)
        if table is not None and (table.dtype != torch.int32 or table.dim() != 2 or len(table) != rows):
            raise ValueError(
                f"block table {list(table.shape)} of {table.dtype}: expected [{rows}, num_blocks] int32 over {pool}"
            )

    def places(self, token: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Index, of a row or of a block, and slot of tokens ``token [batch_size, n]``, each ``[batch_size, n]``;
        something that exists where they are not ``wanted``."""
        token = torch.where(wanted, token, 0)
        if self.table is None:
            return torch.arange(len(token), device=token.device)[:, None].expand_as(token), token
        block = self.table.gather(1, token // self.size) if token.numel() else token
        return torch.where(wanted, block, 0).long(), token % self.size

    def blocks(self, most: int = BLOCK_TOKENS) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Index and slot of the stored tokens, ``[batch_size, n]`` each, ``most`` at a time, and which of them a row
        has, ``[batch_size, 1, 1, n]``."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(lengths) else 0
        for first in range(0, longest, most):
            token = torch.arange(first, min(first + most, longest), device=lengths.device).expand(len(lengths), -1)
            held = token < lengths[:, None]
            yield *self.places(token, held), held[:, None, None]


def arriving(
    key: Tensor, value: Tensor, counts: Sequence[int] | Tensor | None, slots: Slots, starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New tokens behind what each row holds: index and slot of each, ``[n]``, and its keys and values, ``[n,
    num_kv_heads, dim]``.

    | tensor | shape |
    |---|---|
    | key, value | [batch_size, num_kv_heads, L, dim]; row b's tokens are the last counts[b] of the L |
    | counts | a number a row; None: all are |
    | starts | [batch_size + 1] int32: key and value are one line [tokens, num_kv_heads, dim], row b's from starts[b] |
    """
    counts = row_counts(counts, starts, len(slots.lengths), key.shape[2])
    if starts is not None:
        key, value = padded(key, counts), padded(value, counts)
    length, device = key.shape[2], key.device
    ahead = torch.arange(length, device=device) - (length - torch.tensor(counts, device=device)[:, None])
    wanted = ahead >= 0  # of the columns that are a row's own
    index, slot = slots.places(slots.lengths[:, None] + ahead, wanted)
    new_key, new_value = (x.transpose(1, 2)[wanted] for x in (key, value))
    return index[wanted], slot[wanted], new_key, new_value


def attend(
    query: Tensor,
    slots: Slots,
    read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    num_kv_heads: int,
    value_dim: int,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    *,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention over everything that is stored, and over ``fresh`` tokens; in a line where there are ``starts``.

    ``read(index, slot)``: keys and values ``[batch_size, num_kv_heads, n, dim]`` of stored tokens.  The tensors are
    those of :func:`kvruntime.kernels.reference.by_row`.
    """
    if starts is not None:

        def rows(query: Tensor, fresh: Fresh | None) -> Tensor:
            return attend(query, slots, read, num_kv_heads, value_dim, scale, fresh, scores=scores)

        return by_row(rows, query, fresh, starts)
    batch, q_heads, length, _ = query.shape
    q_per_kv = q_heads // num_kv_heads
    state = Partial(query.reshape(batch, num_kv_heads, q_per_kv * length, -1), value_dim, scale, scores.softcap)
    for index, slot, held in slots.blocks():
        state.add(*read(index, slot), held)
    real = None
    if fresh is not None:
        key, value, counts = fresh
        real, visible = causal(counts, length, q_per_kv)
        state.add(key, value, visible)
    out = state.result(scores.sinks_of(num_kv_heads, length)).reshape(batch, q_heads, length, -1)
    if real is not None:
        out = torch.where(real[:, None, :, None], out, 0.0)
    return out.to(query.dtype)
