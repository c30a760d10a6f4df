"""Triton: quantize whole records (the kernel of :func:`kvruntime.methods.kivi.reference.append`).

``pack_kernel``: one warp a part of a record of one head, keys or values; of layouts that are not :func:`direct`, one
program a record.  It takes the record's tokens from the ring of exact slots (those stored before) and from the new
tokens (the rest), and quantizes and writes them in one pass.  It may run for many layers at once, axis 2 of its grid: a
launch costs the host more than a short prompt's packing the GPU.

Parallel over parts, records, heads, rows and layers; a part's groups lie inside it, so programs share nothing.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from kvruntime.kernels.lines import row_of
from kvruntime.methods.kivi.boost import pack_boosted_keys, pack_rotated_values
from kvruntime.methods.kivi.kernel_arguments import of_layer
from kvruntime.methods.kivi.pack_tiles import pack_keys, pack_values
from kvruntime.methods.kivi.pack_words import direct, num_key_parts, num_value_parts, pack_key_part, pack_value_part
from kvruntime.methods.kivi.quantize import new_tokens
from kvruntime.methods.kivi.words import MOST_CODES, chunks
from kvsim.methods.kivi import Record

PART = 2048
"""Elements a warp packs at once, 64 a thread: twice as many take 200 registers,
and two warps a scheduler hide nothing."""


@triton.jit
def record_at(
    records_ptr, table_ptr, row, number, num_records, head, NUM_HEADS: tl.constexpr, RECORD_WORDS: tl.constexpr
):
    """Record ``number`` of a row: ``num_records`` lie row after row, or as many places in a block table say where."""
    place = row.to(tl.int64) * num_records + number
    if table_ptr is not None:
        place = tl.load(table_ptr + place).to(tl.int64)
    return records_ptr + (place * NUM_HEADS + head) * RECORD_WORDS


@triton.jit
def pack_part(part, key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, record_ptr, params_ptr, order_ptr, first,
              length, count, stride_kt, stride_vt, zero_offset, key_pages, value_pages, KEY_DIM: tl.constexpr,
              VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr, VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr,
              VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr,
              RESIDUAL: tl.constexpr, PAGE: tl.constexpr, NEW: tl.constexpr, KEY_PARAMS: tl.constexpr,
              VALUE_PARAMS: tl.constexpr, SIZE: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr,
              ROTATION: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """A part of the record of one head that begins with token ``first``, keys' parts first: pointers are the head's
    own, but ``zero_offset`` from scale to zero.  ``MOST``: codes that are packed at once
    (:func:`kvruntime.methods.kivi.words.at_once`)."""
    KEY_PARTS: tl.constexpr = num_key_parts(RECORD, KEY_DIM, KEY_NBITS, KEY_GROUP, SIZE, BOOST)
    if part < KEY_PARTS:
        if BOOST > 0:
            pack_boosted_keys(exact_key_ptr, key_ptr, record_ptr, order_ptr, first, length, stride_kt, key_pages, NEW,
                              KEY_DIM, KEY_NBITS, BOOST, KEY_GROUP, RECORD, TILE, SINK, RESIDUAL, PAGE, KEY_PARAMS,
                              BOOST_CODES)  # fmt: skip
        elif direct(KEY_DIM, KEY_NBITS, KEY_GROUP):
            pack_key_part(exact_key_ptr, key_ptr, record_ptr, params_ptr, part, first, length, stride_kt, zero_offset,
                          key_pages, NEW, KEY_DIM, KEY_NBITS, KEY_GROUP, RECORD, TILE, SINK, RESIDUAL, PAGE,
                          KEY_PARAMS, SIZE)  # fmt: skip
        else:
            KEY_CHUNKS: tl.constexpr = chunks(KEY_DIM)
            for i in tl.static_range(len(KEY_CHUNKS)):
                pack_keys(exact_key_ptr, key_ptr, record_ptr, params_ptr, first, length, count, stride_kt, zero_offset,
                          key_pages, NEW, KEY_CHUNKS[i][0], KEY_CHUNKS[i][1], KEY_DIM, KEY_NBITS, KEY_GROUP, RECORD,
                          TILE, SINK, RESIDUAL, PAGE, KEY_PARAMS, MOST)  # fmt: skip
    else:
        words_ptr = record_ptr + RECORD * KEY_DIM * KEY_NBITS // 32
        half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + 2 * VALUE_PARAMS
        if ROTATION > 0:
            pack_rotated_values(exact_value_ptr, value_ptr, words_ptr, half_ptr, first, length, stride_vt, value_pages,
                                NEW, VALUE_DIM, VALUE_NBITS, ROTATION, RECORD, TILE, SINK, RESIDUAL, PAGE,
                                MOST)  # fmt: skip
        elif direct(VALUE_DIM, VALUE_NBITS, VALUE_GROUP):
            pack_value_part(exact_value_ptr, value_ptr, words_ptr, half_ptr, part - KEY_PARTS, first, length, stride_vt,
                            value_pages, NEW, VALUE_DIM, VALUE_NBITS, VALUE_GROUP, RECORD, TILE, SINK, RESIDUAL,
                            PAGE, SIZE)  # fmt: skip
        else:
            VALUE_CHUNKS: tl.constexpr = chunks(VALUE_DIM)
            for tile in range(RECORD // TILE):
                for i in tl.static_range(len(VALUE_CHUNKS)):
                    pack_values(exact_value_ptr, value_ptr, words_ptr + tile * (TILE * VALUE_DIM * VALUE_NBITS // 32),
                                half_ptr, tile, first, length, count, stride_vt, value_pages, NEW, VALUE_CHUNKS[i][0],
                                VALUE_CHUNKS[i][1], VALUE_DIM, VALUE_NBITS, VALUE_GROUP, RECORD, TILE, SINK,
                                RESIDUAL, PAGE, MOST)  # fmt: skip


@triton.jit
def pack_kernel(
    key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, records_ptr, params_ptr, order_ptr, lengths_ptr, packed_ptr,
    counts_ptr, starts_ptr, layers_ptr, block_table_ptr, exact_table_ptr, stride_kb, stride_kh, stride_kt, stride_vb,
    stride_vh, stride_vt, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, new_length, num_slots,
    num_records, num_pages, batch_size,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr,
    VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr,
    TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, NEW: tl.constexpr, KEY_PARAMS: tl.constexpr,
    VALUE_PARAMS: tl.constexpr, RECORD_WORDS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr, ROTATION: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Optional: ``order_ptr``, of boosted channels; ``counts_ptr``, tokens that each row brings; ``starts_ptr``, where
    in the line of new tokens each row's begin; ``layers_ptr`` (:func:`kvruntime.methods.kivi.append.addresses`);
    ``block_table_ptr``, for each row ``num_records`` places of records; ``exact_table_ptr``, for each row ``num_pages``
    pages of ``PAGE`` exact tokens, keys and values by strides of their own."""
    ahead = tl.program_id(0) // PARTS
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = tl.program_id(1) % NUM_HEADS
        count = new_tokens(row, counts_ptr, new_length)
        start = tl.cast(new_length - count, tl.int64)
    else:
        head = tl.program_id(1)
        row, ahead, start, count = row_of(ahead, starts_ptr, batch_size, RECORD, 1, BLOCK_B)
        start = start.to(tl.int64)
    length = tl.load(lengths_ptr + row)
    packed = tl.load(packed_ptr + row)
    number = packed // RECORD + ahead
    over = length + count - SINK - packed - RESIDUAL
    if over <= ahead * RECORD:  # this row packs fewer records than the grid provides for
        return
    first = SINK + number * RECORD
    key_ptr = of_layer(key_ptr, layers_ptr, 0)
    value_ptr = of_layer(value_ptr, layers_ptr, 1)
    exact_key_ptr = of_layer(exact_key_ptr, layers_ptr, 2)
    exact_value_ptr = of_layer(exact_value_ptr, layers_ptr, 3)
    records_ptr = of_layer(records_ptr, layers_ptr, 4)
    record_ptr = record_at(records_ptr, block_table_ptr, row, number, num_records, head, NUM_HEADS, RECORD_WORDS)
    rows = row.to(tl.int64) * NUM_HEADS + head
    key_pages = None
    value_pages = None
    if PAGE == 0:
        exact_key_ptr += rows * num_slots * KEY_DIM
        exact_value_ptr += rows * num_slots * VALUE_DIM
    else:
        table_ptr = exact_table_ptr + row.to(tl.int64) * num_pages
        key_pages = (table_ptr, stride_xb, stride_xt)
        value_pages = (table_ptr, stride_yb, stride_yt)
        exact_key_ptr += head.to(tl.int64) * stride_xh
        exact_value_ptr += head.to(tl.int64) * stride_yh
    if BLOCK_B == 0:
        key_ptr += row.to(tl.int64) * stride_kb
        value_ptr += row.to(tl.int64) * stride_vb
    key_ptr += head.to(tl.int64) * stride_kh + start * stride_kt
    value_ptr += head.to(tl.int64) * stride_vh + start * stride_vt
    row_params_ptr = params_ptr
    if KEY_GROUP == 0:
        row_params_ptr = of_layer(params_ptr, layers_ptr, 5) + rows * KEY_DIM
    if BOOST > 0:
        order_ptr += rows * KEY_DIM
    pack_part(tl.program_id(0) % PARTS, key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, record_ptr, row_params_ptr,
              order_ptr, first, length, count, stride_kt, stride_vt, batch_size * NUM_HEADS * KEY_DIM, key_pages,
              value_pages, KEY_DIM, VALUE_DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUP, VALUE_GROUP, RECORD, TILE, SINK,
              RESIDUAL, PAGE, NEW, KEY_PARAMS, VALUE_PARAMS, SIZE, BOOST, BOOST_CODES, ROTATION,
              MOST)  # fmt: skip


