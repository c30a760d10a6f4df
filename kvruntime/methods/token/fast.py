"""Gluon: decode attention over tokens that are coded one by one, in whole numbers on the tensor cores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels.launch import overlaps
from kvruntime.kernels.merge import HIDDEN, LOG2E
from kvruntime.methods.token.fast_words import (
    center_of,
    halves,
    held_bytes,
    key_asm,
    key_constraints,
    key_swizzle,
    key_types,
    lanes,
    nbits_of,
    num_tables,
    own_asm,
    tile_copy,
    token_bytes,
    value_asm,
    value_constraints,
    value_layout,
    value_swizzle,
    value_types,
    word_axes,
)
from kvruntime.methods.token.levels import level_bytes, steps
from kvruntime.methods.token.reference import Fresh, Layout, Stored

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.9, before it

NEW_API = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # Triton 3.9
MAGIC = gl.constexpr(12582912.0)
MAGIC_BITS = gl.constexpr(0x4B400000)
NAN_LSE = gl.constexpr(1.0e20)
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
WEIGHT = gl.constexpr(65535.0)
WEIGHT_MAGIC = gl.constexpr(8388608.0)
QUERY = gl.constexpr(32639.0)


@gluon.jit
def divided(x):
    """``x [..., N]`` as a tuple of ``N`` tensors."""
    N: gl.constexpr = x.shape[len(x.shape) - 1]
    HALVES: gl.constexpr = halves(x.shape)
    if N == 1:
        parts = (x.reshape(HALVES[0]),)
    elif N == 2:
        parts = gl.split(x)
    else:
        first, second = gl.split(x.reshape(HALVES[1]).permute(HALVES[2]))
        parts = divided(first) + divided(second)
    return parts


@gluon.jit
def mma(a, b, c, UNSIGNED: gl.constexpr):
    """``c + a b`` of ``mma.m16n8k32``, each register a tensor: ``a`` four, ``b`` two, ``c`` four."""
    TYPES: gl.constexpr = "s8.u8" if UNSIGNED else "s8.s8"
    b0 = gl.broadcast(b[0], a[0])[0]
    b1 = gl.broadcast(b[1], a[0])[0]
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32." + TYPES + ".s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def fma(a, b, c):
    """``a * b + c``, rounded once."""
    a, b = gl.broadcast(a, b)
    a, c = gl.broadcast(a, c)
    a, b = gl.broadcast(a, b)
    return gl.fma(a, b, c)


@gluon.jit
def swapped(x):
    """float32 of the lane whose columns are four further on or back."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 2, 31, -1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def transposed(even, odd):
    """Weights' lowest 16 bits of columns 2 c and 2 c + 1 of row r, as rows 2 c and 2 c + 1 of column r."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 x; prmt.b32 x, $1, $2, 0x5410; movmatrix.sync.aligned.m8n8.trans.b16 $0, x; }",
        "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def selected(x, order):
    """Bytes of ``x`` by ``order``, 4 being zero."""
    order = gl.broadcast(order, x)[0]
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [x, order], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def four_of(registers, AT: gl.constexpr):
    """Registers ``(rr, hi)`` in the order of a product's: rows first."""
    return registers[AT], registers[AT + 2], registers[AT + 1], registers[AT + 3]


@gluon.jit
def own_tables(positive, LEVELS: gl.constexpr, LAYOUT: gl.constexpr, RANK: gl.constexpr):
    """Words of the table of levels, each ``[1, ...]`` in a register of each thread."""
    tables = ()
    for number in gl.static_range(num_tables(LEVELS)):
        nothing = gl.full([1] * RANK, positive, gl.int32, LAYOUT)
        tables = tables + (gl.inline_asm_elementwise(
            own_asm(LEVELS, number), "=r,r", [nothing], dtype=gl.int32, is_pure=True, pack=1
        ),)  # fmt: skip
    return tables


@gluon.jit
def spread(tables, x):
    """Each table as wide as ``x``."""
    out = ()
    for i in gl.static_range(len(tables)):
        out = out + (gl.broadcast(tables[i], x)[0],)
    return out


