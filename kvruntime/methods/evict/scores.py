"""How much a head's tokens matter, by policy: one score a token, from keys, values and queries in PyTorch.

``query [num_q_heads, n, dim]``: those of the last n of the tokens, already rotated and such that ``dim**-0.5`` scales
them.  ``key [num_kv_heads, tokens, dim]``, ``value`` alike.  A kv head's score is the mean over the query heads that
share it.  All of it is a pass of its own beside the attention that the model runs, whose fused kernels keep no weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvsim.methods.evict import Evict

BLOCK = 1 << 26
"""Attention weights that are held at a time."""


def attention_mass(query: Tensor, key: Tensor) -> Tensor:
    """The attention weights that tokens get, summed over the queries, each of which sees up to its own token:
    ``[num_kv_heads, tokens]`` float32."""
    (heads, tokens, dim), num_queries = key.shape, query.shape[1]
    grouped, at = query.reshape(heads, -1, num_queries, dim), torch.arange(tokens, device=key.device)
    keys, mass = key.float(), torch.zeros(heads, tokens, device=key.device)
    size = max(1, BLOCK // max(1, query.shape[0] * tokens))
    for first in range(0, num_queries, size):
        part = grouped[:, :, first : first + size].float()
        seen = tokens - num_queries + first + torch.arange(part.shape[2], device=key.device)
        logits = torch.einsum("hgnd,htd->hgnt", part, keys) * dim**-0.5
        mass += logits.masked_fill_(at > seen[:, None], float("-inf")).softmax(-1).mean(1).sum(1)
    return mass


def snapkv(method: Evict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The mean weight that the last ``observed`` queries give, the largest of ``kernel_size`` neighbours (arXiv
    2404.14469; its code pools every query head and keeps tokens of each, here those of a kv head are one)."""
    last = query[:, -(method.observed or 1) :]
    mass = attention_mass(last, key) / last.shape[1]
    return max_pool1d(mass[:, None], method.kernel_size, 1, method.kernel_size // 2)[:, 0]


def h2o(method: Evict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The weight that all queries give, or the last ``observed`` (arXiv 2306.14048)."""
    return attention_mass(query[:, -method.observed :] if method.observed else query, key)


def expected(method: Evict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The weight that queries of the same mean and covariance as the last ``observed`` would give, were they normal,
    times the length of the value (arXiv 2510.00636).

    The logarithm of the expected ``exp(q k / sqrt(d))`` is ``mean k / sqrt(d) + k covariance k / (2 d)``.  The paper
    takes mean and covariance before the rotary embedding, then turns them by its mean over the next 512 positions.
    Here they are those of rotated queries, at the last positions: the layer does not know the embedding.  Sink tokens
    have no part in the softmax, as in its code.
    """
    heads, _, dim = key.shape
    grouped = (
        query[:, -(method.observed or 1) :].float().reshape(heads, -1, min(query.shape[1], method.observed or 1), dim)
    )
    mean, keys = grouped.mean(2), key.float()
    centred = grouped - mean[:, :, None]
    covariance = centred.transpose(2, 3) @ centred / grouped.shape[2]
    spread = torch.stack([((keys @ each) * keys).sum(-1) for each in covariance.unbind(1)], 1)
    logits = torch.einsum("hgd,htd->hgt", mean, keys) * dim**-0.5 + spread / (2 * dim)
    logits[..., : method.sink_length] = float("-inf")
    weight = logits.softmax(-1).nan_to_num(0.0).mean(1)  # of nothing but sink tokens: none
    return weight * value.float().norm(dim=-1)


SCORES: dict[str, Callable[[Evict, Tensor, Tensor, Tensor], Tensor]] = {
    "snapkv": snapkv,
    "h2o": h2o,
    "expected": expected,
}
"""Policy -> ``(method, query, key, value)`` -> a score a token, ``[num_kv_heads, tokens]`` float32."""

ADDED = ("h2o",)
"""Policies whose scores add up; of the others new queries replace what former ones said."""
