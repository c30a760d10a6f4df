"""How codes lie in words, for kernels that write them and kernels that read them."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from kvsim.methods import packing as layout
from kvsim.methods.kivi import Record
from kvsim.methods.packing import MIN_TOKENS, PLANES

MOST_CODES = 4096
"""The most codes that a program packs at once, as the launches of packing plan it (``MOST`` of their kernels); boosted
keys, which are packed a tile at a time, do not ask.  Twice as many take 4,400 instructions for 2,700 of ``kivi-boost``
with heads of 128, and no less time an element (``compile_kernels.py``, Triton 3.6 and 3.9)."""

channel_chunks = triton.constexpr_function(
    layout.channel_chunks
)  # wrapped, their source counts in the kernels' cache key
tile_order = triton.constexpr_function(layout.tile_order)
boosted_channels = triton.constexpr_function(layout.boosted_channels)


@triton.constexpr_function
def next_power_of_2(n):
    return triton.next_power_of_2(n)


@triton.constexpr_function
def planes(nbits):
    """``((bits, lowest bit), ...)`` of a code's planes."""
    out, low = [], 0
    for bits in PLANES[nbits]:
        out.append((bits, low))
        low += bits
    return tuple(out)


@triton.constexpr_function
def chunks(dim):
    """``((first channel, width), ...)``."""
    out, channel = [], 0
    for width in channel_chunks(dim):
        out.append((channel, width))
        channel += width
    return tuple(out)


@triton.constexpr_function
def order_axes(stream, tile, width, bits, way):
    """``(shape, permutation)`` of one tile's codes: ``way`` 0 from logical to memory order, 1 back."""
    order = tile_order(stream, tile, width, bits)
    return (order.memory_shape, order.to_logical) if way else (order.logical_shape, order.from_logical)


@triton.constexpr_function
def at_once(stream, tile, width, nbits, most):
    """Tokens of a tile of a chunk of ``width`` channels that are packed at once: all, or of more than ``most`` codes
    16, where the words of any 16 lie one behind the other."""
    halvings = (tile // MIN_TOKENS).bit_length() - 1
    orders = [tile_order(stream, tile, width, bits) for bits in PLANES[nbits]]
    parts = all(order.from_logical[:halvings] == tuple(range(halvings)) for order in orders)
    return MIN_TOKENS if tile * width > most and parts else tile


@triton.constexpr_function
def words_before(tile, channel, nbits, width, low):
    """Word offset inside a tile of the plane that starts at bit ``low`` of the chunk that starts at ``channel``."""
    return tile * (channel * nbits + width * low) // 32


@triton.constexpr_function
def field_bits(bits):
    """log2 of the codes a half word."""
    return (16 // bits).bit_length() - 1


@triton.constexpr_function
def whole_groups(channel, width, group):
    """Whether a chunk holds whole value groups, as many as a power of two."""
    return group & (group - 1) == 0 and group <= width and channel % group == 0


@triton.constexpr_function
def groups_in(channel, width, group):
    """The value groups that a chunk touches: first, one past the last."""
    return channel // group, (channel + width - 1) // group + 1


@triton.jit
def word_offset(index, RUNS: tl.constexpr):
    """The share of a token or channel of a tile in the place of its code's word."""
    at = index * 0
    for i in tl.static_range(len(RUNS)):
        at += ((index >> RUNS[i][0]) & RUNS[i][1]) * RUNS[i][2]
    return at


@triton.jit
def value_param_offset(group, token, RECORD: tl.constexpr):
    """Place of a value scale inside its section: ``[group][c][ts][kk][e]`` (kvsim/methods/packing.py)."""
    return group * RECORD + (token // 2 % 4) * (RECORD // 4) + token // 16 * 4 + (token // 8 % 2) * 2 + token % 2


@cache
def record_constants(record: Record) -> dict[str, int]:
    """The record's sizes as the kernels' compile-time constants."""
    return {
        "KEY_DIM": record.key_dim,
        "VALUE_DIM": record.value_dim,
        "KEY_NBITS": record.key_nbits,
        "VALUE_NBITS": record.value_nbits,
        "KEY_GROUP": record.key_group,
        "VALUE_GROUP": record.value_group,
        "RECORD": record.num_tokens,
        "TILE": record.tile,
        "KEY_PARAMS": record.offset("key_scale"),
        "VALUE_PARAMS": record.offset("value_scale"),
        "RECORD_WORDS": record.num_words,
        "BOOST": record.boost_nbits,
        "BOOST_CODES": record.offset("key_boost_codes") if record.boosted else 0,
        "ROTATION": record.rotation,
    }
