"""kvsim's figure for a row, from the row alone: what was recorded can be predicted again at any time.

A row names its model (a catalogue name or config), its method with every field, and how many tokens of how many
sequences the buffers were asked for.  Nothing here has seen the machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import Buffer, LayerShape, shared_buffers
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.claims.subjects import rebuild_method
from validation.claims.transients import of, transient

Row = dict[str, Any]

GROW_TOKENS = 256
"""Without a known final length a cache provides for a multiple of this many tokens: part of the promise weighed.

Written here again on purpose, a pin: were it imported, a cache and a prediction that grow otherwise would agree."""


def provided(num_tokens: int, max_seq_len: int | None) -> int:
    """Tokens that a cache holding ``num_tokens`` provides for."""
    return -(-num_tokens // GROW_TOKENS) * GROW_TOKENS if max_seq_len is None else max_seq_len


def cache_nbytes(row: Row, num_tokens: int) -> int:
    """Bytes of the row's cache at ``num_tokens``, every buffer rounded up as its allocator does."""
    layers = shapes(row)[: row["num_layers"]]
    own = [(buffers(row, shape, num_tokens), count) for shape, count in Counter(layers).items()]
    return sum(count * _held(each, row) for each, count in own) + _held(shared(row, layers), row)


def predict(row: Row) -> int | None:
    """The row's ``predicted``, in its unit; None for what kvsim makes no statement about (speed, quality)."""
    if row["kind"] in ("memory", "held"):
        return cache_nbytes(row, row["num_tokens"])
    if row["kind"] != "peak":
        return None
    shape = shapes(row)[0]
    if row["phase"] == "grow":  # one layer's tensors one by one: new beside old
        old, new = (buffers(row, shape, count) for count in (row["num_tokens"], row["num_tokens"] + 1))
        method = rebuild_method(row["method"])
        live = of(method).storing_one(row, method, shape, row["num_tokens"])
        beside = _held(shared(row, [shape]), row)
        return beside + max(*_growing(old, new, row), _held(new, row) + sum(live))
    live = transient(row, load_row_model(row["model"]), rebuild_method(row["method"]), shape)
    return cache_nbytes(row, row["num_tokens"]) + sum(rounded(size, row) for size in live)


def _growing(old: list[Buffer], new: list[Buffer], row: Row) -> list[int]:
    """Bytes held as each tensor is copied into its larger one."""
    held = _held(old, row)
    out = [held]
    for before, after in zip(old, new, strict=True):
        if before.shape != after.shape:
            out.append(held + rounded(after.nbytes, row))
            held += rounded(after.nbytes, row) - rounded(before.nbytes, row)
    return out


def predicted_trace(row: Row) -> list[tuple[int, int]]:
    """``(num_tokens, predicted)`` at every entry of the row's trace; at every single step where it has them all."""
    points = [num_tokens for num_tokens, _ in row["trace"]]
    if row.get("every_step"):
        points = list(range(points[0], row["num_tokens"] + 1))
    return [(num_tokens, _at(row, num_tokens)) for num_tokens in points]


def measured_trace(row: Row) -> list[tuple[int, int]]:
    """``(num_tokens, measured)`` likewise; between the entries of a trace of every step nothing changed."""
    if not row.get("every_step"):
        return [(num_tokens, size) for num_tokens, size in row["trace"]]
    changes = dict(row["trace"])
    out, size = [], 0
    for num_tokens in range(row["trace"][0][0], row["num_tokens"] + 1):
        size = changes.get(num_tokens, size)
        out.append((num_tokens, size))
    return out


def _at(row: Row, num_tokens: int) -> int:
    """Bytes with ``num_tokens`` tokens; a cache made for one length exactly is a new one at every length."""
    exact = row["provided"] == "exactly"
    return cache_nbytes({**row, "max_seq_len": num_tokens if exact else row["max_seq_len"]}, num_tokens)


def error(measured: float, predicted: float | None) -> float | None:
    """``measured / predicted - 1``; None where nothing was predicted."""
    return None if predicted is None else measured / predicted - 1


def shapes(row: Row) -> tuple[LayerShape, ...]:
    """The model's layers; in a cache of a model as they are stored, heads filled up to what the method packs."""
    layers = load_row_model(row["model"]).cache_layers
    if row.get("way") != "generate":
        return layers
    method = rebuild_method(row["method"])
    return tuple(stored_shape(method, layer) for layer in layers)


@cache
def load_row_model(name: str) -> Model:
    """kvsim's model of that name.  Raises ``LookupError`` or ``ValueError`` as kvsim does."""
    return load_model(name)


def buffers(row: Row, shape: LayerShape, num_tokens: int) -> list[Buffer]:
    """One layer's buffers with ``num_tokens`` tokens held."""
    held = provided(num_tokens, row["max_seq_len"])
    return rebuild_method(row["method"]).buffers(shape, row["batch_size"], held)


def shared(row: Row, layers: Sequence[LayerShape]) -> list[Buffer]:
    """The buffers that ``layers`` share, each once."""
    return shared_buffers(rebuild_method(row["method"]), layers)


def _held(those: Sequence[Buffer], row: Row) -> int:
    return sum(rounded(buffer.nbytes, row) for buffer in those)


def rounded(nbytes: int, row: Row) -> int:
    """``nbytes`` as the row's allocator hands them out."""
    block = row.get("rounding", 1)
    return -(-nbytes // block) * block
