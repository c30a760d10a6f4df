"""What lives beside KIVI's cache at the worst moment of a layer's step: sizes in bytes, read off the code."""

from __future__ import annotations

from typing import Any

from kvsim.layout import DTYPE_BITS, LayerShape
from kvsim.methods.kivi import Kivi
from kvsim.models.model import Model

BLOCK = 1024
"""Tokens that the reference packs, and reads back, at a time; its own figure, to be held against the reference's."""


def append(row: dict[str, Any], method: Kivi, shape: LayerShape) -> list[int]:
    """Storing ``row["num_tokens"]`` new tokens in an empty layer, beside the key and value given."""
    if row["device"] != "cpu":
        return []
    element = DTYPE_BITS[row["dtype"]] // 8
    new, packed = row["num_tokens"], method.num_packed(row["num_tokens"])
    half = row["batch_size"] * shape.num_kv_heads * (shape.key_dim + shape.value_dim) // 2
    if not packed:
        return [half * new * element, half * new * 2 * (element != DTYPE_BITS[method.dtype] // 8)]
    return encoding(half * min(packed, BLOCK // method.record_length * method.record_length), method)


def storing_one(row: dict[str, Any], method: Kivi, shape: LayerShape, held: int) -> list[int]:
    """Storing one token where ``held`` are: by PyTorch and with a flush, a record's tokens on their way to codes."""
    if row["device"] != "cpu" or method.num_packed(held + 1) == method.num_packed(held):
        return []
    half = row["batch_size"] * shape.num_kv_heads * (shape.key_dim + shape.value_dim) // 2 * method.record_length
    return [2 * half * DTYPE_BITS[row["dtype"]] // 8, *encoding(half, method)]


def encoding(half: int, method: Kivi) -> list[int]:
    """The reference at its worst: codes of both streams and a plane (int32), the plane shifted twice (int64), words."""
    return [4 * half, 4 * half, 4 * half, 8 * half, 8 * half, half * (method.k_bits + 4) // 8]


def attend(row: dict[str, Any], model: Model, method: Kivi, shape: LayerShape) -> list[int]:
    """One query a row over ``row["num_tokens"]`` stored tokens, beside the query; ``row["num_splits"]`` on a GPU."""
    rows = row["batch_size"]
    out = rows * model.num_q_heads * shape.value_dim
    if row["device"] != "cpu":
        splits = row["num_splits"]
        partial = [out * splits * 4, rows * model.num_q_heads * splits * 4] if splits > 1 else []
        return [out * DTYPE_BITS[row["dtype"]] // 8, *partial]
    packed = method.num_packed(row["num_tokens"])
    exact = min(row["num_tokens"], method.sink_length + method.residual_length)
    last = packed - (packed - 1) // BLOCK * BLOCK if packed else 0
    before = min(packed - last, BLOCK)
    half = rows * shape.num_kv_heads * (shape.key_dim + shape.value_dim) // 2
    # Keys read back in float32, values' codes, their float32, its product with the scale; the block before still held
    unpacking = [4 * half * before] * 2 + [4 * half * last] * 4 + [half * last * method.v_bits // 8]
    reading = [4 * half * (last or 0)] * 2 + [4 * half * exact] * 2
    return max(unpacking, reading, key=sum)
