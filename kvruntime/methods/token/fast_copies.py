"""Gluon: copies of tiles of codes and scales to shared memory, for :mod:`kvruntime.methods.token.fast`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kvruntime.methods.token.fast_words import held_bytes, tile_copy, token_bytes

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.9, before it


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
