"""What lives beside the cache at the worst moment: tensors of one layer's step, by where in the step the moment is.

Read off the code that runs, and only as far as tensors go: what a matrix multiplication or a fused attention
allocates inside itself is left to the error of the row.  What storing and attending need is the method's own: its
row in ``kvruntime.methods.LAYERS`` says it (``transients``), and a method whose row does not is refused.

A model's forward holds, per token and beside the cache (``H`` hidden size, ``F`` feed-forward size, ``D`` head
dimension, elements of the model's dtype):

    gpt2    6 H + 4 F          feed-forward: two embeddings, block input, residual, its norm, the sum; and GELU's four
    llama   4 H + 3 F + 2 D    feed-forward: the same but gate, its activation and up; and the rotary cos and sin

and ``generate()`` holds a float32 copy of the newest logits, the step before's until the next is made.
"""

from __future__ import annotations

from typing import Any

from kvsim.layout import DTYPE_BITS, LayerShape, Method
from kvsim.models.load import load_config
from kvsim.models.model import Model

IDS = 8
"""Bytes of a token id."""
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose forward holds what Llama's does."""


def transient(row: dict[str, Any], model: Model, method: Method, shape: LayerShape) -> list[int]:
    """Sizes of the tensors beside the cache at the row's peak, in bytes.

    Raises ``ValueError`` for an unknown phase, and for a method whose room does not predict any.
    """
    phase, own = row["phase"], of(method)
    if phase == "append":
        return list(own.append(row, method, shape))
    if phase == "attend":
        return list(own.attend(row, model, method, shape))
    if phase == "prefill":
        return max(prefill(row, model, method, shape), key=sum)
    if phase == "decode":
        return max(decode(row, model, method, shape), key=sum)
    raise ValueError(f"phase {phase!r}: allowed are append, attend, grow, prefill and decode")


def of(method: Method) -> Any:
    """What ``method``'s room says of the tensors beside the cache.  Raises ``ValueError``, naming it, where nothing."""
    from kvruntime.methods import LAYERS

    room = LAYERS.get(type(method))
    if room is None or room.transients is None:
        allowed = ", ".join(kind.__name__ for kind, other in LAYERS.items() if other.transients is not None)
        raise ValueError(f"no peak is predicted for the method {method.name}: allowed are those of type {allowed}")
    return room.transients


def predicts(method: Method, device: str) -> bool:
    """Whether peaks of ``method`` are predicted on ``device`` (cpu or cuda)."""
    from kvruntime.methods import LAYERS

    own = LAYERS[type(method)].transients if type(method) in LAYERS else None
    return own is not None and device in getattr(own, "ON", ("cpu", "cuda"))


def modelled(config: dict[str, Any]) -> bool:
    """Whether this file knows the forward of the config's family."""
    return config.get("model_type") in ("gpt2", *LIKE_LLAMA)


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
        ids + storing + of(method).append(layer, method, shape),
        [*ids, hidden * unit, logits * DTYPE_BITS[row["dtype"]] // 8, logits * 4],
    ]


def decode(row: dict[str, Any], model: Model, method: Method, shape: LayerShape) -> list[list[int]]:
    """One token's forward: logits (the step before's float32 copy still there), or attention beside that copy."""
    _, _, vocab = sizes(load_config(row["model"])[1])
    logits = row["batch_size"] * vocab
    ids = [row["batch_size"] * row["num_tokens"] * IDS] * 3
    return [
        [*ids, logits * 4, logits * DTYPE_BITS[row["dtype"]] // 8, logits * 4],
        [*ids, logits * 4, *of(method).attend(row, model, method, shape)],
        *(
            [*ids, logits * 4, *of(method).storing_one(row, method, shape, held)]
            for held in range(row["prompt_tokens"], row["num_tokens"])
        ),
    ]


def sizes(config: dict[str, Any]) -> tuple[int, int, int]:
    """Hidden size, feed-forward size and vocabulary.  Raises ``ValueError`` for a family that is not modelled."""
    if config.get("model_type") == "gpt2":
        hidden = config["n_embd"]
        return hidden, config.get("n_inner") or 4 * hidden, config["vocab_size"]
    if config.get("model_type") in LIKE_LLAMA:
        return config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    raise ValueError(f"model_type {config.get('model_type')!r}: peaks are predicted for gpt2, {', '.join(LIKE_LLAMA)}")
