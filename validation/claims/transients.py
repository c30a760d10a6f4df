"""What lives beside the cache at the worst moment: tensors of one layer's step, by where in the step the moment is.

Read off the code that runs, and only as far as tensors go: what a matrix multiplication or a fused attention
allocates inside itself is left to the error of the row.

A model's forward holds, per token and beside the cache (``H`` hidden size, ``F`` feed-forward size, ``D`` head
dimension, elements of the model's dtype):

    gpt2    6 H + 4 F          feed-forward: two embeddings, block input, residual, its norm, the sum; and GELU's four
    llama   4 H + 3 F + 2 D    feed-forward: the same but gate, its activation and up; and the rotary cos and sin

and ``generate()`` holds a float32 copy of the newest logits, the step before's until the next is made.
"""

from __future__ import annotations

from typing import Any

from kvsim.layout import DTYPE_BITS, LayerShape, Method
from kvsim.methods import Kivi
from kvsim.models.load import load_config
from kvsim.models.model import Model

IDS = 8
"""Bytes of a token id."""

REFERENCE_BLOCK = 1024
"""Tokens that the PyTorch reference packs, and reads back, at a time."""


def transient(row: dict[str, Any], model: Model, method: Method, shape: LayerShape) -> list[int]:
    """Sizes of the tensors beside the cache at the row's peak.  Raises ``ValueError`` for an unknown phase."""
    phase = row["phase"]
    if phase == "append":
        return append(row, method, shape)
    if phase == "attend":
        return attend(row, model, method, shape)
    if phase == "prefill":
        return max(prefill(row, model, method, shape), key=sum)
    if phase == "decode":
        return max(decode(row, model, method, shape), key=sum)
    raise ValueError(f"phase {phase!r}: allowed are append, attend, grow, prefill and decode")


def modelled(config: dict[str, Any]) -> bool:
    """Whether this file knows the forward of the config's family."""
    return config.get("model_type") in ("gpt2", "llama")


