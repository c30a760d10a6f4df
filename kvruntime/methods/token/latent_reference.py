"""Attention over coded latents of MLA in plain PyTorch: what :mod:`kvruntime.methods.token.latent` means."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.kernels.reference import PLAIN, Partial, Scores
from kvruntime.methods.token.reference import BLOCK_TOKENS, Fresh, Layout, Stored, places, read


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
    """
    batch, q_heads, length, _ = query.shape
    state = Partial(query.reshape(batch, 1, q_heads * length, -1), layout.key_dim, scale, scores.softcap)
    lengths = stored.lengths + int(stepped)
    most = int(lengths.max()) if batch else 0
    for first in range(0, most, BLOCK_TOKENS):
        token = torch.arange(first, min(first + BLOCK_TOKENS, most), device=query.device).expand(batch, -1)
        held = token < lengths[:, None]
        latent, rope = read(stored, layout, *places(stored, token, held))
        state.add(torch.cat([latent, rope], -1), latent, held[:, None, None])
    real = None
    if fresh is not None:
        latent, rope, number = fresh
        assert number is not None
        index = torch.arange(length, device=query.device)
        real = index >= length - number[:, None]
        causal = (index[None, :] <= index[:, None]) & real[:, None, :]
        state.add(torch.cat([latent, rope], -1), latent, causal.repeat(1, q_heads, 1)[:, None])
    out = state.result(scores.sinks_of(1, length)).reshape(batch, q_heads, length, -1)
    if real is not None:
        out = torch.where(real[:, None, :, None], out, 0.0)
    return out.to(query.dtype)
