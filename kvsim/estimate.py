"""The prediction: a model, a method, a batch and a context give bytes, by purpose."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvsim.layout import Method, parts
from kvsim.methods import Full
from kvsim.model import Model

SPLIT = ("codes", "scales", "zeros", "residual", "other")
"""The kinds of bytes in the tables: packed codes, scales, zeros, exact tokens, bookkeeping."""


def kind(part: str) -> str:
    """The kind in :data:`SPLIT` of a part's bytes, by its name: ``key_codes`` -> ``codes``."""
    last = part.rsplit("_", 1)[-1]
    known = {"codes": "codes", "scale": "scales", "zero": "zeros"}
    exact = {"key", "value", "residual", "sink"}
    return known.get(last, "residual" if last in exact else "other")


@dataclass(frozen=True)
class Estimate:
    """What one method's cache weighs.

    ``parts``: bytes stored by purpose, over all layers and the batch.  ``read_parts``: bytes that one decode
    step reads.  ``fp16_nbytes``: the float16 cache of the same shape.
    """

    method: Method
    batch_size: int
    num_tokens: int
    parts: dict[str, int]
    read_parts: dict[str, int]
    fp16_nbytes: int

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    @property
    def read_nbytes(self) -> int:
        return sum(self.read_parts.values())

    @property
    def nbytes_per_token(self) -> float:
        return self.nbytes / (self.batch_size * self.num_tokens)

    @property
    def read_nbytes_per_token(self) -> float:
        return self.read_nbytes / (self.batch_size * self.num_tokens)

    @property
    def compression(self) -> float:
        return self.fp16_nbytes / self.nbytes

    @property
    def split(self) -> dict[str, int]:
        """Stored bytes by kind (see :data:`SPLIT`)."""
        out = dict.fromkeys(SPLIT, 0)
        for part, size in self.parts.items():
            out[kind(part)] += size
        return out


def estimate(model: Model, method: Method, batch_size: int, num_tokens: int) -> Estimate:
    """Weighs ``method`` on every layer of ``model``.

    Raises ``ValueError`` for a batch or context below 1, or a layer that the method cannot hold.
    """
    check_sizes(batch_size, num_tokens)
    stored: dict[str, int] = {}
    read: dict[str, int] = {}
    for layer, count in Counter(model.cache_layers).items():
        for total, one in (
            (stored, parts(method.buffers(layer, batch_size, num_tokens))),
            (read, method.read_parts(layer, batch_size, num_tokens)),
        ):
            for name, size in one.items():
                total[name] = total.get(name, 0) + count * size
    return Estimate(method, batch_size, num_tokens, stored, read, cache_nbytes(model, Full(), batch_size, num_tokens))


def cache_nbytes(model: Model, method: Method, batch_size: int, num_tokens: int) -> int:
    """Bytes of the whole cache: every buffer of every layer."""
    return sum(
        count * sum(buffer.nbytes for buffer in method.buffers(layer, batch_size, num_tokens))
        for layer, count in Counter(model.cache_layers).items()
    )


def check_sizes(batch_size: int, num_tokens: int) -> None:
    """Raises ``ValueError`` for a batch or context below 1."""
    if batch_size < 1:
        raise ValueError(f"batch {batch_size}: allowed are 1 and above")
    if num_tokens < 1:
        raise ValueError(f"ctx {num_tokens}: allowed are 1 token and above")
