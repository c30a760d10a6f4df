"""Triton: tokens coded one by one in an engine's pages (:mod:`kvruntime.paged`), with nothing for the host to plan.

Where a token goes and what a row holds is read on the device, so a CUDA graph holds for all lengths and tables.  A
token's words are a function of the token alone.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import lines
from kvruntime.kernels.hadamard import rotate_rows
from kvruntime.kernels.launch import overlaps
from kvruntime.kernels.lines import row_of
from kvruntime.methods.room import Batch, Pages
from kvruntime.methods.token import attention
from kvruntime.methods.token.attention import scale_and_zero
from kvruntime.methods.token.coding import PIECE
from kvruntime.methods.token.lookup import unit_of
from kvruntime.methods.token.paged import Method, pack, stored
from kvruntime.methods.token.store import NUM_WARPS, TILE_ELEMENTS, append_stream, constants, strides_of
from kvruntime.methods.token.words import (
    chunk_first,
    chunk_width,
    is_lloyd,
    num_chunks,
    num_sections,
    planes,
    rotation,
    section_levels,
    sections,
)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots_ptr"])
def store_kernel(
    key_ptr, value_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, key_signs_ptr, value_signs_ptr,
    slots_ptr, stride_kt, stride_kh, stride_vt, stride_vh, stride_xb, stride_xh, stride_xt, stride_sb, stride_sh,
    stride_st, stride_yb, stride_yh, stride_yt, stride_zb, stride_zh, stride_zt, num_tokens,
    NUM_HEADS: tl.constexpr, KEY_CODING: tl.constexpr, VALUE_CODING: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr, CORRECTED: tl.constexpr,
    BLOCK_T: tl.constexpr, PAGE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``BLOCK_T`` tokens of a line and one head to their slots; keys in the first plane of the grid, values in the
    second.  Strides: of keys and values as they come, then of codes and scales of keys (x, s) and of values (y, z)."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + t, mask=t < num_tokens, other=-1).to(tl.int64)
    kept = slot >= 0
    slot = tl.where(kept, slot, 0)
    if tl.program_id(2) == 0:
        append_stream(key_ptr + head * stride_kh, key_codes_ptr, key_scale_ptr, key_signs_ptr, t, kept, slot // PAGE,
                      slot % PAGE, head, stride_kt, stride_xb, stride_xh, stride_xt, stride_sb, stride_sh, stride_st,
                      KEY_CODING, KEY_DIM, KEY_LEVELS, BLOCK_T, CORRECTED)  # fmt: skip
    else:
        append_stream(value_ptr + head * stride_vh, value_codes_ptr, value_scale_ptr, value_signs_ptr, t, kept,
                      slot // PAGE, slot % PAGE, head, stride_vt, stride_yb, stride_yh, stride_yt, stride_zb, stride_zh,
                      stride_zt, VALUE_CODING, VALUE_DIM, VALUE_LEVELS, BLOCK_T, CORRECTED)  # fmt: skip


def store(method: Method, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    held, layout = stored(method, pages, batch.packed, batch.block_table)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    num_tokens, heads = min(len(key), len(batch.slots)), key.shape[1]
    if not num_tokens:
        return
    dim = triton.next_power_of_2(max(layout.key_dim, layout.value_dim))
    block = 1 if batch.most == 1 else max(1, TILE_ELEMENTS // dim)
    early = batch.most == 1 and overlaps(key)
    store_kernel[(triton.cdiv(num_tokens, block), heads, 2)](
        key, value, held.key_codes, held.key_scale, held.value_codes, held.value_scale, held.key_signs,
        held.value_signs, batch.slots, *key.stride()[:2], *value.stride()[:2], *strides_of(held), num_tokens,
        **constants(held, layout), CORRECTED=layout.corrected, BLOCK_T=block, EARLY=early, enable_fp_fusion=False,
        num_warps=1 if block == 1 else NUM_WARPS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def attend(
    method: Method,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Pages,
    batch: Batch,
    scale: float,
    *,
    out: Tensor | None = None,
    arrivals: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    held, layout = stored(method, pages, batch.packed, batch.block_table)
    rows = len(batch.lengths)
    own: dict[str, Any] = {"num_tokens": num_tokens}
    if batch.most > 1:
        own["out"] = None if out is None else out[: len(query)]
        return attention.attend(query, held, layout, scale, (key, value, None), batch.starts, lone=True, **own)
    own["out"] = None if out is None else out[:rows, :, None]
    return attention.attend(query[:rows, :, None], held, layout, scale, **own)[:, :, 0]


@triton.constexpr_function
def section_of(name, dim, number):
    """``(first channel, channels, bits, byte at which it begins)``."""
    return sections(name, dim)[number]


@triton.constexpr_function
def piece_of(width, count):
    """Channels of a piece, of a section of ``count`` of which a chunk of ``width`` is looked at."""
    return min(width, count, PIECE)


@triton.jit
def code_of(codes_ptr, at, kept, c, inside, SECTION: tl.constexpr, WIDTH: tl.constexpr):
    """Codes (int32) of channels ``c [W]`` of a section, of tokens whose heads begin at byte ``at [N]``: from their
    first plane, and of three bits from the second, whose order :mod:`kvruntime.methods.token.coding` has."""
    PLANES: tl.constexpr = planes(SECTION)
    mask = kept[:, None] & inside[None, :]
    bit = c * PLANES[0][0]
    byte = tl.load(codes_ptr + (at[:, None] + (PLANES[0][2] + bit // 8)[None, :]), mask=mask, other=0).to(tl.int32)
    code = byte >> (bit % 8)[None, :] & ((1 << PLANES[0][0]) - 1)
    if len(PLANES) > 1:
        PIECE_WIDTH: tl.constexpr = piece_of(WIDTH, SECTION[1])
        inner = c % PIECE_WIDTH
        half = inner // (PIECE_WIDTH // 2)
        bit = c - inner + (inner % (PIECE_WIDTH // 2) // 2 * 2 + half) * 2 + inner % 2
        byte = tl.load(codes_ptr + (at[:, None] + (PLANES[1][2] + bit // 8)[None, :]), mask=mask, other=0).to(tl.int32)
        code |= (byte >> (bit % 8)[None, :] & 1) << PLANES[1][1]
    return code


@triton.jit
def lloyd_levels(codes_ptr, at, kept, d, CODING: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
                 WIDTH: tl.constexpr, N: tl.constexpr, NUMBER: tl.constexpr):  # fmt: skip
    """Levels ``[N, WIDTH]`` float32 of channels ``d``, of those that are in the ``NUMBER``th section; of others 0."""
    SECTION: tl.constexpr = section_of(CODING, DIM, NUMBER)
    MAGNITUDES: tl.constexpr = section_levels(LEVELS, NUMBER)
    inside = (d >= SECTION[0]) & (d < SECTION[0] + SECTION[1])
    code = code_of(codes_ptr, at, kept, d - SECTION[0], inside, SECTION, WIDTH)
    size = code & ((1 << (SECTION[2] - 1)) - 1)
    level = tl.full([N, WIDTH], MAGNITUDES[0], tl.float32)
    for i in tl.static_range(1, len(MAGNITUDES)):
        level = tl.where(size == i, MAGNITUDES[i], level)
    level = tl.where(code >> (SECTION[2] - 1) != 0, -level, level)
    return tl.where(inside[None, :], level, 0.0)


@triton.jit
def number_levels(codes_ptr, at, kept, d, zero, CODING: tl.constexpr, DIM: tl.constexpr,
                  WIDTH: tl.constexpr):  # fmt: skip
    """The same of other codings; ``zero``: 8 less the zero point."""
    SECTION: tl.constexpr = section_of(CODING, DIM, 0)
    code = code_of(codes_ptr, at, kept, d, d < DIM, SECTION, WIDTH)
    if CODING == "int4":
        level = (code - 8).to(tl.float32) + zero[:, None]
    elif CODING == "int8":
        level = ((code ^ 128) - 128).to(tl.float32)
    else:
        bits = code << 8
        if CODING == "e4m3":
            bits = (bits & 0x8000) | ((bits & 0x7F00) >> 1)
        level = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * unit_of(CODING)
    return level


@triton.jit
def gather_stream(
    new_ptr, codes_ptr, scale_ptr, signs_ptr, out_ptr, place, slot, new, is_stored, is_new, out_at, head, stride_nt,
    stride_nh, stride_cb, stride_ch, stride_ct, stride_sb, stride_sh, stride_st, CODING: tl.constexpr,
    DIM: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Tokens ``[N]`` of one row and head to rows ``out_at [N]``: stored ones as attention reads them, new ones as they
    come."""
    SIZE: tl.constexpr = rotation(CODING, DIM)
    scale = tl.load(scale_ptr + (place * stride_sb + head * stride_sh + slot * stride_st), mask=is_stored, other=0.0)
    scale, zero = scale_and_zero(scale, CODING)
    at = place * stride_cb + head * stride_ch + slot * stride_ct
    for i in tl.static_range(num_chunks(DIM)):
        d = chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))
        if is_lloyd(CODING):
            x = lloyd_levels(codes_ptr, at, is_stored, d, CODING, DIM, LEVELS, chunk_width(DIM, i), N, 0)
            if num_sections(CODING, DIM) > 1:
                x += lloyd_levels(codes_ptr, at, is_stored, d, CODING, DIM, LEVELS, chunk_width(DIM, i), N, 1)
            x = rotate_rows(x * scale[:, None], N, chunk_width(DIM, i), SIZE)
            x = x * tl.load(signs_ptr + d).to(tl.float32)[None, :]
        else:
            x = number_levels(codes_ptr, at, is_stored, d, zero, CODING, DIM, chunk_width(DIM, i)) * scale[:, None]
        fresh_at = new_ptr + (new * stride_nt + head * stride_nh)[:, None] + d[None, :]
        fresh = tl.load(fresh_at, mask=is_new[:, None], other=0.0).to(out_ptr.dtype.element_ty)
        x = tl.where(is_stored[:, None], x.to(out_ptr.dtype.element_ty), fresh)
        tl.store(out_ptr + out_at[:, None] * DIM + d[None, :], x, mask=(is_stored | is_new)[:, None])


