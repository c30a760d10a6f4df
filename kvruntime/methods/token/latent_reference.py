"""Attention over coded latents of MLA in plain PyTorch: what :mod:`kvruntime.methods.token.latent` means."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Fresh, Partial, Scores
from kvruntime.kernels.slot_reference import BLOCK_TOKENS
from kvruntime.methods.token.reference import Layout, Stored, read, slots

BLOCK_SCORES = 1 << 24
"""Scores of one block of queries over one block of tokens, at most: 64 MiB of float32."""


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    fresh: Fresh | None = None,
    stepped: bool = False,
    scores: Scores = PLAIN,
) -> Tensor:
    """:func:`kvruntime.methods.token.reference.attend` of ``query [batch_size, num_q_heads, L, rank + rope]`` over
    latents, which are keys and values: ``[batch_size, num_q_heads, L, rank]``.

    ``fresh``: (latents ``[batch_size, 1, L, rank]``, rotary keys ``[batch_size, 1, L, rope]``, counts).
    Stored and fresh tokens go by blocks of ``BLOCK_TOKENS``, queries by blocks that make ``BLOCK_SCORES`` scores of
    them, or by one query where that makes more.
    """
    batch, q_heads, length, _ = query.shape
    held_slots = slots(stored, stepped)
    out = query.new_empty(batch, q_heads, length, layout.key_dim)
    size = max(1, BLOCK_SCORES // max(1, batch * q_heads * BLOCK_TOKENS))
    for start in range(0, length, size):
        part = query[:, :, start : start + size]
        end = start + part.shape[2]
        state = Partial(part.reshape(batch, 1, q_heads * (end - start), -1), layout.key_dim, scale, scores.softcap)
        for index, slot, held in held_slots.blocks(BLOCK_TOKENS):
            latent, rope = read(stored, layout, index, slot)
            state.add(torch.cat([latent, rope], -1), latent, held)
        if fresh is not None:
            _add_fresh(state, fresh, q_heads, start, end)
        done = state.result(scores.sinks_of(1, end - start)).reshape(batch, q_heads, end - start, -1)
        out[:, :, start:end] = done.to(query.dtype)
    if fresh is not None:
        assert fresh[2] is not None
        real = torch.arange(length, device=query.device) >= length - fresh[2][:, None]
        out.masked_fill_(~real[:, None, :, None], 0.0)
    return out


def _add_fresh(state: Partial, fresh: Fresh, q_heads: int, start: int, end: int) -> None:
    """The tokens of ``fresh`` up to each query's own, for queries ``start`` to ``end``."""
    latent, rope, number = fresh
    assert number is not None
    own = torch.arange(start, end, device=latent.device)
    for first in range(0, end, BLOCK_TOKENS):
        block = slice(first, min(first + BLOCK_TOKENS, end))
        token = torch.arange(block.start, block.stop, device=latent.device)
        real = token >= latent.shape[2] - number[:, None]
        causal = (token <= own[:, None]) & real[:, None, :]
        key = torch.cat([latent[:, :, block], rope[:, :, block]], -1)
        state.add(key, latent[:, :, block], causal.repeat(1, q_heads, 1)[:, None])
