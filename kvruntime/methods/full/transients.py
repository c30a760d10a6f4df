"""What lives beside the uncompressed cache at the worst moment of a layer's step: sizes in bytes, read off the code."""

from __future__ import annotations

from typing import Any

from kvsim.layout import DTYPE_BITS, LayerShape
from kvsim.methods.full import Full
from kvsim.models.model import Model

BLOCK = 1024
"""Tokens of another type that are read in float32 at a time; its own figure, to be held against the layer's."""


def append(row: dict[str, Any], method: Full, shape: LayerShape) -> list[int]:
    """Storing ``row["num_tokens"]`` new tokens in an empty layer: they are copied in place."""
    return []


def storing_one(row: dict[str, Any], method: Full, shape: LayerShape, held: int) -> list[int]:
    """Storing one token where ``held`` are."""
    return []


def attend(row: dict[str, Any], model: Model, method: Full, shape: LayerShape) -> list[int]:
    """One query a row over ``row["num_tokens"]`` stored tokens, beside the query."""
    element = DTYPE_BITS[row["dtype"]] // 8
    out = row["batch_size"] * model.num_q_heads * shape.value_dim
    if row["device"] != "cpu":
        return [out * element]
    stored = DTYPE_BITS[method.buffers(shape, 1, 1)[0].dtype] // 8
    block = min(row["num_tokens"], BLOCK)
    channels = row["batch_size"] * shape.num_kv_heads * (shape.key_dim + shape.value_dim)
    scores = row["batch_size"] * model.num_q_heads * block * 4
    return [out * element] if stored == element else [channels // 2 * block * 4, scores, scores, scores]


def chunk(row: dict[str, Any], model: Model, shape: LayerShape, stored: int) -> list[int]:
    """``row["prompt_tokens"]`` queries a row over ``stored`` tokens and their own: blockwise in float32, of a block the
    scores, those less the largest, and their exponentials; queries, results and a block's values."""
    queries = row["batch_size"] * model.num_q_heads * row["prompt_tokens"]
    block = min(stored, BLOCK)
    scores = queries * block * 4
    values = row["batch_size"] * shape.num_kv_heads * block * shape.value_dim * 4
    return [scores, scores, scores, queries * shape.key_dim * 4, queries * shape.value_dim * 4, values]