@triton.jit(
    do_not_specialize=["stride_block", "batch_size"],
    do_not_specialize_on_alignment=["starts_ptr", "before_ptr", "packed_ptr", "begins_ptr", "table_ptr"],
)
def gather_kernel(
    key_ptr, value_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, key_signs_ptr, value_signs_ptr,
    starts_ptr, before_ptr, packed_ptr, begins_ptr, table_ptr, out_key_ptr, out_value_ptr, stride_kt, stride_kh,
    stride_vt, stride_vh, stride_xb, stride_xh, stride_xt, stride_sb, stride_sh, stride_st, stride_yb, stride_yh,
    stride_yt, stride_zb, stride_zh, stride_zt, stride_block, batch_size,
    NUM_HEADS: tl.constexpr, KEY_CODING: tl.constexpr, VALUE_CODING: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A tile of one row and head; keys in the first plane of the grid, values in the second."""
    head = tl.program_id(1).to(tl.int64)
    row, number, begin, length = row_of(tl.program_id(0), begins_ptr, batch_size, TILE, 1, BLOCK_B)
    if number * TILE >= length:
        return
    packed = tl.load(packed_ptr + row)
    t = number * TILE + tl.arange(0, TILE)
    is_stored = t < packed
    is_new = (t < length) & ~is_stored
    place = tl.load(table_ptr + row.to(tl.int64) * stride_block + t // PAGE, mask=is_stored, other=0).to(tl.int64)
    slot = (t % PAGE).to(tl.int64)
    new = (tl.load(starts_ptr + row) + t - tl.load(before_ptr + row)).to(tl.int64)
    out_at = (begin + t).to(tl.int64) * NUM_HEADS + head
    if tl.program_id(2) == 0:
        gather_stream(key_ptr, key_codes_ptr, key_scale_ptr, key_signs_ptr, out_key_ptr, place, slot, new, is_stored,
                      is_new, out_at, head, stride_kt, stride_kh, stride_xb, stride_xh, stride_xt, stride_sb, stride_sh,
                      stride_st, KEY_CODING, KEY_DIM, KEY_LEVELS, TILE)  # fmt: skip
    else:
        gather_stream(value_ptr, value_codes_ptr, value_scale_ptr, value_signs_ptr, out_value_ptr, place, slot, new,
                      is_stored, is_new, out_at, head, stride_vt, stride_vh, stride_yb, stride_yh, stride_yt, stride_zb,
                      stride_zh, stride_zt, VALUE_CODING, VALUE_DIM, VALUE_LEVELS, TILE)  # fmt: skip


def gather(
    method: Method, key: Tensor, value: Tensor, pages: Pages, batch: Batch, begins: Tensor, into: tuple[Tensor, Tensor]
) -> None:
    assert batch.block_table is not None
    held, layout = stored(method, pages, batch.packed, batch.block_table)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    rows, heads = len(batch.lengths), held.key_codes.shape[1]
    tile = max(1, TILE_ELEMENTS // triton.next_power_of_2(max(layout.key_dim, layout.value_dim)))
    gather_kernel[(lines.num_blocks(len(into[0]), rows, tile), heads, 2)](
        key, value, held.key_codes, held.key_scale, held.value_codes, held.value_scale, held.key_signs,
        held.value_signs, batch.starts, batch.before, batch.packed, begins, batch.block_table, *into,
        *key.stride()[:2], *value.stride()[:2], *strides_of(held), batch.block_table.stride(0), rows,
        **constants(held, layout), TILE=tile, BLOCK_B=lines.block_b(rows), enable_fp_fusion=False, num_warps=NUM_WARPS,
    )  # fmt: skip


__all__ = ["attend", "gather", "pack", "store"]
