"""Layers with a sliding window beside packed ones: their tokens stay exact, in pages of the pool that records lie in.

vLLM frees what leaves a window, so a layer reads pages alone, this step's tokens among them.  On a GPU vLLM's own
Triton attention does, whose pages may be of any size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvruntime import paged
from kvsim.methods import Full

EXACT = Full()
"""What a window's tokens are stored by; their type is the pool's."""


def attend_window(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, kv_cache: Tensor, rows: Any, window: int, scale: float
) -> None:
    """Stores this step's ``key`` and ``value [tokens, num_kv_heads, dim]`` and attends: to ``out``, like ``query``.

    ``kv_cache [blocks, num_kv_heads, n, 2 * dim]``: keys beside their values.  A query sees ``window`` tokens, its own
    among them.
    """
    most = rows.most
    tokens = rows.begins[-1] if rows.begins else len(rows.lengths)
    query, key, value, out = (x[:tokens] for x in (query, key, value, out))
    pages = paged.Pages(None, *kv_cache.split(kv_cache.shape[3] // 2, 3))
    batch = paged.Batch(
        rows.starts, rows.lengths, rows.lengths, rows.lengths, None, rows.table, rows.slots[:tokens], most
    )
    paged.store(EXACT, key, value, pages, batch)
    if query.is_cuda:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        unified_attention(
            q=query,
            k=pages.key.transpose(1, 2),
            v=pages.value.transpose(1, 2),
            out=out,
            cu_seqlens_q=rows.starts,
            max_seqlen_q=most,
            seqused_k=rows.lengths,
            max_seqlen_k=rows.table.shape[1] * kv_cache.shape[2],
            softmax_scale=scale,
            causal=True,
            window_size=(window - 1, 0),
            block_table=rows.table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
    else:
        attend_pages(query, pages, batch, window, scale, out)


def attend_pages(query: Tensor, pages: paged.Pages, batch: paged.Batch, window: int, scale: float, out: Tensor) -> None:
    """The same in PyTorch, row by row."""
    size, groups = pages.key.shape[2], query.shape[1] // pages.key.shape[1]
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    for row, length in enumerate(lengths):
        asked = query[starts[row] : starts[row + 1]].transpose(0, 1)
        count = asked.shape[1]
        if not count:
            continue
        newest = torch.arange(length - count, length)
        token = torch.arange(max(0, length - count - window + 1), length)
        page = batch.exact_table[row, token // size].long()
        key, value = (
            pool[page, :, token % size].transpose(0, 1).repeat_interleave(groups, 0)
            for pool in (pages.key, pages.value)
        )
        seen = (token <= newest[:, None]) & (token > newest[:, None] - window)
        score = (asked.float() @ key.float().mT * scale).masked_fill(~seen, float("-inf"))
        made = (score.softmax(-1) @ value.float()).transpose(0, 1)
        out[starts[row] : starts[row + 1]] = made.to(out.dtype)