def prefill(row: dict[str, Any], model: Model, method: Method, shape: LayerShape) -> list[list[int]]:
    """The prompt's forward: the feed-forward, the cache's own work, the logits."""
    config = load_config(row["model"])[1]
    rows, tokens = row["batch_size"], row["batch_size"] * row["prompt_tokens"]
    hidden, inner, vocab = sizes(config)
    unit = tokens * DTYPE_BITS[row["dtype"]] // 8
    ids = [tokens * IDS] * 2
    if config["model_type"] == "gpt2":
        forward = [hidden * unit] * 6 + [inner * unit] * 4
        storing = [hidden * unit] * 5 + [3 * hidden * unit]
    else:
        rotary = [shape.key_dim * unit] * 2
        forward = [hidden * unit] * 4 + [inner * unit] * 3 + rotary
        query, key = (heads * shape.key_dim * unit for heads in (model.num_q_heads, shape.num_kv_heads))
        storing = [hidden * unit] * 2 + [query, query, key, key, hidden * unit] + rotary
    layer = {**row, "num_tokens": row["prompt_tokens"]}
    logits = rows * vocab
    return [
        ids + forward,
        ids + storing + append(layer, method, shape),
        [*ids, hidden * unit, logits * DTYPE_BITS[row["dtype"]] // 8, logits * 4],
    ]


def decode(row: dict[str, Any], model: Model, method: Method, shape: LayerShape) -> list[list[int]]:
    """One token's forward: logits (the step before's float32 copy still there), or attention beside that copy."""
    _, _, vocab = sizes(load_config(row["model"])[1])
    logits = row["batch_size"] * vocab
    ids = [row["batch_size"] * row["num_tokens"] * IDS] * 3
    return [
        [*ids, logits * 4, logits * DTYPE_BITS[row["dtype"]] // 8, logits * 4],
        [*ids, logits * 4, *attend(row, model, method, shape)],
        *(
            [*ids, logits * 4, *storing_one(row, method, shape, held)]
            for held in range(row["prompt_tokens"], row["num_tokens"])
        ),
    ]


def append(row: dict[str, Any], method: Method, shape: LayerShape) -> list[int]:
    """Storing ``num_tokens`` new tokens in an empty layer, beside the key and value given."""
    if not isinstance(method, Kivi):
        return []
    if row["device"] != "cpu":
        return []
    element = DTYPE_BITS[row["dtype"]] // 8
    new, packed = row["num_tokens"], method.num_packed(row["num_tokens"])
    half = row["batch_size"] * shape.num_kv_heads * (shape.key_dim + shape.value_dim) // 2
    if not packed:
        return [half * new * element, half * new * 2 * (element != DTYPE_BITS[method.dtype] // 8)]
    return encoding(half * min(packed, REFERENCE_BLOCK // method.record_length * method.record_length), method)


def storing_one(row: dict[str, Any], method: Method, shape: LayerShape, held: int) -> list[int]:
    """Storing one token where ``held`` are: by PyTorch and with a flush, a record's tokens on their way to codes."""
    if row["device"] != "cpu" or not isinstance(method, Kivi) or method.num_packed(held + 1) == method.num_packed(held):
        return []
    half = row["batch_size"] * shape.num_kv_heads * (shape.key_dim + shape.value_dim) // 2 * method.record_length
    return [2 * half * DTYPE_BITS[row["dtype"]] // 8, *encoding(half, method)]


def encoding(half: int, method: Kivi) -> list[int]:
    """The reference at its worst: codes of both streams and a plane (int32), the plane shifted twice (int64), words."""
    return [4 * half, 4 * half, 4 * half, 8 * half, 8 * half, half * (method.k_bits + 4) // 8]


def attend(row: dict[str, Any], model: Model, method: Method, shape: LayerShape) -> list[int]:
    """One query a row over ``num_tokens`` stored tokens, beside the query."""
    rows = row["batch_size"]
    element = DTYPE_BITS[row["dtype"]] // 8
    out = rows * model.num_q_heads * shape.value_dim
    if row["device"] != "cpu":
        splits = row["num_splits"] if isinstance(method, Kivi) else 1
        partial = [out * splits * 4, rows * model.num_q_heads * splits * 4] if splits > 1 else []
        return [out * element, *partial]
    channels = rows * shape.num_kv_heads * (shape.key_dim + shape.value_dim)
    if not isinstance(method, Kivi):
        stored = DTYPE_BITS[method.buffers(shape, 1, 1)[0].dtype] // 8
        block = min(row["num_tokens"], REFERENCE_BLOCK)
        scores = rows * model.num_q_heads * block * 4
        return [out * element] if stored == element else [channels // 2 * block * 4, scores, scores, scores]
    packed = method.num_packed(row["num_tokens"])
    exact = min(row["num_tokens"], method.sink_length + method.residual_length)
    last = packed - (packed - 1) // REFERENCE_BLOCK * REFERENCE_BLOCK if packed else 0
    before = min(packed - last, REFERENCE_BLOCK)
    half = channels // 2
    # Keys read back in float32, values' codes, their float32, its product with the scale; the block before still held
    unpacking = [4 * half * before] * 2 + [4 * half * last] * 4 + [half * last * method.v_bits // 8]
    reading = [4 * half * (last or 0)] * 2 + [4 * half * exact] * 2
    return max(unpacking, reading, key=sum)


def sizes(config: dict[str, Any]) -> tuple[int, int, int]:
    """Hidden size, feed-forward size and vocabulary.  Raises ``ValueError`` for a family that is not modelled."""
    if config.get("model_type") == "gpt2":
        hidden = config["n_embd"]
        return hidden, config.get("n_inner") or 4 * hidden, config["vocab_size"]
    if config.get("model_type") == "llama":
        return config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    raise ValueError(f"model_type {config.get('model_type')!r}: peaks are predicted for gpt2 and llama")
