"""Host: which calls :mod:`kvruntime.methods.token.fast` takes, and how it goes about them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvruntime.methods.token.fast_words import nbits_of
from kvruntime.methods.token.levels import level_bytes, steps
from kvruntime.methods.token.reference import Fresh, Layout, Stored

TILE = 64
"""Tokens that blocks of a pool have, or whole multiples of them."""
DIMS = {"lloyd2": (128,), "lloyd3": (128,), "lloyd4": (64, 128), "int4": (64, 128), "int8": (64, 128)}
Q_PER_KV = 4


class Plan(NamedTuple):
    """Tokens a step of the loop; steps held in shared memory; registers a thread; programs a multiprocessor."""

    tile: int
    stages: int
    registers: int
    programs: int


PLANS = {
    "lloyd2": Plan(128, 2, 255, 8),
    "lloyd3": Plan(64, 3, 168, 8),
    "lloyd4": Plan(64, 2, 216, 8),
    "int4": Plan(128, 2, 255, 6),
    "int8": Plan(64, 2, 255, 6),
}
"""As measured on an H200."""


def plan(layout: Layout, page: int = 0) -> Plan:
    """How the kernel goes about a layout: by the coding of more bits, in tiles that lie within a ``page``."""
    found = PLANS[max(layout.key, layout.value, key=nbits_of)]
    return found._replace(tile=min(found.tile, page)) if page else found


def page_tokens(stored: Stored) -> int:
    """Tokens of a block of the pool; 0 of rows without blocks."""
    return 0 if stored.block_table is None else stored.key_codes.shape[2]


def holds(layout: Layout, q_per_kv: int, dtype: torch.dtype) -> bool:
    """Whether the kernel reads these codings for so many queries a key."""
    return (
        q_per_kv <= Q_PER_KV
        and dtype in (torch.float16, torch.bfloat16)
        and layout.key_dim == layout.value_dim
        and all(layout.key_dim in DIMS.get(name, ()) for name in (layout.key, layout.value))
    )


def aligned(num_slots: int, scale_nbytes: int) -> bool:
    """Whether every row's scales begin at whole words: those of two bytes not where a row has an odd number."""
    return num_slots * scale_nbytes % 4 == 0


def supports(query: Tensor, stored: Stored, layout: Layout, fresh: Fresh | None, starts: Tensor | None) -> bool:
    """Whether :func:`kvruntime.methods.token.fast.attend_parts` takes this call."""
    scales, codes = (stored.key_scale, stored.value_scale), (stored.key_codes, stored.value_codes)
    return (
        query.is_cuda
        and fresh is None
        and starts is None
        and page_tokens(stored) % TILE == 0
        and all(x.stride(2) == x.shape[3] for x in codes)
        and all(x.stride(2) == 1 for x in scales)
        and query.shape[2] == 1
        and holds(layout, query.shape[1] // stored.key_codes.shape[1], query.dtype)
        and all(aligned(stride, x.element_size()) for x in scales for stride in x.stride()[:2])
        and all(stride % 16 == 0 for x in codes for stride in x.stride()[:2])
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def constants(layout: Layout) -> dict[str, object]:
    """What the kernel is told of a layout at compile time."""
    out: dict[str, object] = {"KEY_CODING": layout.key, "VALUE_CODING": layout.value, "DIM": layout.key_dim}
    for stream, name in (("KEY", layout.key), ("VALUE", layout.value)):
        nbits = int(name.removeprefix("lloyd")) if name.startswith("lloyd") else 0
        out[f"{stream}_LEVELS"] = level_bytes(layout.key_dim, nbits) if nbits else ()
        out[f"{stream}_UNIT"] = steps(layout.key_dim, nbits)[0] if nbits else 1.0
    return out