@gluon.jit
def copy_codes(codes, codes_ptr, begin, limit, CODING: gl.constexpr, DIM: gl.constexpr, TILE: gl.constexpr,
               UNIT: gl.constexpr, WHOLE: gl.constexpr):  # fmt: skip
    """Start copying ``TILE`` tokens' codes from token ``begin`` on, as words of ``UNIT`` bytes: neighbouring lanes copy
    neighbouring bytes, and of tokens whose bytes are no power of two some lanes copy nothing."""
    WORDS: gl.constexpr = held_bytes(CODING, DIM) // UNIT
    REAL: gl.constexpr = token_bytes(CODING, DIM) // UNIT
    LAYOUT: gl.constexpr = tile_copy(WORDS, 16 // UNIT)
    TYPE: gl.constexpr = gl.int16 if UNIT == 2 else gl.int32
    t = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    w = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    base = codes_ptr.to(gl.pointer_type(TYPE), bitcast=True) + begin.to(gl.int64) * REAL
    at, real = gl.broadcast(t.to(gl.int64) * REAL + w, begin + t < limit)
    if WORDS > REAL:
        if WHOLE:
            copy_async(codes, base + at, mask=gl.broadcast(w < REAL, at)[0])
        else:
            copy_async(codes, base + at, mask=real & (w < REAL))
    elif WHOLE:
        copy_async(codes, base + at)
    else:
        copy_async(codes, base + at, mask=real)


@gluon.jit
def copy_stream(codes, scales, codes_ptr, scale_ptr, begin, limit, stage, CODING: gl.constexpr, DIM: gl.constexpr,
                TILE: gl.constexpr, UNIT: gl.constexpr, WHOLE: gl.constexpr):  # fmt: skip
    """Start copying ``TILE`` tokens' codes and scales from token ``begin`` on to a stage; none from ``limit`` on."""
    copy_codes(codes.index(stage), codes_ptr, begin, limit, CODING, DIM, TILE, UNIT, WHOLE)
    EACH: gl.constexpr = 4 // scale_ptr.dtype.element_ty.itemsize  # scales a word
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = gl.arange(0, TILE // EACH, layout=LAYOUT)
    at = scale_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (begin // EACH + i)
    if WHOLE:
        copy_async(scales.index(stage), at)
    else:
        copy_async(scales.index(stage), at, mask=begin + i * EACH < limit)


@gluon.jit
def copy_tile(keys, values, key_scales, value_scales, key_codes_ptr, value_codes_ptr, key_scale_ptr, value_scale_ptr,
              tile, limit, stage, KEY_CODING: gl.constexpr, VALUE_CODING: gl.constexpr, DIM: gl.constexpr,
              TILE: gl.constexpr):  # fmt: skip
    """Start copying a tile, of which nothing is read from token ``limit`` on."""
    begin = tile * TILE
    if begin + TILE <= limit:
        copy_stream(keys, key_scales, key_codes_ptr, key_scale_ptr, begin, limit, stage, KEY_CODING, DIM, TILE, 4,
                    True)  # fmt: skip
        copy_stream(values, value_scales, value_codes_ptr, value_scale_ptr, begin, limit, stage, VALUE_CODING, DIM,
                    TILE, 2, True)  # fmt: skip
    elif begin < limit:
        copy_stream(keys, key_scales, key_codes_ptr, key_scale_ptr, begin, limit, stage, KEY_CODING, DIM, TILE, 4,
                    False)  # fmt: skip
        copy_stream(values, value_scales, value_codes_ptr, value_scale_ptr, begin, limit, stage, VALUE_CODING, DIM,
                    TILE, 2, False)  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def page_of(table_ptr, tile, limit, TILE: gl.constexpr, PAGE: gl.constexpr):
    """Which block of a pool holds a tile (``PAGE`` tokens a block, a multiple of ``TILE``); 0 of rows without blocks,
    and from token ``limit`` on."""
    page = limit.to(gl.int64) * 0
    if PAGE > 0:
        page = gl.load(table_ptr + tile * TILE // PAGE, mask=tile * TILE < limit, other=0).to(gl.int64)
    return page


@gluon.jit
def copy_paged(keys, values, key_scales, value_scales, key_codes_ptr, value_codes_ptr, key_scale_ptr, value_scale_ptr,
               page, strides, tile, limit, stage, KEY_CODING: gl.constexpr, VALUE_CODING: gl.constexpr,
               DIM: gl.constexpr, TILE: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """:func:`copy_tile` of a row whose blocks of ``PAGE`` tokens lie in a pool, of a tile of block ``page``."""
    if PAGE > 0:
        key_codes_ptr += page * strides[0]
        key_scale_ptr += page * strides[1]
        value_codes_ptr += page * strides[2]
        value_scale_ptr += page * strides[3]
        inner = tile % (PAGE // TILE)
        limit -= (tile - inner) * TILE
        tile = inner
    copy_tile(keys, values, key_scales, value_scales, key_codes_ptr, value_codes_ptr, key_scale_ptr, value_scale_ptr,
              tile, limit, stage, KEY_CODING, VALUE_CODING, DIM, TILE)  # fmt: skip


@gluon.jit
def reinterpreted(memory, TYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory as another."""
    if NEW_API:
        seen = memory.reinterpret(TYPE, SHAPE, LAYOUT)
    else:
        seen = memory._reinterpret(TYPE, SHAPE, LAYOUT)
    return seen


@gluon.jit
def key_operands(codes, stage, m, tables, CODING: gl.constexpr, DIM: gl.constexpr, LEVELS: gl.constexpr):
    """Registers of the ``m``th 16 keys: a tuple, for each row (hi) and step, of (lower, upper)."""
    WARP: gl.constexpr = lanes([8, 4], 0, 1)
    AXES: gl.constexpr = word_axes(CODING, DIM)
    SHAPE: gl.constexpr = [2, 8, AXES[0], 4, AXES[1]]
    N: gl.constexpr = AXES[0] * AXES[1]
    ALL: gl.constexpr = [codes.shape[0] * codes.shape[1] // 16, 16, codes.shape[2]]
    held = reinterpreted(codes, gl.int32, ALL, key_swizzle(CODING, DIM))
    words = held.index(stage * (codes.shape[1] // 16) + m).reshape(SHAPE).load(lanes(SHAPE, 1, 3))
    words = divided(words.permute([1, 3, 0, 2, 4]).reshape([8, 4, 2 * N]))
    out = ()
    if CODING == "int8":
        for i in gl.static_range(2 * N):
            out = out + (gl.convert_layout(words[i], WARP, assert_trivial=True),)
    elif CODING == "lloyd3":
        for hi in gl.static_range(2):
            for i in gl.static_range(2):
                word = gl.convert_layout(words[hi * N + i], WARP, assert_trivial=True)
                second = gl.convert_layout(words[hi * N + 2], WARP, assert_trivial=True)
                out = out + gl.inline_asm_elementwise(
                    key_asm(CODING, LEVELS, i), key_constraints(CODING, LEVELS), (word, second) + spread(tables, word),
                    dtype=key_types(CODING), is_pure=True, pack=1,
                )  # fmt: skip
    else:
        for i in gl.static_range(2 * N):
            word = gl.convert_layout(words[i], WARP, assert_trivial=True)
            out = out + gl.inline_asm_elementwise(
                key_asm(CODING, LEVELS, 0), key_constraints(CODING, LEVELS), (word,) + spread(tables, word),
                dtype=key_types(CODING), is_pure=True, pack=1,
            )  # fmt: skip
    return out


@gluon.jit
def third_planes(words, second, tables, CODING: gl.constexpr, LEVELS: gl.constexpr, PLACE: gl.constexpr):
    """Of eight words of two bits a code and the words of third bits: registers for each parity of the codes."""
    return gl.inline_asm_elementwise(
        value_asm(CODING, LEVELS, PLACE), value_constraints(CODING, LEVELS), (words, second) + spread(tables, second),
        dtype=value_types(CODING), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def value_operands(codes, stage, m, tables, CODING: gl.constexpr, DIM: gl.constexpr, LEVELS: gl.constexpr):
    """Registers of 16 values: a tuple, for each output of the PTX, its element and ``(rr, hi)``, of
    ``[words / 16, 8, 4]``."""
    HELD: gl.constexpr = held_bytes(CODING, DIM) // 2
    WORDS: gl.constexpr = HELD // 2 if CODING == "lloyd3" else HELD
    OT: gl.constexpr = WORDS // 16
    LO: gl.constexpr = lanes([OT, 8, 4], 1, 2)
    words = codes.index(stage).slice(16 * m, 16).permute([1, 0]).load(value_layout(HELD, 16))
    out = ()
    if CODING == "lloyd3":
        EIGHT: gl.constexpr = value_layout(8, 16)
        first, others = gl.split(words.reshape([2, 16, 16]).permute([1, 2, 0]))
        low, high = gl.split(first.reshape([2, 8, 16]).permute([1, 2, 0]))
        second, _unused = gl.split(others.reshape([2, 8, 16]).permute([1, 2, 0]))
        second = gl.convert_layout(second, EIGHT, assert_trivial=True)
        lower = third_planes(gl.convert_layout(low, EIGHT, assert_trivial=True), second, tables, CODING, LEVELS, 0)
        upper = third_planes(gl.convert_layout(high, EIGHT, assert_trivial=True), second, tables, CODING, LEVELS, 1)
        found = ()
        for number in gl.static_range(2):
            found = found + (gl.join(lower[number], upper[number]).permute([2, 0, 1]).reshape([WORDS, 16]),)
    elif len(value_types(CODING)) == 1:
        found = (gl.inline_asm_elementwise(
            value_asm(CODING, LEVELS, 0), value_constraints(CODING, LEVELS), (words,) + spread(tables, words),
            dtype=value_types(CODING)[0], is_pure=True, pack=2,
        ),)  # fmt: skip
    else:
        found = gl.inline_asm_elementwise(
            value_asm(CODING, LEVELS, 0), value_constraints(CODING, LEVELS), (words,) + spread(tables, words),
            dtype=value_types(CODING), is_pure=True, pack=2,
        )  # fmt: skip
    for number in gl.static_range(len(found)):
        pieces = divided(found[number].reshape([OT, 2, 8, 2, 4, 2]).permute([0, 2, 4, 5, 1, 3]).reshape([OT, 8, 4, 8]))
        for i in gl.static_range(8):
            out = out + (gl.convert_layout(pieces[i], LO, assert_trivial=True),)
    return out


@gluon.jit
def whole_scores(parts, LAYOUT: gl.constexpr):
    """Accumulators ``[8, 4, 2 (hi), 2 (column)]`` of each 16 tokens as the float32 that they are ``MAGIC`` more of."""
    N: gl.constexpr = len(parts)
    if N == 2:
        x = gl.join(parts[0], parts[1])
    elif N == 4:
        x = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
    else:
        x = gl.join(gl.join(gl.join(parts[0], parts[4]), gl.join(parts[2], parts[6])),
                    gl.join(gl.join(parts[1], parts[5]), gl.join(parts[3], parts[7])))  # fmt: skip
    x = x.reshape([8, 4, 2, 2, N]).permute([4, 0, 1, 2, 3])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True).to(gl.float32, bitcast=True)


@gluon.jit
def load_scales(scales, stage, TYPE: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """``[M, 8 (r), 2 (hi)]`` of a stage."""
    ALL: gl.constexpr = [TILE]
    return (
        reinterpreted(scales.index(stage), TYPE, ALL, LINE).reshape([TILE // 16, 2, 8]).permute([0, 2, 1]).load(LAYOUT)
    )


@gluon.jit
def scale_and_zero(stored, CODING: gl.constexpr):
    """``(scale, zero point)`` in float32."""
    zero = stored
    if CODING == "int4":
        TYPE: gl.constexpr = stored.dtype
        SAME: gl.constexpr = gl.int32 if TYPE == gl.float32 else gl.int16
        bits = stored.to(SAME, bitcast=True)
        zero = (bits & 15).to(gl.float32)
        stored = gl.where(stored == stored, bits & ~15, bits).to(SAME).to(TYPE, bitcast=True)
    return stored.to(gl.float32), zero


@gluon.jit(do_not_specialize=["num_blocks", "num_splits"], do_not_specialize_on_alignment=["lengths_ptr", "table_ptr"])
def attend_kernel(
    query_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, lengths_ptr, table_ptr, partial_ptr,
    lse_ptr, scale_log2, stride_qb, stride_qh, stride_xb, stride_xh, stride_sb, stride_sh, stride_yb, stride_yh,
    stride_zb, stride_zh, num_blocks, num_splits,
    NUM_HEADS: gl.constexpr, Q_PER_KV: gl.constexpr, KEY_CODING: gl.constexpr, VALUE_CODING: gl.constexpr,
    DIM: gl.constexpr, KEY_LEVELS: gl.constexpr, VALUE_LEVELS: gl.constexpr, KEY_UNIT: gl.constexpr,
    VALUE_UNIT: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr, MORE: gl.constexpr,
    PAGE: gl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    M: gl.constexpr = TILE // 16
    STEPS: gl.constexpr = DIM // 32
    WARP: gl.constexpr = lanes([8, 4], 0, 1)
    LS: gl.constexpr = lanes([M, 8, 4, 2, 2], 1, 2)
    LS2: gl.constexpr = lanes([1, 8, 4, 2], 1, 2)
    LQ: gl.constexpr = lanes([STEPS, 2, 4, 8, 4], 3, 4)
    keys = gl.allocate_shared_memory(gl.int32, [STAGES, TILE, held_bytes(KEY_CODING, DIM) // 4],
                                     key_swizzle(KEY_CODING, DIM))  # fmt: skip
    VALUE_HELD: gl.constexpr = held_bytes(VALUE_CODING, DIM) // 2
    values = gl.allocate_shared_memory(gl.int16, [STAGES, TILE, VALUE_HELD], value_swizzle(VALUE_HELD))
    SCALES: gl.constexpr = TILE * key_scale_ptr.dtype.element_ty.itemsize // 4
    key_scales = gl.allocate_shared_memory(gl.int32, [STAGES, SCALES], LINE)
    value_scales = gl.allocate_shared_memory(gl.int32, [STAGES, SCALES], LINE)
    split = gl.program_id(0)
    row = gl.program_id(1) // NUM_HEADS
    head = gl.program_id(1) % NUM_HEADS
    length = gl.load(lengths_ptr + row) + MORE
    row64 = row.to(gl.int64)
    head64 = head.to(gl.int64)
    query_ptr += row64 * stride_qb
    key_codes_ptr += head64 * stride_xh
    key_scale_ptr += head64 * stride_sh
    value_codes_ptr += head64 * stride_yh
    value_scale_ptr += head64 * stride_zh
    if PAGE > 0:
        table_ptr += row64 * num_blocks
    else:
        key_codes_ptr += row64 * stride_xb
        key_scale_ptr += row64 * stride_sb
        value_codes_ptr += row64 * stride_yb
        value_scale_ptr += row64 * stride_zb

    # ---- the first tiles are asked for
    end = length
    tiles = (length + TILE - 1) // TILE
    strides = (stride_xb, stride_sb, stride_yb, stride_zb)
    for index in gl.static_range(STAGES - 1):
        tile = split + index * num_splits
        copy_paged(keys, values, key_scales, value_scales, key_codes_ptr, value_codes_ptr, key_scale_ptr,
                   value_scale_ptr, page_of(table_ptr, tile, end, TILE, PAGE), strides, tile, end, index, KEY_CODING,
                   VALUE_CODING, DIM, TILE, PAGE)  # fmt: skip
    page = page_of(table_ptr, split + (STAGES - 1) * num_splits, end, TILE, PAGE)

    # ---- the query in whole numbers of 16 bits: columns 0..3 have the upper bytes, 4..7 the lower
    s = gl.arange(0, STEPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, LQ)))))[
        :, None, None, None, None
    ]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, LQ)))))[
        None, :, None, None, None
    ]
    e = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, LQ)))))[
        None, None, :, None, None
    ]
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, LQ)))))[
        None, None, None, :, None
    ]
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LQ)))))[
        None, None, None, None, :
    ]
    channel = query_channel(s, half, e, c, KEY_CODING, DIM)
    at, real = gl.broadcast((head * Q_PER_KV + (r & 3)) * stride_qh + channel, (r & 3) < Q_PER_KV)
    query = gl.load(query_ptr + at, mask=real, other=0.0).to(gl.float32)
    finite = gl.sum(gl.sum(gl.sum(gl.sum(query * 0.0, axis=2), axis=1), axis=0), axis=1)  # [8], NaN where some is not
    most = gl.max(gl.max(gl.max(gl.max(gl.abs(query), axis=2), axis=1), axis=0), axis=1)
    most = gl.maximum(most, 1.0e-30)
    ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, LQ))))
    most = gl.convert_layout(most, ROWS)
    finite = gl.convert_layout(finite, ROWS)
    whole = query * (QUERY / most)[None, None, None, :, None] + MAGIC
    bits = whole.to(gl.int32, bitcast=True)
    sums = gl.sum(gl.sum(gl.sum(gl.sum(whole - MAGIC, axis=2), axis=1), axis=0), axis=1)
    sums = gl.convert_layout(sums, ROWS)
    upper = gl.broadcast(r < 4, bits)[0]
    byte = gl.where(upper, (bits + 128) >> 8, bits) & 255
    packed = gl.sum(byte << (8 * e), axis=2)  # [STEPS, 2, 8, 4]
    packed = divided(packed.permute([2, 3, 0, 1]).reshape([8, 4, 2 * STEPS]))
    operand = ()
    for i in gl.static_range(2 * STEPS):
        operand = operand + (gl.convert_layout(packed[i], WARP, assert_trivial=True),)

    COLUMN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LS)))  # [4, 2]
    factor = gl.convert_layout((most * (scale_log2 * (KEY_UNIT / QUERY)) + finite).reshape([4, 2]), COLUMN)
    center = sums * center_of(KEY_CODING)  # taken off before the sum begins: its upper bytes, and what they leave
    upper = (center * (1.0 / 256.0) + MAGIC) - MAGIC
    center = gl.where(gl.arange(0, 8, layout=ROWS) < 4, upper, center - upper * 256.0)
    center = (MAGIC - center).to(gl.int32, bitcast=True).reshape([4, 2])
    even_start, odd_start = gl.split(gl.convert_layout(center, gl.SliceLayout(0, gl.SliceLayout(1, LS2))))
    nothing = gl.zeros([8, 4], gl.int32, WARP)
    even_start = nothing + gl.convert_layout(even_start, gl.SliceLayout(0, WARP), assert_trivial=True)[None, :]
    odd_start = nothing + gl.convert_layout(odd_start, gl.SliceLayout(0, WARP), assert_trivial=True)[None, :]
    sums_at = gl.convert_layout(sums.reshape([4, 2]), COLUMN)
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, LS)))))[
        None, None, :, None, None
    ]
    own = gl.where(lane < 2, 256.0, 1.0)
    others = gl.where(lane < 2, 1.0, 256.0)
    place = gl.arange(0, 8, layout=gl.SliceLayout(1, WARP))[:, None]
    even_order = gl.where(place < 4, 0x4341, 0x4240)
    odd_order = gl.where(place < 4, 0x3414, 0x2404)

    # ---- tokens of a tile: 16 m + 8 hi + r
    TOKENS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, LS))  # [M, 8, 2]
    token = (
        gl.arange(0, M, layout=gl.SliceLayout(1, gl.SliceLayout(2, TOKENS)))[:, None, None] * 16
        + gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, TOKENS)))[None, :, None]
        + gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, TOKENS)))[None, None, :] * 8
    )

    WORDS: gl.constexpr = VALUE_HELD // 2 if VALUE_CODING == "lloyd3" else VALUE_HELD
    OT: gl.constexpr = WORDS // 16
    OUTS: gl.constexpr = len(value_types(VALUE_CODING))
    ELEMENTS: gl.constexpr = 1 if VALUE_CODING == "int8" else 2
    LO: gl.constexpr = lanes([OT, 8, 4], 1, 2)
    acc = ()
    for _i in gl.static_range(OUTS * ELEMENTS * 2 * 4):
        acc = acc + (gl.zeros([OT, 8, 4], gl.float32, LO),)
    SOME: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, LS))  # [8, 4, 2]
    peak = gl.full([4, 2], -1.0e20, gl.float32, COLUMN)
    total = gl.zeros([8, 4, 2], gl.float32, SOME)
    zeros = gl.zeros([8, 4, 2], gl.float32, SOME)
    positive = gl.max(most, axis=0).to(gl.int32, bitcast=True)
    key_tables = own_tables(positive, KEY_LEVELS, WARP, 2)
    VALUE_WORDS: gl.constexpr = 8 if VALUE_CODING == "lloyd3" else WORDS
    value_tables = own_tables(positive, VALUE_LEVELS, value_layout(VALUE_WORDS, 16), 2)
    stage = 0
    for tile in range(split, tiles, num_splits):
        async_copy.wait_group(STAGES - 2)
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        copy_paged(keys, values, key_scales, value_scales, key_codes_ptr, value_codes_ptr, key_scale_ptr,
                   value_scale_ptr, page, strides, tile + (STAGES - 1) * num_splits, end, free, KEY_CODING,
                   VALUE_CODING, DIM, TILE, PAGE)  # fmt: skip
        page = page_of(table_ptr, tile + STAGES * num_splits, end, TILE, PAGE)  # asked for a step ahead
        key_scale, key_zero = scale_and_zero(
            load_scales(key_scales, stage, key_scale_ptr.dtype.element_ty, TILE, TOKENS), KEY_CODING
        )
        value_scale, value_zero = scale_and_zero(
            load_scales(value_scales, stage, value_scale_ptr.dtype.element_ty, TILE, TOKENS), VALUE_CODING
        )

        # ---- scores
        sums_of = ()
        for m in gl.static_range(M):
            rows = key_operands(keys, stage, m, key_tables, KEY_CODING, DIM, KEY_LEVELS)
            d = (even_start, odd_start, even_start, odd_start)
            for i in gl.static_range(STEPS):
                a = (rows[2 * i], rows[2 * STEPS + 2 * i], rows[2 * i + 1], rows[2 * STEPS + 2 * i + 1])
                d = mma(a, (operand[2 * i], operand[2 * i + 1]), d, False)
            sums_of = sums_of + (gl.join(gl.join(d[0], d[2]), gl.join(d[1], d[3])),)  # [8, 4, 2 (hi), 2 (column)]
        score = whole_scores(sums_of, LS) - MAGIC
        score = fma(swapped(score), others, score * own)  # rounded once, so alike in columns n and n + 4
        if KEY_CODING == "int4":
            score -= key_zero[:, :, None, :, None] * sums_at[None, None, :, None, :]
        score = score * key_scale[:, :, None, :, None]
        if (tile + 1) * TILE > end:
            real_token = tile * TILE + token < end
            score = gl.where(gl.broadcast(real_token[:, :, None, :, None], score)[0], score, float("-inf"))
            value_scale = gl.where(real_token, value_scale, 0.0)
        highest = gl.convert_layout(gl.max(gl.max(gl.max(score, axis=3), axis=0), axis=0), COLUMN, assert_trivial=True)
        highest = gl.maximum(highest * factor, -1.0e20)
        new_peak = gl.maximum(peak, highest)
        alpha = gl.exp2(peak - new_peak)
        beta = gl.exp2(highest - new_peak)
        peak = new_peak
        weight = gl.exp2(fma(score, factor[None, None, :, None, :], -highest[None, None, :, None, :]))
        fresh = gl.convert_layout(gl.sum(gl.sum(weight, axis=3), axis=0), SOME, assert_trivial=True)
        some_alpha = gl.convert_layout(alpha, gl.SliceLayout(0, SOME), assert_trivial=True)[None, :, :]
        some_beta = gl.convert_layout(beta, gl.SliceLayout(0, SOME), assert_trivial=True)[None, :, :]
        total = total * some_alpha + fresh * some_beta

        # ---- weights times scales, over the largest scale
        largest = gl.max(gl.max(gl.max(value_scale, axis=2), axis=0), axis=0)
        inverse = gl.where(largest > 0, 1.0 / gl.where(largest > 0, largest, 1.0), 0.0)
        weight = weight * (value_scale * inverse)[:, :, None, :, None]
        offset = weight
        if VALUE_CODING == "int4":
            offset = weight * value_zero[:, :, None, :, None]
        fresh = gl.convert_layout(gl.sum(gl.sum(offset, axis=3), axis=0), SOME, assert_trivial=True)
        zeros = zeros * some_alpha + fresh * (some_beta * largest)
        weight = gl.fma(
            weight, gl.full(weight.shape, WEIGHT, gl.float32, LS), gl.full(weight.shape, WEIGHT_MAGIC, gl.float32, LS)
        ).to(gl.int32, bitcast=True)
        even, odd = gl.split(weight)
        pair = transposed(even, odd)  # [M, 8, 4, 2 (hi)]
        pairs = divided(pair.permute([1, 2, 0, 3]).reshape([8, 4, 2 * M]))

        # ---- values
        zero = gl.full([OT, 8, 4], MAGIC_BITS, gl.int32, LO)
        products = ()
        for _i in gl.static_range(OUTS * ELEMENTS * 2):
            products = products + ((zero, zero, zero, zero),)
        for m in gl.static_range(M):
            columns = value_operands(values, stage, m, value_tables, VALUE_CODING, DIM, VALUE_LEVELS)
            b_even, b_odd = (), ()
            for hi in gl.static_range(2):
                x = gl.convert_layout(pairs[2 * m + hi], WARP, assert_trivial=True)
                even_bytes = gl.convert_layout(selected(x, even_order), gl.SliceLayout(0, LO), assert_trivial=True)
                odd_bytes = gl.convert_layout(selected(x, odd_order), gl.SliceLayout(0, LO), assert_trivial=True)
                b_even, b_odd = b_even + (even_bytes[None, :, :],), b_odd + (odd_bytes[None, :, :],)
            new_products = ()
            for number in gl.static_range(OUTS):
                for element in gl.static_range(ELEMENTS):
                    a = four_of(columns, (number * 2 + element) * 4)
                    for parity in gl.static_range(2):
                        old: gl.tuple = products[(number * ELEMENTS + element) * 2 + parity]
                        new_products = new_products + (mma(a, b_odd if parity == 1 else b_even, old, True),)
            products = new_products
        # two bits fewer, so that its product with MAGIC is exact
        factor_of = beta * (largest * (1.0 / WEIGHT))
        factor_of = (factor_of.to(gl.int32, bitcast=True) & -4).to(gl.float32, bitcast=True)
        alphas = gl.split(alpha)
        factors = gl.split(factor_of)
        magics = gl.split(factor_of * -MAGIC)
        new_acc = ()
        for number in gl.static_range(OUTS * ELEMENTS * 2):
            for i in gl.static_range(4):
                down = gl.convert_layout(alphas[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                         assert_trivial=True)[None, None, :]  # fmt: skip
                up = gl.convert_layout(factors[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                       assert_trivial=True)[None, None, :]  # fmt: skip
                less = gl.convert_layout(magics[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                         assert_trivial=True)[None, None, :]  # fmt: skip
                part = fma(products[number][i].to(gl.float32, bitcast=True), up, less)
                new_acc = new_acc + (fma(acc[number * 4 + i], down, part),)
        acc = new_acc
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    async_copy.wait_group(0)

    # ---- the part
    total = gl.convert_layout(gl.sum(total, axis=0), COLUMN, assert_trivial=True)
    zeros = gl.convert_layout(gl.sum(zeros, axis=0), COLUMN, assert_trivial=True)
    saw = total != 0.0
    inverse = gl.where(saw, VALUE_UNIT / gl.where(saw, total, 1.0), 0.0)
    CENTER: gl.constexpr = 1.0 if VALUE_CODING == "int4" else center_of(VALUE_CODING)
    shift = gl.split(zeros * CENTER)
    inverses = gl.split(inverse)
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LO)))[None, None, :]
    word = (
        gl.arange(0, OT, layout=gl.SliceLayout(1, gl.SliceLayout(2, LO)))[:, None, None] * 16
        + gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LO)))[None, :, None]
    )
    own = gl.where(lane < 2, 256.0, 1.0)
    others = gl.where(lane < 2, 1.0, 256.0)
    slot = (row64 * NUM_HEADS + head) * Q_PER_KV
    for number in gl.static_range(OUTS):
        for element in gl.static_range(ELEMENTS):
            for parity in gl.static_range(2):
                for i in gl.static_range(4):
                    x = acc[((number * ELEMENTS + element) * 2 + parity) * 4 + i]
                    x = swapped(x) * others + x * own
                    off = gl.convert_layout(shift[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                            assert_trivial=True)[None, None, :]  # fmt: skip
                    by = gl.convert_layout(inverses[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                           assert_trivial=True)[None, None, :]  # fmt: skip
                    x = (x - off) * by
                    member = 2 * lane + i % 2
                    d = output_channel(word + 8 * (i // 2), number, element, parity, VALUE_CODING)
                    at, mask = gl.broadcast(((slot + member) * num_splits + split) * DIM + d, member < Q_PER_KV)
                    mask = gl.broadcast(mask, x)[0]
                    gl.store(partial_ptr + at, x, mask=mask)
    CE: gl.constexpr = COLUMN
    member = (
        2 * gl.arange(0, 4, layout=gl.SliceLayout(1, CE))[:, None]
        + gl.arange(0, 2, layout=gl.SliceLayout(0, CE))[None, :]
    )
    lse = gl.where(saw, peak + gl.log2(gl.where(saw, total, 1.0)), HIDDEN)
    lse = gl.where(total == total, lse, NAN_LSE)  # a part that is not a number hides all others
    gl.store(lse_ptr + (slot + member) * num_splits + split, lse, mask=member < Q_PER_KV)


@gluon.jit
def query_channel(s, half, e, c, CODING: gl.constexpr, DIM: gl.constexpr):
    if CODING == "int8":
        VECTORS: gl.constexpr = min(4, DIM // 16)
        k = s * 2 + half
        channel = ((k // VECTORS * 4 + c) * VECTORS + k % VECTORS) * 4 + e
    elif CODING == "int4":
        channel = ((s // min(4, DIM // 32) * 4 + c) * min(4, DIM // 32) + s % min(4, DIM // 32)) * 8 + 2 * e + half
    elif CODING == "lloyd4":
        channel = ((s // min(4, DIM // 32) * 4 + c) * min(4, DIM // 32) + s % min(4, DIM // 32)) * 8 + 4 * half + e
    elif CODING == "lloyd3":
        channel = (s // 2 * 4 + c) * 16 + 8 * half + 2 * e + s % 2
    else:
        channel = (c * (DIM // 64) + s // 2) * 16 + 8 * half + 2 * e + s % 2
    return channel


@gluon.jit
def output_channel(word, number, element, parity, CODING: gl.constexpr):
    if CODING == "int8":
        channel = 2 * word + parity
    elif CODING == "int4":
        channel = 4 * word + 2 * parity + element
    elif CODING == "lloyd4":
        channel = 4 * word + 2 * element + parity
    else:
        channel = 8 * word + 4 * element + 2 * parity + number
    return channel


TILE = 64
"""Tokens that blocks of a pool have, or whole multiples of them."""
DIMS = {"lloyd2": (128,), "lloyd3": (128,), "lloyd4": (64, 128), "int4": (64, 128), "int8": (64, 128)}
Q_PER_KV = 4


class Plan(NamedTuple):
    """Tokens a step of the loop; steps held in shared memory; registers a thread; programs a multiprocessor."""

    tile: int
    stages: int
    registers: int
    programs: int


PLANS = {
    "lloyd2": Plan(128, 2, 255, 8),
    "lloyd3": Plan(64, 3, 168, 8),
    "lloyd4": Plan(64, 2, 216, 8),
    "int4": Plan(128, 2, 255, 6),
    "int8": Plan(64, 2, 255, 6),
}
"""As measured on an H200."""


def plan(layout: Layout, page: int = 0) -> Plan:
    """How the kernel goes about a layout: by the coding of more bits, in tiles that lie within a ``page``."""
    found = PLANS[max(layout.key, layout.value, key=nbits_of)]
    return found._replace(tile=min(found.tile, page)) if page else found


def page_tokens(stored: Stored) -> int:
    """Tokens of a block of the pool; 0 of rows without blocks."""
    return 0 if stored.block_table is None else stored.key_codes.shape[2]


def holds(layout: Layout, q_per_kv: int, dtype: torch.dtype) -> bool:
    """Whether the kernel reads these codings for so many queries a key."""
    return (
        q_per_kv <= Q_PER_KV
        and dtype in (torch.float16, torch.bfloat16)
        and layout.key_dim == layout.value_dim
        and all(layout.key_dim in DIMS.get(name, ()) for name in (layout.key, layout.value))
    )


def aligned(num_slots: int, scale_nbytes: int) -> bool:
    """Whether every row's scales begin at whole words: those of two bytes not where a row has an odd number."""
    return num_slots * scale_nbytes % 4 == 0


def supports(query: Tensor, stored: Stored, layout: Layout, fresh: Fresh | None, starts: Tensor | None) -> bool:
    """Whether :func:`attend_parts` takes this call."""
    scales, codes = (stored.key_scale, stored.value_scale), (stored.key_codes, stored.value_codes)
    return (
        query.is_cuda
        and fresh is None
        and starts is None
        and page_tokens(stored) % TILE == 0
        and all(x.stride(2) == x.shape[3] for x in codes)
        and all(x.stride(2) == 1 for x in scales)
        and query.shape[2] == 1
        and holds(layout, query.shape[1] // stored.key_codes.shape[1], query.dtype)
        and all(aligned(stride, x.element_size()) for x in scales for stride in x.stride()[:2])
        and all(stride % 16 == 0 for x in codes for stride in x.stride()[:2])
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def constants(layout: Layout) -> dict[str, object]:
    """What the kernel is told of a layout at compile time."""
    out: dict[str, object] = {"KEY_CODING": layout.key, "VALUE_CODING": layout.value, "DIM": layout.key_dim}
    for stream, name in (("KEY", layout.key), ("VALUE", layout.value)):
        nbits = int(name.removeprefix("lloyd")) if name.startswith("lloyd") else 0
        out[f"{stream}_LEVELS"] = level_bytes(layout.key_dim, nbits) if nbits else ()
        out[f"{stream}_UNIT"] = steps(layout.key_dim, nbits)[0] if nbits else 1.0
    return out


def attend_parts(
    query: Tensor, stored: Stored, layout: Layout, scale: float, partial: Tensor, lse: Tensor, more: int
) -> None:
    """Each split's output to ``partial [batch_size, num_q_heads, 1, splits, dim]``, its logarithm of sums to ``lse``.

    ``query``: rotated as the keys are; ``more``: tokens that a row holds besides those that its length counts."""
    batch_size, q_heads = query.shape[:2]
    heads, splits, page = stored.key_codes.shape[1], lse.shape[-1], page_tokens(stored)
    own, table = plan(layout, page), None if stored.block_table is None else stored.block_table.contiguous()
    early = overlaps(query)
    attend_kernel[(splits, batch_size * heads)](
        query, stored.key_codes, stored.key_scale, stored.value_codes, stored.value_scale, stored.lengths, table,
        partial, lse, scale * LOG2E, *query.stride()[:2], *(stride for x in stored[:4] for stride in x.stride()[:2]),
        None if table is None else table.shape[1], splits,
        NUM_HEADS=heads, Q_PER_KV=q_heads // heads, **constants(layout), TILE=own.tile, STAGES=own.stages, EARLY=early,
        MORE=more, PAGE=page, enable_fp_fusion=True, num_warps=1, maxnreg=own.registers,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