def pack_warps(record: Record) -> int:
    """Warps a record: a tile of a wide head does not fit the registers of four."""
    return 4 if max(record.key_dim, record.value_dim) <= 64 else 8


def num_parts(record: Record, size: int) -> int:
    """Parts of ``size`` elements that a record has, keys' and values'."""
    length, boost, rotation = record.num_tokens, record.boost_nbits, record.rotation
    keys = num_key_parts(length, record.key_dim, record.key_nbits, record.key_group, size, boost)
    return int(keys + num_value_parts(length, record.value_dim, record.value_nbits, record.value_group, size, rotation))


def in_word_order(record: Record) -> bool:
    """:func:`direct` of its keys and its values."""
    keys = direct(record.key_dim, record.key_nbits, record.key_group, record.boost_nbits)
    return bool(keys and direct(record.value_dim, record.value_nbits, record.value_group, record.rotation))


def permuting(record: Record) -> dict[str, int]:
    """Of a launch that packs a whole record besides other work: codes that are permuted take more than 80 registers,
    and ptxas, left to choose, spills instead; boosted keys and rotated values take more than 128 (:func:`pack_kernel`
    over a pool on sm_89, a step on sm_80)."""
    return {} if in_word_order(record) else {"maxnreg": 255 if record.boosted or record.rotation else 128}


@cache
def pack_launch(record: Record, most: int = MOST_CODES) -> dict[str, int]:
    """Programs a record, elements a program, codes at once (``most``) and warps of :func:`pack_kernel`: one warp, where
    nothing crosses warps, but of heads whose 16 values do not fit its registers."""
    warps = pack_warps(record) if not in_word_order(record) else 1 if record.value_dim <= 256 else 4
    return {"PARTS": num_parts(record, PART * warps), "SIZE": PART * warps, "MOST": most, "num_warps": warps}
