"""What the kernels of this folder mean, in plain PyTorch, for the references of all methods.

Attention over blocks of tokens (``merge``, ``prompt``), rows in one line (``lines``), the rotary embedding of one token
(``rotary``), the Hadamard rotation (``hadamard``) and a slot mapping (``slots``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """What a model does to attention scores besides scaling them.

    ``softcap``: scaled scores become ``softcap * tanh(score / softcap)`` (Gemma 2).  ``sinks [num_q_heads]``: a learned
    logit a query head that takes part in the softmax and has no value (gpt-oss).  ``window``: a query sees so many
    newest tokens, its own among them.  None: nothing of the kind.
    """

    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is none."""
        return self.softcap is None and self.sinks is None and self.window is None

    def sees(self, token: Tensor, newest: Tensor) -> Tensor | None:
        """Which of ``token [batch_size or 1, n]`` the window of queries ``[batch_size, rows]`` has, whose own tokens
        are ``newest``: ``[batch_size, 1, rows, n]``; None without a window."""
        return None if self.window is None else (token[:, None] > newest[:, :, None] - self.window)[:, None]

    @property
    def softcap_log2(self) -> float | None:
        """``softcap`` of scores in powers of two."""
        return None if self.softcap is None else self.softcap * math.log2(math.e)

    def sinks_of(self, num_kv_heads: int, length: int) -> Tensor | None:
        """The sinks of query rows as :class:`Partial` has them: ``[num_kv_heads, q_per_kv * length]`` float32."""
        if self.sinks is None:
            return None
        return self.sinks.float().repeat_interleave(length).reshape(num_kv_heads, -1)


PLAIN = Scores()

Fresh = tuple[Tensor, Tensor, Tensor | None]
"""Tokens not yet stored: key, value, and how many each row has of them (None in a line with starts)."""


class Partial:
    """A running softmax over blocks of tokens: ``add`` blocks, then ``result`` (arXiv 2112.05682)."""

    def __init__(self, query: Tensor, value_dim: int, scale: float, softcap: float | None = None) -> None:
        self.softcap = softcap
        self.query = query.float() * scale  # [batch_size, num_kv_heads, rows, key_dim]
        self.peak = query.new_full(query.shape[:-1], float("-inf"), dtype=torch.float32)
        self.total = torch.zeros_like(self.peak)
        self.out = query.new_zeros(*query.shape[:-1], value_dim, dtype=torch.float32)

    def add(self, key: Tensor, value: Tensor, visible: Tensor | None = None, more: Tensor | None = None) -> None:
        """A block of tokens ``[batch_size, num_kv_heads, n, dim]``; ``visible`` and ``more``, both of which a token
        must satisfy, broadcast to ``[..., rows, n]``."""
        if more is not None:
            visible = more if visible is None else visible & more
        score = self.query @ key.float().transpose(-1, -2)
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        value = value.float()
        if visible is not None:
            score = torch.where(visible, score, float("-inf"))
            hidden = ~visible.any(-2, keepdim=True).transpose(-1, -2)
            value = torch.where(hidden, 0.0, value)  # what no query sees may be anything, NaN too
        peak = torch.maximum(self.peak, score.amax(-1))
        finite = torch.where(peak == float("-inf"), 0.0, peak)
        alpha = torch.exp(self.peak - finite)
        weight = torch.exp(score - finite[..., None])
        self.total = self.total * alpha + weight.sum(-1)
        self.out = self.out * alpha[..., None] + weight @ value
        self.peak = peak

    def result(self, sinks: Tensor | None = None) -> Tensor:
        """``[batch_size, num_kv_heads, rows, value_dim]`` in float32; rows that saw nothing are zero.

        ``sinks [num_kv_heads, rows]``: a logit a row that takes part in the softmax and has no value.
        """
        out, total = self.out, self.total
        if sinks is not None:
            peak = torch.maximum(self.peak, sinks)
            alpha = torch.exp(self.peak - peak)
            out, total = out * alpha[..., None], total * alpha + torch.exp(sinks - peak)
        return out / torch.where(total == 0, 1.0, total)[..., None]


def embedded(
    query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor] | None, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """``query`` and ``key`` ``[batch_size, heads, 1, dim]`` with the rotary embedding of each row's position."""
    if rotary is None:
        return query, key
    cos, sin = (table[positions.long()][:, None, None] for table in rotary)
    half = query.shape[3] // 2
    turned = [torch.cat((-x[..., half:], x[..., :half]), -1) for x in (query, key)]
    return query * cos + turned[0] * sin, key * cos + turned[1] * sin


