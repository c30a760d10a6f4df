"""Triton: a record's tiles whose codes are permuted into their words."""

from __future__ import annotations

import triton
import triton.language as tl

from kvruntime.methods.kivi.quantize import LIMIT, encode, finite, inverse_of, load_tokens, scale_zero, store_codes
from kvruntime.methods.kivi.words import at_once, groups_in, next_power_of_2, value_param_offset, whole_groups


@triton.jit
def pack_keys(exact_ptr, new_ptr, record_ptr, params_ptr, first, length, count, stride_new_t, zero_offset, pages,
              NEW: tl.constexpr, C0: tl.constexpr, W: tl.constexpr, DIM: tl.constexpr, NBITS: tl.constexpr,
              GROUP: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr,
              PAGE: tl.constexpr, PARAMS: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """One chunk of a record's key channels."""
    LEVELS: tl.constexpr = 2.0**NBITS - 1
    TILE_WORDS: tl.constexpr = TILE * DIM * NBITS // 32
    half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + 2 * PARAMS
    TOKENS: tl.constexpr = at_once("key", TILE, W, NBITS, MOST)
    TURNS: tl.constexpr = TILE // TOKENS
    t = tl.arange(0, TOKENS)
    d = C0 + tl.arange(0, W)
    everything = t[:, None] >= 0
    if GROUP == 0 or GROUP >= TOKENS:  # one scale for all at once: look at the whole group, then pack it
        SPAN: tl.constexpr = RECORD if GROUP == 0 else GROUP
        for group in range(RECORD // SPAN):
            if GROUP == 0:
                scale = tl.load(params_ptr + d)
                zero = tl.load(params_ptr + zero_offset + d)
            else:
                low = tl.full([W], LIMIT, tl.float32)
                high = tl.full([W], -LIMIT, tl.float32)
                nans = tl.zeros([W], tl.int32)
                for turn in range(SPAN // TOKENS):
                    token = first + group * SPAN + turn * TOKENS + t
                    x = load_tokens(
                        exact_ptr, new_ptr, token, d, everything, length, count, stride_new_t, pages, NEW, DIM, SINK,
                        RESIDUAL, PAGE,
                    )  # fmt: skip
                    x, is_nan = finite(x)
                    low = tl.minimum(low, tl.min(x, 0))
                    high = tl.maximum(high, tl.max(x, 0))
                    nans = tl.maximum(nans, tl.max(is_nan.to(tl.int32), 0))
                scale, zero = scale_zero(low, high, nans > 0, LEVELS)
                tl.store(half_ptr + group * DIM + d, scale)
                tl.store(half_ptr + (RECORD // SPAN + group) * DIM + d, zero)
            inverse = inverse_of(scale)
            for turn in range(SPAN // TOKENS):
                token = first + group * SPAN + turn * TOKENS + t
                x = load_tokens(
                    exact_ptr, new_ptr, token, d, everything, length, count, stride_new_t, pages, NEW, DIM, SINK,
                    RESIDUAL, PAGE,
                )  # fmt: skip
                x, is_nan = finite(x)
                codes = tl.where(is_nan, 0, encode(x, inverse[None, :], zero[None, :], LEVELS))
                now = group * (SPAN // TOKENS) + turn
                tile_ptr = record_ptr + now // TURNS * TILE_WORDS
                store_codes(tile_ptr, codes, "key", TILE, C0, W, NBITS, now % TURNS)
    else:
        GROUPS: tl.constexpr = TOKENS // GROUP
        for turn in range(RECORD // TOKENS):
            token = first + turn * TOKENS + t
            x = load_tokens(
                exact_ptr, new_ptr, token, d, everything, length, count, stride_new_t, pages, NEW, DIM, SINK, RESIDUAL,
                PAGE,
            )  # fmt: skip
            x, is_nan = finite(x)
            x = tl.reshape(x, (GROUPS, GROUP, W))
            nans = tl.max(tl.reshape(is_nan.to(tl.int32), (GROUPS, GROUP, W)), 1)
            scale, zero = scale_zero(tl.min(x, 1), tl.max(x, 1), nans > 0, LEVELS)
            at = (turn * GROUPS + tl.arange(0, GROUPS))[:, None] * DIM + d[None, :]
            tl.store(half_ptr + at, scale)
            tl.store(half_ptr + at + RECORD // GROUP * DIM, zero)
            codes = encode(x, inverse_of(scale)[:, None, :], zero[:, None, :], LEVELS)
            codes = tl.reshape(codes, (TOKENS, W))
            store_codes(record_ptr + turn // TURNS * TILE_WORDS, codes, "key", TILE, C0, W, NBITS, turn % TURNS)


@triton.jit
def pack_values(exact_ptr, new_ptr, words_ptr, half_ptr, tile, first, length, count, stride_new_t, pages,
                NEW: tl.constexpr, C0: tl.constexpr, W: tl.constexpr, DIM: tl.constexpr, NBITS: tl.constexpr,
                GROUP: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr,
                RESIDUAL: tl.constexpr, PAGE: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """One chunk of one tile's value channels."""
    LEVELS: tl.constexpr = 2.0**NBITS - 1
    ZEROS: tl.constexpr = RECORD * (DIM // GROUP)
    GROUPS: tl.constexpr = groups_in(C0, W, GROUP)
    TOKENS: tl.constexpr = at_once("value", TILE, W, NBITS, MOST)
    d = C0 + tl.arange(0, W)
    for turn in range(TILE // TOKENS):
        t = tile * TILE + turn * TOKENS + tl.arange(0, TOKENS)
        x = load_tokens(
            exact_ptr, new_ptr, first + t, d, t[:, None] >= 0, length, count, stride_new_t, pages, NEW, DIM, SINK,
            RESIDUAL, PAGE,
        )  # fmt: skip
        x, is_nan = finite(x)
        if whole_groups(C0, W, GROUP):
            x = tl.reshape(x, (TOKENS, W // GROUP, GROUP))
            nans = tl.max(tl.reshape(is_nan.to(tl.int32), (TOKENS, W // GROUP, GROUP)), 2)
            scale, zero = scale_zero(tl.min(x, 2), tl.max(x, 2), nans > 0, LEVELS)
            group = GROUPS[0] + tl.arange(0, W // GROUP)
            at = value_param_offset(group[None, :], t[:, None], RECORD)
            tl.store(half_ptr + at, scale)
            tl.store(half_ptr + at + ZEROS, zero)
            codes = tl.reshape(encode(x, inverse_of(scale)[:, :, None], zero[:, :, None], LEVELS), (TOKENS, W))
        else:  # groups that cross chunks or are no power of two: one at a time
            codes = tl.zeros([TOKENS, W], tl.int32)
            member = tl.arange(0, next_power_of_2(GROUP))
            inside = (member < GROUP)[None, :]
            FIRST: tl.constexpr = GROUPS[0]
            LAST: tl.constexpr = GROUPS[1]
            for g in tl.static_range(FIRST, LAST):
                y = load_tokens(exact_ptr, new_ptr, first + t, g * GROUP + member, inside, length, count, stride_new_t,
                                pages, NEW, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
                y, y_nan = finite(y)
                low = tl.min(tl.where(inside, y, LIMIT), 1)
                high = tl.max(tl.where(inside, y, -LIMIT), 1)
                nans = tl.max((y_nan & inside).to(tl.int32), 1)
                scale, zero = scale_zero(low, high, nans > 0, LEVELS)
                at = value_param_offset(g, t, RECORD)
                tl.store(half_ptr + at, scale)
                tl.store(half_ptr + at + ZEROS, zero)
                mine = encode(x, inverse_of(scale)[:, None], zero[:, None], LEVELS)
                codes = tl.where((d // GROUP == g)[None, :], mine, codes)
        store_codes(words_ptr, codes, "value", TILE, C0, W, NBITS, turn)
