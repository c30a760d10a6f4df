"""Gluon: many tokens to Lloyd-Max codes, in registers: the arithmetic is ``encode``'s of
:mod:`kvruntime.methods.token.reference`, bit for bit.

Lane ``4 r + c`` of a warp has channels ``32 c`` to ``32 c + 31`` of token ``r``, so five of seven levels of a rotation
of 128 channels are sums in registers, two exchange numbers between lanes, and codes leave as whole words.  A code is
found by comparisons that are sums: ``sat((|x| - threshold) 2**40)`` is 1 above a threshold and else 0, and times a
power of two it is added to the word.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvruntime.methods.token.fast_words import lanes
from kvruntime.methods.token.levels import magnitudes, steps
from kvruntime.methods.token.reference import Layout, Stored

CODINGS = ("lloyd2", "lloyd3", "lloyd4")
DIM = 128
GROUPS = 2
"""Times eight tokens that a program codes."""
LIMIT = gl.constexpr(65504.0)
TINY = gl.constexpr(2.0**-100)


@gluon.constexpr_function
def hexadecimal(number):
    """A float32 as PTX writes it."""
    import struct  # the compiler of kernels takes no functions of the module's

    return "0f" + struct.pack(">f", number).hex().upper()


@gluon.constexpr_function
def code_asm(nbits, levels, numbers):
    """PTX: the inverse of the root mean square and eight coordinates to their codes' words.

    Outputs: of four bits the word, else 16 bits of the first plane; of three bits 16 bits of the second plane, in the
    places of its word's first half; and the sum of ``number (number + 1)``, which gives the squares of the levels.
    """
    outs = 3 if nbits == 3 else 2
    first = {2: 2, 3: 2, 4: 4}[nbits]  # bits of the first plane
    body = "{ .reg .f32 a, t, f, g; .reg .b32 w, v, p, q; "
    words = []
    for half in range(2 if nbits == 4 else 1):
        body += "mov.f32 f, 0f4B000000; "  # 2**23: whole numbers lie in the lowest bits
        if nbits == 3:
            body += "mov.f32 g, 0f4B000000; "
        each = 4 if nbits == 4 else 8
        for place in range(each):
            x = f"${outs + 1 + half * each + place}"
            body += f"abs.f32 a, {x}; mul.rn.f32 a, a, ${outs}; "
            for i in range(len(levels) - 1):
                threshold = hexadecimal(-((levels[i] + levels[i + 1]) / 2) * 2.0**40)
                body += f"fma.rn.sat.f32 t, a, {hexadecimal(2.0**40)}, {threshold}; "
                body += f"fma.rn.f32 f, t, {hexadecimal(2.0 ** (first * place))}, f; "
            body += f"set.lt.f32.f32 t, {x}, 0f00000000; "
            if nbits == 3:
                body += f"fma.rn.f32 g, t, {hexadecimal(2.0 ** (place // 2 * 4 + place % 2))}, g; "
            else:
                body += f"fma.rn.f32 f, t, {hexadecimal(2.0 ** (first * place + nbits - 1))}, f; "
        words.append(f"{'wv'[half]}")
        body += f"mov.b32 {words[-1]}, f; "
    raw = [number % 256 for number in numbers] + [0] * (8 - len(numbers))
    low, high = (f"{sum(raw[at + i] << 8 * i for i in range(4)):#x}" for at in (0, 4))
    if nbits == 4:
        body += "prmt.b32 w, w, v, 0x5410; mov.b32 $0, w; and.b32 w, w, 0x77777777; shr.u32 v, w, 16; "
    else:
        body += "and.b32 w, w, 0xffff; mov.b32 $0, w; "
        if nbits == 3:
            body += "mov.b32 v, g; and.b32 $1, v, 0xffff; "
        mask = {2: 0x1111, 3: 0x3333}[nbits]
        body += f"shr.u32 v, w, 2; and.b32 w, w, {mask:#x}; and.b32 v, v, {mask:#x}; "
    body += "mov.b32 q, 0; "
    for word in "wv":
        body += f"prmt.b32 p, {low}, {high}, {word}; add.u32 {word}, p, 0x01010101; dp4a.u32.u32 q, p, {word}, q; "
    return body + f"mov.b32 ${outs - 1}, q; }}"


@gluon.constexpr_function
def code_constraints(nbits):
    return ",".join(["=&r"] * (3 if nbits == 3 else 2) + ["f"] * 9)


@gluon.constexpr_function
def code_types(nbits):
    return (gl.int32,) * (3 if nbits == 3 else 2)


@gluon.jit
def apart(x, BIT: gl.constexpr):
    """The number of the lane that differs in a bit."""
    ASM: gl.constexpr = "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;" if BIT == 1 else "shfl.sync.bfly.b32 $0, $1, 2, 31, -1;"
    return gl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)


@gluon.jit
def across(x, sign, BIT: gl.constexpr):
    """``x * sign``, which is exact, and the number of the lane that differs in a bit: their sum or difference."""
    ASM: gl.constexpr = "{ .reg .b32 t; shfl.sync.bfly.b32 t, $1, 1, 31, -1; fma.rn.f32 $0, $1, $2, t; }"
    OTHER: gl.constexpr = "{ .reg .b32 t; shfl.sync.bfly.b32 t, $1, 2, 31, -1; fma.rn.f32 $0, $1, $2, t; }"
    return gl.inline_asm_elementwise(ASM if BIT == 1 else OTHER, "=f,f,f", [x, gl.broadcast(sign, x)[0]],
                                     dtype=gl.float32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def squared(x):
    """Rounded before it is added."""
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def divided_by(a, b):
    return gl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def root(x):
    return gl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def signed_numbers(x, flips):
    """float32 of ``x`` with the sign changed where ``flips`` is not 0, within +-``LIMIT``; a NaN stays."""
    if x.dtype == gl.float16:
        bits = gl.inline_asm_elementwise(
            "{ .reg .b32 x; xor.b32 x, $1, $2; min.NaN.f16x2 x, x, $3; max.NaN.f16x2 $0, x, $4; }",
            "=r,r,r,r,r",
            [x, gl.broadcast(flips, x)[0], gl.full(x.shape, 65504.0, gl.float16, x.type.layout),
             gl.full(x.shape, -65504.0, gl.float16, x.type.layout)],
            dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
        number = bits.to(gl.float32)
    else:
        bits = gl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;", "=r,r,r", [x, gl.broadcast(flips, x)[0]], dtype=x.dtype, is_pure=True, pack=2
        )
        number = gl.inline_asm_elementwise(
            "{ .reg .f32 x; min.NaN.f32 x, $1, 0f477FE000; max.NaN.f32 $0, x, 0fC77FE000; }", "=f,f",
            [bits.to(gl.float32)], dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return number


@gluon.jit
def sums_and_differences(x, AXIS: gl.constexpr):
    """Of ``x [G, 8, 4, 2, 2, 2, 2, 2]`` pairs along ``AXIS``."""
    if AXIS == 3:
        first, second = gl.split(x.permute([0, 1, 2, 4, 5, 6, 7, 3]))
        x = gl.join(first + second, first - second).permute([0, 1, 2, 7, 3, 4, 5, 6])
    elif AXIS == 4:
        first, second = gl.split(x.permute([0, 1, 2, 3, 5, 6, 7, 4]))
        x = gl.join(first + second, first - second).permute([0, 1, 2, 3, 7, 4, 5, 6])
    elif AXIS == 5:
        first, second = gl.split(x.permute([0, 1, 2, 3, 4, 6, 7, 5]))
        x = gl.join(first + second, first - second).permute([0, 1, 2, 3, 4, 7, 5, 6])
    elif AXIS == 6:
        first, second = gl.split(x.permute([0, 1, 2, 3, 4, 5, 7, 6]))
        x = gl.join(first + second, first - second).permute([0, 1, 2, 3, 4, 5, 7, 6])
    else:
        first, second = gl.split(x)
        x = gl.join(first + second, first - second)
    return x


@gluon.jit
def neighbours(x):
    """Sums of pairs of the last axis ``2 n``."""
    first, second = gl.split(x)
    return first + second


@gluon.jit
def lloyd_stream(x_ptr, codes_ptr, scale_ptr, signs_ptr, t, kept, stride_t, codes_at, scale_at, NBITS: gl.constexpr,
                 LEVELS: gl.constexpr, NUMBERS: gl.constexpr, UNIT: gl.constexpr, CORRECTED: gl.constexpr,
                 G: gl.constexpr):  # fmt: skip
    """``8 G`` tokens; ``t``, ``kept``, ``codes_at`` and ``scale_at`` ``[G, 8]``, places in bytes and elements."""
    ALL: gl.constexpr = lanes([G, 8, 4, 32], 1, 2)
    WORD: gl.constexpr = lanes([G, 8, 4, 4], 1, 2)  # of eight channels each
    LANE: gl.constexpr = lanes([G, 8, 4], 1, 2)
    d = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, ALL))))[None, None, :, None] * 32
    d = d + gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, ALL))))[None, None, None, :]
    ROWS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, ALL))
    here = gl.convert_layout(t, ROWS, assert_trivial=True).to(gl.int64)[:, :, None, None] * stride_t
    wanted = gl.convert_layout(kept, ROWS, assert_trivial=True)[:, :, None, None]
    at, mask = gl.broadcast(here + d, wanted)
    x = gl.load(x_ptr + at, mask=mask, other=0.0)
    flips = gl.load(signs_ptr + d).to(gl.int16) & -32768
    y = signed_numbers(x, flips).reshape([G, 8, 4, 2, 2, 2, 2, 2])
    for i in gl.static_range(5):
        y = sums_and_differences(y, 7 - i)
    y = gl.convert_layout(y.reshape([G, 8, 4, 32]), ALL, assert_trivial=True)
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, ALL))))[None, None, :, None]
    y = across(y, gl.where((c & 1) == 0, 1.0, -1.0), 1)
    y = across(y, gl.where((c & 2) == 0, 1.0, -1.0), 2)
    y = y * 128.0**-0.5
    # ---- the root mean square: neighbours are added until one is left
    s = squared(y).reshape([G, 8, 4, 2, 2, 2, 2, 2])
    for _i in gl.static_range(5):
        s = neighbours(s)
    s = gl.convert_layout(s, LANE, assert_trivial=True)
    s = s + apart(s, 1)
    s = s + apart(s, 2)
    rms = root(s * (1 / 128))
    usable = rms > TINY
    one = gl.full([G, 8, 4], 1.0, gl.float32, LANE)
    inverse = gl.where(usable, divided_by(one, gl.where(usable, rms, 1.0)), 0.0)
    # ---- codes
    eight = parts_of(y.reshape([G, 8, 4, 4, 8]))
    own = (gl.broadcast(gl.convert_layout(inverse, gl.SliceLayout(3, WORD), assert_trivial=True)[:, :, :, None],
                        gl.convert_layout(eight[0], WORD, assert_trivial=True))[0],)  # fmt: skip
    for i in gl.static_range(8):
        own = own + (gl.convert_layout(eight[i], WORD, assert_trivial=True),)
    made = gl.inline_asm_elementwise(code_asm(NBITS, LEVELS, NUMBERS), code_constraints(NBITS), own,
                                     dtype=code_types(NBITS), is_pure=True, pack=1)  # fmt: skip
    places = gl.convert_layout(codes_at, gl.SliceLayout(2, LANE), assert_trivial=True)[:, :, None]
    wanted = gl.convert_layout(kept, gl.SliceLayout(2, LANE), assert_trivial=True)[:, :, None]
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LANE)))[None, None, :]
    words = parts_of(made[0])
    if NBITS == 4:
        store_words(codes_ptr, places + lane * 16, wanted, words)
    else:
        words = (words[0] | words[1] << 16, words[2] | words[3] << 16)
        store_words(codes_ptr, places + lane * 8, wanted, words)
    if NBITS == 3:
        second = parts_of(made[1])
        second = (second[0] | second[1] << 16, second[2] | second[3] << 16)
        low = gl.convert_layout(second[0], LANE, assert_trivial=True)
        high = gl.convert_layout(second[1], LANE, assert_trivial=True)
        second = (low | apart(low, 2) << 2, high | apart(high, 2) << 2)
        store_words(codes_ptr, places + 32 + lane * 8, wanted & (lane < 2), second)
    scale = rms
    if CORRECTED:
        number = gl.convert_layout(gl.sum(made[len(made) - 1], axis=3), LANE, assert_trivial=True)
        number += apart(number, 1)
        number += apart(number, 2)
        found = (4 * number + 128).to(gl.float32) * (UNIT * UNIT / 4)
        scale = gl.minimum(root(divided_by(s, found)), LIMIT)
    TYPE: gl.constexpr = scale_ptr.dtype.element_ty
    stored = gl.where(s != s, gl.full([G, 8, 4], float("nan"), TYPE, LANE), scale.to(TYPE))
    at = gl.convert_layout(scale_at, gl.SliceLayout(2, LANE), assert_trivial=True)[:, :, None]
    gl.store(scale_ptr + (at + lane * 0), stored, mask=wanted & (lane == 0))


@gluon.jit
def parts_of(x):
    """``x [..., n]``, n 4 or 8, as a tuple of n tensors."""
    N: gl.constexpr = x.shape[len(x.shape) - 1]
    if N == 8:
        first, second = gl.split(x.reshape([x.shape[0], 8, 4, 4, 2, 4]).permute([0, 1, 2, 3, 5, 4]))
        parts = parts_of(first) + parts_of(second)
    elif len(x.shape) == 5:
        first, second = gl.split(x.reshape([x.shape[0], 8, 4, 4, 2, 2]).permute([0, 1, 2, 3, 5, 4]))
        parts = gl.split(first) + gl.split(second)
    else:
        first, second = gl.split(x.reshape([x.shape[0], 8, 4, 2, 2]).permute([0, 1, 2, 4, 3]))
        parts = gl.split(first) + gl.split(second)
    return parts


@gluon.jit
def store_words(codes_ptr, places, wanted, words):
    """Two or four 32-bit words ``[G, 8, 4]`` each behind one another at ``places`` (bytes)."""
    G: gl.constexpr = words[0].shape[0]
    N: gl.constexpr = len(words)
    if N == 2:
        both = gl.join(words[0], words[1])
    else:
        both = gl.join(gl.join(words[0], words[2]), gl.join(words[1], words[3])).reshape([G, 8, 4, 4])
    L: gl.constexpr = lanes([G, 8, 4, N], 1, 2)
    both = gl.convert_layout(both, L, assert_trivial=True)
    i = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    at = gl.convert_layout(places, gl.SliceLayout(3, L), assert_trivial=True)[:, :, :, None] // 4 + i
    mask = gl.convert_layout(wanted, gl.SliceLayout(3, L), assert_trivial=True)[:, :, :, None]
    at, mask = gl.broadcast(at, mask)
    gl.store(codes_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + at, both, mask=mask)


@gluon.jit(do_not_specialize=["new_length"])
def append_kernel(
    key_ptr, value_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, key_signs_ptr, value_signs_ptr,
    lengths_ptr, counts_ptr, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_xb, stride_xh,
    stride_xt, stride_sb, stride_sh, stride_yb, stride_yh, stride_yt, stride_zb, stride_zh, new_length,
    NUM_HEADS: gl.constexpr, KEY_NBITS: gl.constexpr, VALUE_NBITS: gl.constexpr, KEY_LEVELS: gl.constexpr,
    VALUE_LEVELS: gl.constexpr, KEY_NUMBERS: gl.constexpr, VALUE_NUMBERS: gl.constexpr, KEY_UNIT: gl.constexpr,
    VALUE_UNIT: gl.constexpr, CORRECTED: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """New tokens of one row and head, as :func:`kvruntime.methods.token.store.append_kernel` has them."""
    AT: gl.constexpr = gl.SliceLayout(2, lanes([G, 8, 4], 1, 2))
    t = gl.program_id(0) * (8 * G) + gl.arange(0, G, layout=gl.SliceLayout(1, AT))[:, None] * 8
    t = t + gl.arange(0, 8, layout=gl.SliceLayout(0, AT))[None, :]
    row = gl.program_id(1) // NUM_HEADS
    head = (gl.program_id(1) % NUM_HEADS).to(gl.int64)
    start = 0
    if counts_ptr is not None:
        start = new_length - gl.load(counts_ptr + row)
    kept = (t >= start) & (t < new_length)
    token = (gl.load(lengths_ptr + row) + t - start).to(gl.int64)
    row = row.to(gl.int64)
    if gl.program_id(2) == 0:
        lloyd_stream(key_ptr + row * stride_kb + head * stride_kh, key_codes_ptr, key_scale_ptr, key_signs_ptr, t, kept,
                     stride_kt, row * stride_xb + head * stride_xh + token * stride_xt,
                     row * stride_sb + head * stride_sh + token, KEY_NBITS, KEY_LEVELS, KEY_NUMBERS, KEY_UNIT,
                     CORRECTED, G)  # fmt: skip
    else:
        lloyd_stream(value_ptr + row * stride_vb + head * stride_vh, value_codes_ptr, value_scale_ptr, value_signs_ptr,
                     t, kept, stride_vt, row * stride_yb + head * stride_yh + token * stride_yt,
                     row * stride_zb + head * stride_zh + token, VALUE_NBITS, VALUE_LEVELS, VALUE_NUMBERS,
                     VALUE_UNIT, CORRECTED, G)  # fmt: skip


def supports(key: Tensor, value: Tensor, stored: Stored, layout: Layout, starts: Tensor | None) -> bool:
    """Whether :func:`append` takes these tokens."""
    return (
        key.is_cuda
        and starts is None
        and stored.block_table is None
        and layout.key_dim == layout.value_dim == DIM
        and all(name in CODINGS for name in (layout.key, layout.value))
        and all(x.dtype in (torch.float16, torch.bfloat16) for x in (key, value))
        and all(stride % 8 == 0 for x in (key, value) for stride in x.stride()[:3])
        and all(stride % 16 == 0 for x in (stored.key_codes, stored.value_codes) for stride in x.stride()[:3])
        and torch.cuda.get_device_capability(key.device) >= (8, 0)
    )


def constants(layout: Layout) -> dict[str, object]:
    """What the kernel is told of a layout at compile time."""
    out: dict[str, object] = {}
    for stream, name in (("KEY", layout.key), ("VALUE", layout.value)):
        nbits = int(name.removeprefix("lloyd"))
        unit, numbers = steps(DIM, nbits)
        out |= {f"{stream}_NBITS": nbits, f"{stream}_LEVELS": magnitudes(DIM, nbits)}
        out |= {f"{stream}_NUMBERS": numbers, f"{stream}_UNIT": unit}
    return out


def append(key: Tensor, value: Tensor, counts: Tensor | None, stored: Stored, layout: Layout) -> None:
    """Store new tokens behind what each row holds, of what :func:`supports` allows: as
    :func:`kvruntime.methods.token.store.append`; channels lie contiguous, ``counts`` on the device."""
    rows, heads, length = len(stored.lengths), key.shape[1], key.shape[2]
    codes = (*stored.key_codes.stride()[:3], *stored.key_scale.stride()[:2])
    codes += (*stored.value_codes.stride()[:3], *stored.value_scale.stride()[:2])
    append_kernel[(-(-length // (8 * GROUPS)), heads * rows, 2)](
        key, value, *stored[:4], stored.key_signs, stored.value_signs, stored.lengths, counts, *key.stride()[:3],
        *value.stride()[:3], *codes, length, NUM_HEADS=heads, **constants(layout), CORRECTED=layout.corrected,
        G=GROUPS, enable_fp_fusion=False, num_warps=1,
    )  # fmt: skip
