"""A method's buffers as tensors: how many tokens they provide for, and how they grow."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsim.layout import Buffer

GROW_TOKENS = 256
"""Without a known final length, buffers provide for a multiple of this many tokens a row."""


def tokens_to_provide(num_tokens: int, max_seq_len: int | None) -> int:
    """Tokens a row to provide for so that ``num_tokens`` fit.

    Raises ``ValueError`` when they exceed ``max_seq_len``.
    """
    if max_seq_len is None:
        return -(-num_tokens // GROW_TOKENS) * GROW_TOKENS
    if num_tokens > max_seq_len:
        raise ValueError(f"{num_tokens} tokens do not fit: the cache was made for max_seq_len {max_seq_len}")
    return max_seq_len


def grown(old: Tensor | None, buffer: Buffer, device: torch.device) -> Tensor:
    """``buffer`` as a zeroed tensor on ``device`` that begins, in every dimension, with what ``old`` held."""
    new = torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
    if old is not None:
        new[tuple(slice(size) for size in old.shape)] = old
    return new