def embed(query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor] | None, positions: Tensor) -> Tensor:
    """:func:`embedded`, the query in place; the key is returned.

    | tensor | shape |
    |---|---|
    | query | [batch_size, num_q_heads, 1, key_dim] |
    | key | [batch_size, num_kv_heads, 1, key_dim] |
    | rotary | (cos, sin), each [positions, key_dim]; None: already embedded |
    | positions | [batch_size] int32 |
    """
    turned, key = embedded(query, key, rotary, positions)
    if rotary is not None:
        query.copy_(turned)
    return key


def rotated(x: Tensor, size: int) -> Tensor:
    """``x [..., channels]``, every ``size`` channels times the normalised Hadamard matrix, which is its own inverse;
    float32.

    Sums and differences in pairs 1, 2, 4, ... channels apart: what the kernels that do so get, to the bit.
    """
    x, apart = x.float(), 1
    while apart < size:
        first, second = x.unflatten(-1, (-1, 2, apart)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        apart *= 2
    return x * size**-0.5


def row_counts(counts: Sequence[int] | Tensor | None, starts: Tensor | None, batch_size: int, length: int) -> list[int]:
    """Tokens that each row brings, on the host: of a line by its ``starts``; where nothing is said, all ``length``."""
    if starts is not None:
        counts = starts.diff()
    if counts is None:
        return [length] * batch_size
    return counts.tolist() if isinstance(counts, Tensor) else list(counts)


def padded(line: Tensor, counts: Sequence[int]) -> Tensor:
    """A line ``[tokens, heads, dim]`` as ``[batch_size, heads, L, dim]``: each row's tokens are its last,
    before them zeros."""
    most = max(counts, default=0)
    out = line.new_zeros(len(counts), line.shape[1], most, line.shape[2])
    for row, part in zip(out, line.split(list(counts)), strict=True):
        row[:, most - len(part) :] = part.transpose(0, 1)
    return out


def by_row(
    attend: Callable[[Tensor, Fresh | None], Tensor], query: Tensor, fresh: Fresh | None, starts: Tensor
) -> Tensor:
    """``attend(query, fresh)`` of rows that lie in one line, in which row b's tokens begin at ``starts[b]``.

    | tensor | of rows, for ``attend`` | in the line |
    |---|---|---|
    | query | [batch_size, num_q_heads, L, key_dim] | [tokens, num_q_heads, key_dim] |
    | fresh key, value | [batch_size, num_kv_heads, L, dim]: not yet stored, causal | [tokens, num_kv_heads, dim] |
    | fresh counts | [batch_size] int32: row b's tokens are the last counts[b] of the L | None |
    | starts | None | [batch_size + 1] int32 |
    | out | [batch_size, num_q_heads, L, value_dim], query's dtype | [tokens, num_q_heads, value_dim] |
    """
    counts = starts.diff().tolist()
    if fresh is not None:
        key, value = (padded(x, counts) for x in fresh[:2])
        fresh = (key, value, torch.tensor(counts, dtype=torch.int32, device=query.device))
    ends = zip(attend(padded(query, counts), fresh), counts, strict=True)
    return torch.cat([row[:, row.shape[1] - count :].transpose(0, 1) for row, count in ends])


def causal(counts: Tensor | None, length: int, q_per_kv: int) -> tuple[Tensor, Tensor]:
    """Which of L columns are a row's own, its last ``counts[b]``: ``[batch_size, L]``; and which fresh tokens each
    query sees, the row's up to its own: ``[batch_size, 1, q_per_kv * L, L]``."""
    assert counts is not None
    index = torch.arange(length, device=counts.device)
    real = index >= length - counts[:, None]
    visible = (index[None, :] <= index[:, None]) & real[:, None, :]
    return real, visible.repeat(1, q_per_kv, 1)[:, None]


def store_slots(key: Tensor, value: Tensor, pool_key: Tensor, pool_value: Tensor, slots: Tensor) -> None:
    """``key`` and ``value`` ``[tokens, num_kv_heads, dim]`` to pools ``[pool_size, num_kv_heads, n, dim]``: token t to
    place ``slots[t] % n`` of page ``slots[t] // n``, or nowhere where ``slots[t]`` is below 0."""
    number = min(len(key), len(slots))
    kept = slots[:number] >= 0
    slot, size = slots[:number][kept].long(), pool_key.shape[2]
    for pool, new in ((pool_key, key), (pool_value, value)):
        pool[slot // size, :, slot % size] = new[:number][kept].to(pool.dtype)
