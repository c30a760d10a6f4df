"""Bits of an element, everything counted: codes, scales, zeros, channel orders and lengths, from kvsim's own bytes."""

from __future__ import annotations

from collections.abc import Sequence

from kvsim.layout import LayerShape, Method, nbytes, shared_buffers
from kvsim.methods import placed

LONG = 1 << 17
"""Tokens at which a cache counts as long: exact tokens and what rows share are then a thousandth."""


def elements_a_token(shapes: Sequence[LayerShape]) -> int:
    """Key and value elements that one token leaves in all layers."""
    return sum(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes)


def held_nbytes(method: Method, shapes: Sequence[LayerShape], num_tokens: int) -> int:
    """Bytes of one sequence of ``num_tokens`` in all layers, what layers share included."""
    each = placed(method, tuple(shapes)).items()
    held = sum(count * nbytes(chosen.buffers(shape, 1, num_tokens)) for (shape, chosen), count in each)
    return held + nbytes(shared_buffers(method, shapes))


def held_bits(method: Method, shapes: Sequence[LayerShape], num_tokens: int) -> float:
    """Bits that a sequence of ``num_tokens`` holds an element seen: exact tokens, sinks and residual included."""
    return 8 * held_nbytes(method, shapes, num_tokens) / (num_tokens * elements_a_token(shapes))


def packed_bits(method: Method, shapes: Sequence[LayerShape]) -> float:
    """Bits that each further element costs once the sequence is long: exact tokens are no longer among them.

    0 where a budget bounds what is held: :func:`held_bits` says there what a length costs.
    """
    more = held_nbytes(method, shapes, 2 * LONG) - held_nbytes(method, shapes, LONG)
    return 8 * more / (LONG * elements_a_token(shapes))
