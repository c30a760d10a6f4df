"""What lives beside a cache of coded tokens at the worst moment of a layer's step: sizes in bytes, read off the code.

Of the kernels alone: what PyTorch's reference makes on a CPU is not predicted.
"""

from __future__ import annotations

from typing import Any

import torch

from kvruntime.methods.token.cache import layout_of
from kvruntime.methods.token.coding import rotation
from kvsim.layout import DTYPE_BITS, LayerShape
from kvsim.models.model import Model

ON = ("cuda",)
"""Devices of which this is known."""
LENGTH = 4
"""Bytes of a row's number of tokens on the device."""


def append(row: dict[str, Any], method: Any, shape: LayerShape) -> list[int]:
    """Storing ``row["num_tokens"]`` new tokens: they are coded on their way, beside the rows' lengths."""
    return [row["batch_size"] * LENGTH] * 2


def storing_one(row: dict[str, Any], method: Any, shape: LayerShape, held: int) -> list[int]:
    """Storing one token where ``held`` are."""
    return append(row, method, shape)


def attend(row: dict[str, Any], model: Model, method: Any, shape: LayerShape) -> list[int]:
    """One query a row over what is stored, beside the query; ``row["num_splits"]``: parts that are merged."""
    layout, splits = layout_of(method, shape), row.get("num_splits", 1)
    queries = row["batch_size"] * model.num_q_heads
    merged = splits > 1 or rotation(layout.value, layout.value_dim) > 0 or whole_numbers(row, model, method, shape)
    turned = [queries * shape.key_dim * 2] if rotation(layout.key, layout.key_dim) else []
    partial = [queries * splits * shape.value_dim * 4] if merged else []
    return [
        *turned,
        queries * shape.value_dim * DTYPE_BITS[row["dtype"]] // 8,
        queries * splits * 4,
        *partial,
        row["batch_size"] * LENGTH,
    ]


def whole_numbers(row: dict[str, Any], model: Model, method: Any, shape: LayerShape) -> bool:
    """Whether the kernel in whole numbers attends, whose parts are merged also where there is one."""
    from kvruntime.methods.token import fast_plan

    nbytes = next(buffer.nbytes for buffer in method.buffers(LayerShape(1, shape.key_dim, shape.value_dim), 1, 1)
                  if buffer.name == "key_scale")  # fmt: skip
    q_per_kv, dtype = model.num_q_heads // shape.num_kv_heads, getattr(torch, row["dtype"])
    held = fast_plan.holds(layout_of(method, shape), q_per_kv, dtype)
    return held and fast_plan.aligned(row.get("max_seq_len") or 0, nbytes)
