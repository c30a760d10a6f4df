"""Gluon: decode attention over packed records, on the tensor cores and at the speed of the memory.

The dequantized key is ``code * scale + zero``, so with one scale a channel ``d`` and group of tokens, and one a token
``t`` and group of channels ``g`` for values::

    S[t]   = sum_d (query[d] scale[d]) code[t, d]  +  sum_d query[d] zero[d]
    out[d] = sum_t (p[t] scale[t, g]) code[t, d]   +  sum_t p[t] zero[t, g]

The scales go to the small operand (query, p) and the codes to the matrix unit as they lie: masked where they stand in
their word, a code is the float16 subnormal ``code * 2**(nbits * j - 24)``, exactly; ``2**(nbits * j)`` is
undone in the query and, for values, after the last record.  The records' word order (kvsim/methods/packing.py) is the
matrix operand's, so a program of one warp copies a tile of 64 tokens ahead (cp.async), and masks, multiplies,
and is done.

Matrices are ``[tokens or channels, heads]``: 8 columns hold the query heads that share a key/value head.  Rounding: the
query is exact (scaled by a power of two); ``query * scale`` is held as the sum of two float16 (the second in columns
4..7 where heads are at most 4, else by a second product); every tile has a fresh accumulator that is added in
float32, because the matrix unit's own additions truncate; sums of p, and of p * zero, are rows of one more product.

Range, whatever the cache holds: the query is scaled so that ``query * scale`` cannot pass 65,504 for any scale that
``reference.LIMIT`` allows, and where a tile has a value scale of 256 or more its weights are made smaller.  A key
scale below about 2**-8 leaves ``query * scale`` fewer than 11 bits.

A head of 96 channels is two chunks, of 64 and 32 channels, one of 80 is 64 and 16, each with a word order of its own
(:func:`spans`): whatever has channels is a tuple of two, in shared memory and in registers.  Scores are one chain of
products, and one softmax.  With boosted key channels (``BOOST_CODES``, the first word of their lower bits in a record;
values are rotated then) packed channels are in the order of ``order_ptr``, the lower bits are a product of their own
over the first of them, and a value's zero is its scale times a constant, taken at the end.  Of 16 channels at 2 bits
the place of a code in its byte has a bit of the token (:func:`token_in_byte`).

Parallel over splits of the tokens, rows, key/value heads and blocks of 8 query heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import merge
from kvruntime.kernels.hadamard import rotate_rows
from kvruntime.kernels.launch import launch_kernel
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.attention import rotated
from kvruntime.methods.kivi.fast_plan import (
    MAX_REGISTERS,
    MAX_ROWS,
    PROGRAMS_PER_SM,
    REGISTERS,
    STAGES,
    TILE,
    constants,
    merges,
    padded,
    plan_merge,
    plan_splits,
    programs_per_sm,
    spare,
    supports,
)
from kvruntime.methods.kivi.pack import places
from kvruntime.methods.kivi.reference import Fresh, Layout, Stored
from kvsim.methods import packing

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7, before it
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.9, before it

NEW_API = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # Triton 3.9
CHUNK = gl.constexpr(16)
HIDDEN = gl.constexpr(-1.0e30)
TWICE_LOG2E = gl.constexpr(2 * merge.LOG2E)
MAX_PARTS_AT_ONCE = tl.constexpr(256)
HEADROOM = gl.constexpr(8.0)
EXACT_UNITS = gl.constexpr(2)
DRAWN = gl.constexpr(8)
"""One tile in so many of a long row is nobody's own."""
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1, 1], [1, 16, 8]))
ROWS = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
COLUMNS = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
channel_chunks = gluon.constexpr_function(packing.channel_chunks)
tile_order = gluon.constexpr_function(packing.tile_order)
boosted_channels = gluon.constexpr_function(packing.boosted_channels)
BOOST = gl.constexpr(2)
"""Lower bits of boosted key channels, as many as their upper ones."""


@gluon.constexpr_function
def spans(dim, groups):
    """``((first channel, width, first value group, value groups), ...)`` of a head's chunks of channels, which are
    spans here: a chunk is of exact slots."""
    out, first = [], 0
    for width in channel_chunks(dim):
        out.append((first, width, first * groups // dim, max(1, width * groups // dim)))
        first += width
    return tuple(out)


@gluon.constexpr_function
def channels_shape(width, groups):
    """``[groups, channels, heads]`` of a span's accumulator."""
    return [groups, width // groups, 8]


@gluon.constexpr_function
def token_in_byte(width, nbits):
    """Whether a code's place in its byte has a bit of the token above those of the channel, which are ``width // 8``
    places: ``hi`` of keys, ``kk`` of values."""
    return 8 // nbits > width // 8


@gluon.constexpr_function
def operand_axes(stream, width, nbits):
    """``(shape, permutation)`` from a tile's unpacked words to ``[rows, k]`` of the matrix operand.

    :func:`unpack` leaves ``memory_shape`` with its last axes reversed (half word, then field bits from the lowest).
    Keys are ``[token, channel]`` with the channel bits in the operand's order (ks, kk, c, e), values
    ``[channel, token]``.
    """
    order = tile_order(stream, packing.MAX_TILE, width, nbits)
    last = len(order.memory_shape) - 1
    first = last - ((16 // nbits).bit_length() - 1)
    shape = order.memory_shape[:first] + (2,) * (last - first + 1)
    axes = [axis if axis < first else first + last - axis for axis in order.to_logical]
    if stream == "key":
        c, *inner, e = axes[4:]
        return shape, (*axes[:4], *inner, c, e)
    return shape, (*axes[5:], *axes[:5])


@gluon.constexpr_function
def unpack_asm(nbits):
    """PTX: one word to its codes, each masked in place in either half of a register;
    the upper byte moved down first."""
    fields, step = 16 // nbits, 8 // nbits
    word, lines = f"${2 * fields}", []
    for field in range(fields):
        source = word if field < step else "high"
        mask = (2**nbits - 1) * 0x00010001 << nbits * (field % step)
        lines.append(f"and.b32 pair, {source}, {mask:#x}; mov.b32 {{${2 * field}, ${2 * field + 1}}}, pair;")
    return f"{{ .reg .b32 high, pair; shr.u32 high, {word}, 8; {' '.join(lines)} }}"


@gluon.constexpr_function
def unpack_constraints(nbits):
    return ",".join(["=h"] * (32 // nbits) + ["r"])


@gluon.constexpr_function
def unpack_types(nbits):
    return (gl.float16,) * (32 // nbits)


@gluon.constexpr_function
def room(nbits):
    """Exponent that the scaled query may have so that, times the largest scale, it stays below 65,504."""
    return int(math.log2(65504 / (2 * reference.LIMIT / (2**nbits - 1))))


@gluon.constexpr_function
def words_shape(width, nbits):
    """``[vectors, 32, 4]`` words of a tile: 16-byte vectors, lane after lane;
    of 16 channels at 2 bits 8-byte vectors."""
    words = packing.MAX_TILE * width * nbits // 32
    each = min(4, words // 32)
    return [words // 32 // each, 32, each]


@gluon.constexpr_function
def words_layout(shape):
    return gl.BlockedLayout([shape[0], 1, shape[2]], [1, 32, 1], [1, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def line_layout(size, width):
    """``[size / width, width]`` halves, copied in vectors of 16 bytes where there are enough of them,
    and of 4 at least."""
    vector = max(2, min(8, size // 32))
    return gl.BlockedLayout([1, vector], [32 * vector // width, width // vector], [1, 1], [1, 0])


@gluon.constexpr_function
def bases(size, axis, rank):
    return [[bit if i == axis else 0 for i in range(rank)] for bit in (1 << n for n in range(size.bit_length() - 1))]


@gluon.constexpr_function
def share_layout(groups, count):
    """``[groups, 4, count]``: lane c of a quad holds ``[:, c, :]``, the quads hold the same."""
    return gl.DistributedLinearLayout(
        bases(count, 2, 3) + bases(groups, 0, 3), bases(4, 1, 3) + [[0, 0, 0]] * 3, [], [], [groups, 4, count]
    )


@gluon.constexpr_function
def rows_layout(outer, count):
    """``[outer, 8, 4, count]``: lane ``r * 4 + c`` holds ``[:, r, c, :]``."""
    return gl.DistributedLinearLayout(
        bases(count, 3, 4) + bases(outer, 0, 4), bases(4, 2, 4) + bases(8, 1, 4), [], [], [outer, 8, 4, count]
    )


@gluon.constexpr_function
def zero_layout(groups, count):
    """``[8 / groups, groups, 4, count]``: lane ``r * 4 + c`` holds ``[r // groups, r % groups, c, :]``."""
    lanes = bases(4, 2, 4) + bases(groups, 1, 4) + bases(8 // groups, 0, 4)
    return gl.DistributedLinearLayout(bases(count, 3, 4), lanes, [], [], [8 // groups, groups, 4, count])


@gluon.jit
def unpack(words, NBITS: gl.constexpr):
    """Codes of ``words`` as float16 subnormals: ``words.shape + [2 (half), 2 (field bit 0), 2 (field bit 1), ...]``."""
    pieces = gl.inline_asm_elementwise(
        unpack_asm(NBITS), unpack_constraints(NBITS), [words], dtype=unpack_types(NBITS), is_pure=True, pack=1
    )
    if NBITS == 2:
        pieces = join_pairs(pieces)
    if NBITS <= 4:
        pieces = join_pairs(pieces)
    pieces = join_pairs(join_pairs(pieces))
    return pieces[0]


@gluon.jit
def join_pairs(pieces):
    joined = ()
    for i in gl.static_range(len(pieces) // 2):
        joined = joined + (gl.join(pieces[2 * i], pieces[2 * i + 1]),)
    return joined


@gluon.jit
def code_rows(words, STREAM: gl.constexpr, GROUPS: gl.constexpr, DIM: gl.constexpr, NBITS: gl.constexpr):
    """A tile's codes as the rows of a product: keys ``[GROUPS, tokens, DIM]``, values ``[GROUPS, channels, TILE]``."""
    AXES: gl.constexpr = operand_axes(STREAM, DIM, NBITS)
    codes = unpack(words, NBITS).reshape(AXES[0]).permute(AXES[1])
    if STREAM == "key":
        codes = codes.reshape([GROUPS, TILE // GROUPS, DIM])
    else:
        codes = codes.reshape([GROUPS, DIM // GROUPS, TILE])
    return gl.convert_layout(codes, ROWS, assert_trivial=True)


@gluon.jit
def operand_order(share):
    """``[groups, 4, count]`` by lanes to ``[groups, 4 * count]`` in the order of an operand's k: (ks, kk, c, e)."""
    GROUPS: gl.constexpr = share.shape[0]
    COUNT: gl.constexpr = share.shape[2]
    return share.reshape([GROUPS, 4, COUNT // 4, 2, 2]).permute([0, 2, 3, 1, 4]).reshape([GROUPS, 4 * COUNT])


@gluon.jit
def repeated_rows(share):
    """``[groups, 4, count]`` by lanes as 16 like rows a group of a product, ``[groups, 16, 4 * count]``."""
    GROUPS: gl.constexpr = share.shape[0]
    COUNT: gl.constexpr = share.shape[2]
    rows = gl.convert_layout(operand_order(share), gl.SliceLayout(1, ROWS), assert_trivial=True)[:, None, :]
    return gl.broadcast(rows, gl.zeros([GROUPS, 16, 4 * COUNT], gl.float16, ROWS))[0]


@gluon.jit
def repeat(x, TIMES: gl.constexpr, AXIS: gl.constexpr):
    """``x [a, b, n]`` a power of two times along axis 0 or 1, in registers."""
    if TIMES > 1:
        A: gl.constexpr = x.shape[0]
        B: gl.constexpr = x.shape[1]
        N: gl.constexpr = x.shape[2]
        if AXIS == 0:
            x = gl.join(x, x).permute([3, 0, 1, 2]).reshape([2 * A, B, N])
        else:
            x = gl.join(x, x).permute([0, 3, 1, 2]).reshape([A, 2 * B, N])
        x = repeat(x, TIMES // 2, AXIS)
    return x


@gluon.jit
def swap_halves(x):
    """Columns n and n ^ 4 of an accumulator exchanged."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 2, 31, -1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def product_or_rest(a, b, part):
    """float16 ``a * b`` where ``part`` is 0, and what its rounding lost (negated ``part`` 1: exact) where it is -1."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 h; mul.rn.f16x2 h, $1, $2; mul.rn.f16x2 h, h, $3; fma.rn.f16x2 $0, $1, $2, h; }",
        "=r,r,r,r", [a, b, part], dtype=gl.float16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def softmax_step(score, factor, peak, margin):
    """``(p as an operand, rescale, peak)`` for raw scores ``[1, tokens, 8]``; p is at most
    ``2**(HEADROOM - margin)``."""
    TOKENS: gl.constexpr = score.shape[1]
    PER_HEAD: gl.constexpr = gl.SliceLayout(1, MMA)
    new_peak = gl.maximum(peak, gl.convert_layout(gl.max(score, axis=1), PER_HEAD) * factor + margin)
    alpha = gl.exp2(peak - new_peak)
    score, factor = gl.broadcast(score, factor[:, None, :])
    score, offset = gl.broadcast(score, (HEADROOM - new_peak)[:, None, :])
    weight = gl.exp2(gl.fma(score, factor, offset)).to(gl.float16)
    weight = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [weight], dtype=gl.float16, is_pure=True, pack=2
    )
    weight = weight.reshape([1, TOKENS // 8, 8, 8]).permute([0, 1, 3, 2]).reshape([1, TOKENS, 8])
    return gl.convert_layout(weight, COLUMNS, assert_trivial=True), alpha[:, None, :], new_peak


@gluon.jit
def capped(score, factor, softcap):
    """``(score, factor)`` for :func:`softmax_step`; with ``softcap``, in powers of two, the scores are capped already:
    ``softcap * tanh(score * factor / softcap)``."""
    if softcap is not None:
        score, wide = gl.broadcast(score, (factor * (TWICE_LOG2E / softcap))[:, None, :])
        score = softcap - 2 * softcap / (gl.exp2(score * wide) + 1)
        factor = gl.full(factor.shape, 1.0, gl.float32, gl.SliceLayout(1, MMA))
    return score, factor


@gluon.jit
def rescale_add(acc, alpha, part):
    acc, alpha = gl.broadcast(acc, alpha)
    return gl.fma(acc, alpha, part)


@gluon.jit
def to_half(x):
    """float16, clamped to its range; a NaN stays."""
    if x.dtype == gl.float16:
        return x
    x = x.to(gl.float32)
    return gl.where(x == x, gl.minimum(gl.maximum(x, -65504.0), 65504.0), x).to(gl.float16)


@gluon.jit
def power_of_two(exponent):
    """``2.0**exponent`` for integers within float32's normal range."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def copy_codes(codes, record_ptr, tile, wanted, FIRST: gl.constexpr, SPAN: gl.constexpr, DIM: gl.constexpr,
               KEY_NBITS: gl.constexpr, VALUE_NBITS: gl.constexpr, RECORD: gl.constexpr):  # fmt: skip
    """Start copying a tile's key and value codes, ``SPAN`` channels from ``FIRST`` on."""
    KEY_WORDS: gl.constexpr = TILE * SPAN * KEY_NBITS // 32
    VALUE_WORDS: gl.constexpr = TILE * SPAN * VALUE_NBITS // 32
    KEY_TILE: gl.constexpr = TILE * DIM * KEY_NBITS // 32
    VALUE_TILE: gl.constexpr = TILE * DIM * VALUE_NBITS // 32
    KEY_CODES: gl.constexpr = TILE * FIRST * KEY_NBITS // 32
    VALUE_CODES: gl.constexpr = RECORD * DIM * KEY_NBITS // 32 + TILE * FIRST * VALUE_NBITS // 32
    if KEY_WORDS == VALUE_WORDS:
        LANES: gl.constexpr = 16 if KEY_WORDS < 128 else 32
        BOTH: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [1, 1], [1, 0])
        stream = gl.arange(0, 2, layout=gl.SliceLayout(1, BOTH))[:, None]
        i = gl.arange(0, KEY_WORDS, layout=gl.SliceLayout(0, BOTH))[None, :]
        at = stream * (VALUE_CODES - KEY_CODES) + (i + KEY_CODES)
        copy_async(codes.reshape([2, KEY_WORDS]), record_ptr + tile * KEY_TILE + at, mask=wanted)
    else:
        VECTORS: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])  # in shared memory the larger comes first
        KEY_AT: gl.constexpr = 0 if KEY_WORDS > VALUE_WORDS else VALUE_WORDS
        VALUE_AT: gl.constexpr = KEY_WORDS if KEY_WORDS > VALUE_WORDS else 0
        i = gl.arange(0, KEY_WORDS, layout=VECTORS)
        copy_async(codes.slice(KEY_AT, KEY_WORDS), record_ptr + tile * KEY_TILE + (KEY_CODES + i), mask=wanted)
        i = gl.arange(0, VALUE_WORDS, layout=VECTORS)
        copy_async(codes.slice(VALUE_AT, VALUE_WORDS), record_ptr + tile * VALUE_TILE + (VALUE_CODES + i), mask=wanted)


@gluon.jit
def copy_key_params(key_params, half_ptr, wanted, FIRST: gl.constexpr, SPAN: gl.constexpr, DIM: gl.constexpr,
                    KEY_GROUPS: gl.constexpr, KEY_PARAMS: gl.constexpr):  # fmt: skip
    """Start copying a tile's key scales and zeros, of ``SPAN`` channels from ``FIRST`` on."""
    KEY_SIZE: gl.constexpr = 2 * KEY_GROUPS * SPAN
    if SPAN == DIM:
        i = gl.arange(0, KEY_SIZE, layout=gl.BlockedLayout([8 if KEY_SIZE >= 256 else KEY_SIZE // 32], [32], [1], [0]))
        copy_async(key_params, half_ptr + 2 * KEY_PARAMS + i, mask=wanted)
    else:
        LINES: gl.constexpr = line_layout(KEY_SIZE, SPAN)
        line = gl.arange(0, 2 * KEY_GROUPS, layout=gl.SliceLayout(1, LINES))[:, None]
        i = gl.arange(0, SPAN, layout=gl.SliceLayout(0, LINES))[None, :]
        at = line * DIM + (i + FIRST)
        copy_async(key_params.reshape([2 * KEY_GROUPS, SPAN]), half_ptr + 2 * KEY_PARAMS + at, mask=wanted)


@gluon.jit
def copy_tile(codes, key_params, value_params, record_ptr, tile, wanted, DIM: gl.constexpr, KEY_NBITS: gl.constexpr,
              VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr, VALUE_GROUPS: gl.constexpr, RECORD: gl.constexpr,
              KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr, BOOST_CODES: gl.constexpr):  # fmt: skip
    """Start copying a tile: key and value codes and key scales and zeros, each span of channels to its own memory;
    value zeros and scales, groups to a power of two."""
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    half_ptr = record_ptr.to(gl.pointer_type(gl.float16), bitcast=True)
    for i in gl.static_range(len(SPANS)):
        copy_codes(codes[i], record_ptr, tile, wanted, SPANS[i][0], SPANS[i][1], DIM, KEY_NBITS, VALUE_NBITS, RECORD)
    for i in gl.static_range(len(SPANS)):
        copy_key_params(key_params[i], half_ptr, wanted, SPANS[i][0], SPANS[i][1], DIM, KEY_GROUPS, KEY_PARAMS)
    if BOOST_CODES > 0:
        WORDS: gl.constexpr = TILE * boosted_channels(DIM) * BOOST // 32
        i = gl.arange(0, WORDS, layout=gl.BlockedLayout([WORDS // 32], [32], [1], [0]))
        copy_async(codes[len(SPANS)], record_ptr + tile * WORDS + (BOOST_CODES + i), mask=wanted)

    GROUPS: gl.constexpr = padded(VALUE_GROUPS)
    VALUE_SIZE: gl.constexpr = 2 * GROUPS * TILE
    LINES: gl.constexpr = line_layout(VALUE_SIZE, 16)
    line = gl.arange(0, VALUE_SIZE // 16, layout=gl.SliceLayout(1, LINES)) ^ (4 * GROUPS)  # zeros first
    if GROUPS > VALUE_GROUPS:  # the last line stands for those of groups that are none: what they make is not used
        line = line // (4 * GROUPS) * (4 * VALUE_GROUPS) + gl.minimum(line % (4 * GROUPS), 4 * VALUE_GROUPS - 1)
    if BOOST_CODES > 0:  # no zeros: the scales stand for them
        line = line % 4
    halves = gl.arange(0, 16, layout=gl.SliceLayout(0, LINES))
    at = line[:, None] * (RECORD // 4) + halves[None, :] + 2 * VALUE_PARAMS
    copy_async(value_params.reshape([VALUE_SIZE // 16, 16]), half_ptr + tile * 16 + at, mask=wanted)
    async_copy.commit_group()


@gluon.jit
def at_stage(buffers, stage):
    """A stage of every span's memory."""
    own = ()
    for i in gl.static_range(len(buffers)):
        own = own + (buffers[i].index(stage),)
    return own


@gluon.constexpr_function
def num_lines(words):
    """Lines of 128 bytes that hold ``words``, to a power of two."""
    return max(32, 1 << ((words + 31) // 32 - 1).bit_length())


@gluon.jit
def prefetch(record_ptr, RECORD_WORDS: gl.constexpr):
    """:func:`ask_for` all of a record."""
    lines = gl.arange(0, num_lines(RECORD_WORDS), layout=gl.BlockedLayout([1], [32], [1], [0]))
    ask_for(record_ptr + gl.minimum(lines * 32, RECORD_WORDS - 1))


@gluon.jit
def ask_for(at):
    """Ask for the lines of ``at`` to come into the L2 cache, whoever will need them."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def forget_cached():
    """What this multiprocessor's L1 cache holds is asked for again:
    copies of fewer than 16 bytes a lane go through it."""
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def draw(counter_ptr, wanted):
    """Count one on where ``wanted`` (a scalar): ``[32]`` of which the largest is the count before.  Nothing waits for
    it here: to lanes of one address the assembler would hand out the sum at once."""
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    wanted = gl.where((lanes == 0) & wanted, 1, 0)
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }",
        "=&r,l,r", [counter_ptr + lanes, wanted], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def record_of(base_ptr, table_ptr, tile, wanted, TILES: gl.constexpr, RECORD_STRIDE: gl.constexpr):
    """Where the record of a row's ``tile`` lies; a block table is read only where ``wanted``."""
    block = tile // TILES
    if table_ptr is not None:
        block = gl.load(table_ptr + block, mask=wanted, other=0)
    return base_ptr + block.to(gl.int64) * RECORD_STRIDE


@gluon.jit
def copy_first(codes, key_params, value_params, base_ptr, table_ptr, first, step, least, certain, DIM: gl.constexpr,
               KEY_NBITS: gl.constexpr, VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr, VALUE_GROUPS: gl.constexpr,
               RECORD: gl.constexpr, KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr, RECORD_STRIDE: gl.constexpr,
               STAGES: gl.constexpr, BOOST_CODES: gl.constexpr):  # fmt: skip
    """Start copying the first tiles of a split, ``least`` and above: fewer than ``certain`` may be read."""
    TILES: gl.constexpr = RECORD // TILE
    for index in gl.static_range(STAGES - 1):
        tile = first + index * step
        if tile >= least:
            copy_tile(at_stage(codes, index), at_stage(key_params, index), value_params.index(index),
                      record_of(base_ptr, table_ptr, tile, tile < certain, TILES, RECORD_STRIDE), tile % TILES,
                      tile < certain, DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS,
                      VALUE_PARAMS, BOOST_CODES)  # fmt: skip


@triton.jit
def units_of(packed, chunks):
    """Work of one head of a row, in tiles: chunks of exact slots first, each as much as ``EXACT_UNITS`` tiles."""
    return packed // TILE + EXACT_UNITS * chunks


@triton.jit
def owned(tiles, num_splits):
    """Tiles that are a split's own; the rest is drawn, tile after tile, by whoever comes first: memory serves some
    multiprocessors better than others."""
    each = tiles // num_splits
    return tl.maximum(each - each // DRAWN, 3)


@triton.jit
def add(a, b):
    return a + b


@gluon.jit
def held(slot, length, packed, num_slots, SINK: gl.constexpr, RESIDUAL: gl.constexpr):
    """Whether an exact slot holds a token: the sink's, then the ring's, by distance from the oldest unpacked token."""
    ahead = slot - SINK - packed % RESIDUAL
    ahead = gl.where(ahead < 0, ahead + RESIDUAL, ahead)
    token = gl.where(slot < SINK, slot, SINK + packed + ahead)
    return (slot < num_slots) & (token < length)


@gluon.jit
def present(slot, length, packed, num_slots, since, SINK: gl.constexpr, RESIDUAL: gl.constexpr):
    """:func:`held`; of fresh tokens (``since`` given) those from ``since`` on."""
    return (
        held(slot, length, packed, num_slots, SINK, RESIDUAL) if since is None else (slot >= since) & (slot < num_slots)
    )


@gluon.jit
def reinterpret_half(words, TOKENS: gl.constexpr, SPAN: gl.constexpr):
    """Shared words as float16 ``[TOKENS, SPAN]``, swizzled for ldmatrix: the banks are 64 halves wide."""
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(8, max(1, 64 // SPAN), min(8, SPAN // 8), [1, 0])
    ALL: gl.constexpr = 2 * words.shape[0] // SPAN
    if NEW_API:
        tokens = words.reinterpret(gl.float16, [ALL, SPAN], SWIZZLED)
    else:
        tokens = words._reinterpret(gl.float16, [ALL, SPAN], SWIZZLED)
    return tokens.slice(0, TOKENS)


@gluon.jit
def places_of(slot, wanted, packed, stride, table_ptr, stride_page, PAGE: gl.constexpr):
    """Where exact slots lie, in elements; with ``PAGE`` those of a pool, counted from the oldest unpacked token."""
    at = slot * stride
    if PAGE > 0:
        token = packed + slot
        page = gl.load(table_ptr + token // PAGE, mask=wanted, other=0)
        at = page.to(gl.int64) * stride_page + token % PAGE * stride
    return at


@gluon.jit
def load_keys(key_ptr, stride_k, first, length, packed, num_slots, since, table_ptr, stride_page, FIRST: gl.constexpr,
              SPAN: gl.constexpr, SINK: gl.constexpr, RESIDUAL: gl.constexpr, AT_ONCE: gl.constexpr,
              PAGE: gl.constexpr):  # fmt: skip
    """Keys of 16 exact slots ``[2 (hi), 8 (r), 4 (c), SPAN / 4]``."""
    KEYS: gl.constexpr = rows_layout(2, SPAN // 4)
    hi = gl.arange(0, 2, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, KEYS))))[:, None, None, None]
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, KEYS))))[None, :, None, None]
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, KEYS))))[None, None, :, None]
    i = gl.arange(0, SPAN // 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, KEYS))))[
        None, None, None, :
    ]
    slot = first + hi * 8 + r
    wanted = slot < num_slots if AT_ONCE else present(slot, length, packed, num_slots, since, SINK, RESIDUAL)
    at = places_of(slot, wanted, packed, stride_k, table_ptr, stride_page, PAGE)
    at, wanted = gl.broadcast(at + c * (SPAN // 4) + (i + FIRST), wanted)
    return gl.load(key_ptr + at, mask=wanted, other=0.0)


@gluon.jit
def load_values(value_ptr, stride_v, first, length, packed, num_slots, since, table_ptr, stride_page,
                FIRST: gl.constexpr, SPAN: gl.constexpr, SINK: gl.constexpr, RESIDUAL: gl.constexpr,
                AT_ONCE: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Values of 16 exact slots ``[slots, SPAN]``, zeros where there is no token."""
    LANES: gl.constexpr = min(32, SPAN // 8)  # of one slot
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [1, 1], [1, 0])
    slot = first + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, VALUES))[:, None]
    wanted = present(slot, length, packed, num_slots, since, SINK, RESIDUAL)
    at = places_of(slot, wanted, packed, stride_v, table_ptr, stride_page, PAGE)
    at = at + (gl.arange(0, SPAN, layout=gl.SliceLayout(0, VALUES))[None, :] + FIRST)
    mask = gl.broadcast(wanted, at)[0]
    if AT_ONCE:
        value = gl.load(value_ptr + at, mask=gl.broadcast(slot < num_slots, at)[0], other=0.0)
        value = gl.where(mask, value, 0.0).to(value.dtype)
    else:
        value = gl.load(value_ptr + at, mask=mask, other=0.0)
    return value


@gluon.jit
def key_rows(key, SPAN: gl.constexpr):
    """:func:`load_keys`' as the rows of a product."""
    key = to_half(key).reshape([2, 8, 4, SPAN // 16, 2, 2]).permute([0, 1, 3, 4, 2, 5]).reshape([1, CHUNK, SPAN])
    return gl.convert_layout(key, ROWS, assert_trivial=True)


@gluon.jit
def value_places(GROUPS: gl.constexpr, WIDTH: gl.constexpr, VALUE_NBITS: gl.constexpr):
    """Of the channels of an accumulator, the places that their codes have in a byte (but for :func:`token_in_byte`)."""
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    if GROUPS > 1 and token_in_byte(
        WIDTH, VALUE_NBITS
    ):  # groups of 16 channels: every second one's are the upper two of four places
        group = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
        channel = group * WIDTH + channel
    return (channel >> 3) & (8 // VALUE_NBITS - 1)


@gluon.jit
def add_values(acc, weight, alpha, staged, VALUE_NBITS: gl.constexpr):
    """``acc`` of a span of channels after 16 exact slots, whose values lie in ``staged``."""
    GROUPS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    TRANSPOSED: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]), 2)
    rows = gl.convert_layout(
        staged.permute([1, 0]).load(TRANSPOSED).reshape([GROUPS, WIDTH, CHUNK]), ROWS, assert_trivial=True
    )
    weight = gl.convert_layout(repeat(weight, GROUPS, 0), COLUMNS, assert_trivial=True)
    fresh = mma_v2(rows, weight, gl.zeros(acc.shape, gl.float32, MMA))
    fresh, down = gl.broadcast(fresh, power_of_two(VALUE_NBITS * value_places(GROUPS, WIDTH, VALUE_NBITS) - 24))
    alpha = gl.convert_layout(repeat(alpha, GROUPS, 0), MMA, assert_trivial=True)
    return rescale_add(acc, alpha, fresh * down)


@gluon.jit
def exact_step(acc, sums, peak, query, factor, staged, key_ptr, value_ptr, stride_k, stride_v, first, length, packed,
               num_slots, since, position, table_ptr, stride_pk, stride_pv, softcap, VALUE_NBITS: gl.constexpr,
               SHARED: gl.constexpr, DIM: gl.constexpr, VALUE_GROUPS: gl.constexpr, SINK: gl.constexpr,
               RESIDUAL: gl.constexpr, AT_ONCE: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """``(acc, sums, peak)`` after the 16 exact slots from ``first`` on; ``staged`` is shared memory for their values.

    ``AT_ONCE``: empty slots are read too, so that nothing waits for ``length`` and ``packed``.  Fresh tokens are slots
    from ``since`` on, and a column sees those up to its ``position``.  With ``PAGE`` the slots are a pool's
    (:func:`places_of`)."""
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    keys, values = (), ()
    for i in gl.static_range(len(SPANS)):
        keys = keys + (load_keys(key_ptr, stride_k, first, length, packed, num_slots, since, table_ptr, stride_pk,
                                 SPANS[i][0], SPANS[i][1], SINK, RESIDUAL, AT_ONCE, PAGE),)  # fmt: skip
    for i in gl.static_range(len(SPANS)):
        values = values + (load_values(value_ptr, stride_v, first, length, packed, num_slots, since, table_ptr,
                                       stride_pv, SPANS[i][0], SPANS[i][1], SINK, RESIDUAL,
                                       AT_ONCE, PAGE),)  # fmt: skip
    score = gl.zeros([1, CHUNK, 8], gl.float32, MMA)
    for i in gl.static_range(len(SPANS)):
        score = mma_v2(key_rows(keys[i], SPANS[i][1]), query[i], score)
    if SHARED and DIM <= 128:  # of wider heads all eight columns hold the query
        score += swap_halves(score)
    score, factor = capped(score, factor, softcap)
    slot = first + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    mask = gl.broadcast(present(slot, length, packed, num_slots, since, SINK, RESIDUAL), score)[0]
    if position is not None:
        mask = mask & (slot <= position)
    score = gl.where(mask, score, float("-inf"))
    weight, alpha, peak = softmax_step(score, factor, peak, 0.0)
    for i in gl.static_range(len(SPANS)):
        staged[i].store(to_half(values[i]))
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, ROWS)))[None, :, None]
    ones = gl.where(row >= 8, 1.0, 0.0).to(gl.float16)
    ones = gl.broadcast(ones, gl.zeros([1, 16, CHUNK], gl.float16, ROWS))[0]
    sums = rescale_add(sums, alpha, mma_v2(ones, weight, gl.zeros([1, 16, 8], gl.float32, MMA)))
    new_acc = ()
    for i in gl.static_range(len(SPANS)):
        new_acc = new_acc + (add_values(acc[i], weight, alpha, staged[i], VALUE_NBITS),)
    return new_acc, sums, peak


@gluon.jit
def load_words(codes, SPAN: gl.constexpr, KEY_NBITS: gl.constexpr, VALUE_NBITS: gl.constexpr):
    """Key and value words of a tile, ``SPAN`` channels."""
    KEY: gl.constexpr = words_shape(SPAN, KEY_NBITS)
    VALUE: gl.constexpr = words_shape(SPAN, VALUE_NBITS)
    KEY_AT: gl.constexpr = 0 if KEY_NBITS >= VALUE_NBITS else TILE * SPAN * VALUE_NBITS // 32
    VALUE_AT: gl.constexpr = TILE * SPAN * KEY_NBITS // 32 if KEY_NBITS >= VALUE_NBITS else 0
    keys = codes.reshape([codes.shape[0] // (32 * KEY[2]), 32, KEY[2]])
    values = codes.reshape([codes.shape[0] // (32 * VALUE[2]), 32, VALUE[2]])
    key_words = keys.slice(KEY_AT // (32 * KEY[2]), KEY[0]).load(words_layout(KEY))
    value_words = values.slice(VALUE_AT // (32 * VALUE[2]), VALUE[0]).load(words_layout(VALUE))
    return key_words, value_words


@gluon.jit
def undo_token(score, KEY_NBITS: gl.constexpr):
    """Scores ``[groups, tokens, 8]`` of keys whose places in a byte have the bit ``hi`` of the token,
    which is undone."""
    token = gl.arange(0, score.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    score, down = gl.broadcast(score, power_of_two(-2 * KEY_NBITS * ((token >> 3) & 1)))
    return score * down


@gluon.jit
def narrow_values(rows, weight, VALUE_NBITS: gl.constexpr):
    """The product of ``rows`` whose places in a byte have the bit ``kk`` of the token, and ``weight``: in two, because
    a weight that is made smaller may lose bits."""
    SHAPE: gl.constexpr = [rows.shape[0], rows.shape[1], 8]
    token = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, COLUMNS)))[None, :, None]
    upper = gl.broadcast((token & 8) != 0, weight)[0]
    high = mma_v2(rows, gl.where(upper, weight, 0.0), gl.zeros(SHAPE, gl.float32, MMA))
    return mma_v2(rows, gl.where(upper, 0.0, weight), high * 2.0 ** (-2 * VALUE_NBITS))


@gluon.jit
def load_key_params(key_params, SPAN: gl.constexpr, KEY_GROUPS: gl.constexpr):
    """Key scales and zeros of a tile, ``SPAN`` channels, by lanes."""
    SHARE: gl.constexpr = share_layout(KEY_GROUPS, SPAN // 4)
    lines = key_params.reshape([2 * KEY_GROUPS, 4, SPAN // 4])
    scale = lines.slice(0, KEY_GROUPS).load(SHARE)
    zero = lines.slice(KEY_GROUPS, KEY_GROUPS).load(SHARE)
    return scale, zero


@gluon.jit
def largest_of_query(query):
    """A column's largest element, of all spans."""
    largest = gl.max(gl.abs(query[0].to(gl.float32)), axis=1)
    for i in gl.static_range(1, len(query)):
        largest = gl.maximum(largest, gl.max(gl.abs(query[i].to(gl.float32)), axis=1))
    return largest


@gluon.jit
def largest_scale_of(scales):
    """The largest of the spans' value scales."""
    if len(scales) == 1:
        largest = gl.max(gl.max(gl.max(scales[0], axis=2), axis=1), axis=0)
    else:  # of all spans before lanes compare theirs
        LANES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, share_layout(scales[0].shape[0], scales[0].shape[2])))
        of_lane = gl.max(gl.max(scales[0], axis=2), axis=0)
        for i in gl.static_range(1, len(scales)):
            other = gl.max(gl.max(scales[i], axis=2), axis=0)
            of_lane = gl.maximum(of_lane, gl.convert_layout(other, LANES, assert_trivial=True))
        largest = gl.max(of_lane, axis=0)
    return largest.to(gl.float32)


@gluon.jit
def load_ordered(query_ptr, order_ptr, column, real, SPAN: gl.constexpr, DIM: gl.constexpr):
    """The query at the first ``SPAN`` channels of a row's order, as an operand."""
    k = gl.arange(0, SPAN, layout=gl.SliceLayout(0, gl.SliceLayout(2, COLUMNS)))
    place = ((k >> 1) & 3) * (SPAN // 4) + (k >> 4) * 4 + ((k >> 3) & 1) * 2 + (k & 1)
    channel = gl.minimum(gl.load(order_ptr + place).to(gl.int32), DIM - 1)[
        None, :, None
    ]  # weights, where none is packed
    at, mask = gl.broadcast(column + channel, real)
    return gl.load(query_ptr + at, mask=mask, other=0.0)


@gluon.jit
def scaled_down(query, exponent):
    """A query in float32, a column's largest element within [1, 2)."""
    query, down = gl.broadcast(query.to(gl.float32), power_of_two(-exponent)[:, None, :])
    return query * down


@gluon.jit
def packed_up(SPAN: gl.constexpr, NBITS: gl.constexpr, LESS: gl.constexpr):
    """What a query's channels are multiplied by so that their codes' places in a byte are undone, and ``2**-LESS``."""
    ROOM: gl.constexpr = room(NBITS)
    k = gl.arange(0, SPAN, layout=gl.SliceLayout(0, gl.SliceLayout(2, COLUMNS)))
    return power_of_two(ROOM - 1 - LESS - NBITS * ((k >> 3) & (8 // NBITS - 1)))[None, :, None]


@gluon.jit
def attend_split(
    query_ptr, base_ptr, exact_key_ptr, exact_value_ptr, codes, key_params, value_params, first, step, end, first_chunk,
    step_chunk, end_chunk, length, packed, num_slots, scale_log2, column, real, newest, table_ptr,
    draws_ptr, pages, order_ptr, sink, softcap, window,
    DIM: gl.constexpr, KEY_NBITS: gl.constexpr, VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr,
    VALUE_GROUPS: gl.constexpr, RECORD: gl.constexpr, KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr,
    RECORD_STRIDE: gl.constexpr, SINK: gl.constexpr, RESIDUAL: gl.constexpr, SHARED: gl.constexpr, BEGUN: gl.constexpr,
    EARLY: gl.constexpr, AT_ONCE: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr, BOOST_CODES: gl.constexpr,
):  # fmt: skip
    """``(acc, sums, peak)`` of every ``step``-th tile from ``first`` to ``end`` and some chunks of exact slots.
    ``acc * 2**(24 - VALUE_NBITS * j)`` and rows 0..7 of ``sums`` (p * zero) make the output, rows 8..15 (p) its
    divisor; p is ``2**(HEADROOM + S - peak)``.  ``newest``: None, or the fresh tokens' keys and values, their strides
    between tokens, how many, the first real one, each column's position, and the last column's."""
    TILES: gl.constexpr = RECORD // TILE
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    GROUPS: gl.constexpr = padded(VALUE_GROUPS)
    KEY_STEP: gl.constexpr = 8 // KEY_NBITS  # codes a byte; code j of a byte lies at 2**(nbits * j - 24)
    KEY_ROOM: gl.constexpr = room(KEY_NBITS)
    PER_HEAD: gl.constexpr = gl.SliceLayout(1, MMA)
    ZERO_ROWS: gl.constexpr = zero_layout(GROUPS, TILE // 4)
    WIDE: gl.constexpr = DIM > 128  # registers are short: what can be made or read again is not kept
    NARROW_KEYS: gl.constexpr = token_in_byte(SPANS[len(SPANS) - 1][1], KEY_NBITS)
    ONCE: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 4, 2], [1, 1, 1], [2, 1, 0])
    ZERO_SHAPE: gl.constexpr = [8 // GROUPS, GROUPS, 4, TILE // 4]

    # ---- the query is asked for first: behind the tiles it would wait for all of them
    loaded = ()
    for i in gl.static_range(len(SPANS)):
        k = gl.arange(0, SPANS[i][1], layout=gl.SliceLayout(0, gl.SliceLayout(2, COLUMNS)))
        channel = (((k >> 1) & 3) * (SPANS[i][1] // 4) + (k >> 4) * 4 + ((k >> 3) & 1) * 2 + (k & 1) + SPANS[i][0])[
            None, :, None
        ]
        at, mask = gl.broadcast(column + channel, real)
        loaded = loaded + (gl.load(query_ptr + at, mask=mask, other=0.0),)

    if BOOST_CODES > 0:
        BOOSTED: gl.constexpr = boosted_channels(DIM)
        ordered_query = load_ordered(query_ptr, order_ptr, column, real, DIM, DIM)
        boosted_query = load_ordered(query_ptr, order_ptr, column, real, BOOSTED, DIM)

    # ---- the first tiles, if they are not on their way; again those of a record that was packed since
    # they were asked for
    if not BEGUN:
        copy_first(codes, key_params, value_params, base_ptr, table_ptr, first, step, 0, end, DIM, KEY_NBITS,
                   VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS, VALUE_PARAMS, RECORD_STRIDE,
                   STAGES, BOOST_CODES)  # fmt: skip
    elif EARLY:
        if length - SINK - packed <= RESIDUAL - RECORD + 1:
            async_copy.wait_group(0)
            forget_cached()
            copy_first(codes, key_params, value_params, base_ptr, None, first, step, (packed - RECORD) // TILE, end,
                       DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS, VALUE_PARAMS,
                       RECORD_STRIDE, STAGES, BOOST_CODES)  # fmt: skip

    # ---- the query, its largest element scaled to [1, 2), in the order of an operand
    exponent = (largest_of_query(loaded).to(gl.int32, bitcast=True) >> 23) - 127
    exponent = gl.minimum(gl.maximum(exponent, -80), 80)
    queries, group_queries, scaled, parts, up_halves = (), (), (), (), ()
    for i in gl.static_range(len(SPANS)):
        query, down = gl.broadcast(loaded[i].to(gl.float32), power_of_two(-exponent)[:, None, :])
        query = query * down
        k = gl.arange(0, SPANS[i][1], layout=gl.SliceLayout(0, gl.SliceLayout(2, COLUMNS)))
        up_halves = up_halves + (
            power_of_two(KEY_ROOM - 1 - KEY_NBITS * ((k >> 3) & (KEY_STEP - 1)))[None, :, None].to(gl.float16),
        )
        query, up = gl.broadcast(
            query, power_of_two(KEY_ROOM - 1 - KEY_NBITS * ((k >> 3) & (KEY_STEP - 1)))[None, :, None]
        )
        scaled = scaled + ((query * up).to(gl.float16),)  # at most 2**KEY_ROOM, and a scale at most 65504 / 2**KEY_ROOM
        if SHARED:
            n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
            low = gl.broadcast(n >= 4, query)[0]
            if not WIDE:
                query = gl.where(low, 0.0, query)
            parts = parts + (gl.where(low, -1.0, 0.0).to(gl.float16),)
        queries = queries + (query.to(gl.float16),)
        group_queries = group_queries + (
            gl.convert_layout(repeat(queries[i], KEY_GROUPS, 0), COLUMNS, assert_trivial=True),
        )
    if BOOST_CODES > 0:  # packed channels are in another order, and the exact ones' query is not theirs
        gl.static_assert(len(SPANS) == 1 and KEY_GROUPS == 1)
        query = scaled_down(ordered_query, exponent)
        query, up = gl.broadcast(query, packed_up(DIM, KEY_NBITS, 0))
        scaled = ((query * up).to(gl.float16),)
        if SHARED:
            n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
            query = gl.where(gl.broadcast(n >= 4, query)[0], 0.0, query)
        group_queries = (query.to(gl.float16),)
        query = scaled_down(boosted_query, exponent)
        query, up = gl.broadcast(query, packed_up(BOOSTED, KEY_NBITS, BOOST))
        boosted_query = (query * up).to(gl.float16)
        if SHARED:
            n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
            boosted_part = gl.where(gl.broadcast(n >= 4, query)[0], -1.0, 0.0).to(gl.float16)
    factor = gl.convert_layout(power_of_two(exponent), PER_HEAD) * scale_log2  # of exact scores; of packed ones:
    packed_factor = factor * 2.0 ** (25 - KEY_ROOM)
    acc = ()
    for i in gl.static_range(len(SPANS)):
        acc = acc + (gl.zeros(channels_shape(SPANS[i][1], SPANS[i][3]), gl.float32, MMA),)
    sums = gl.zeros([1, 16, 8], gl.float32, MMA)
    peak = gl.full([1, 8], -1.0e20, gl.float32, PER_HEAD)
    if sink is not None:  # a token of no value, whose weight is 1 where it is seen
        peak = gl.maximum(peak, sink)
        row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
        seen = gl.where(sink > HIDDEN, 2.0**HEADROOM, 0.0)[:, None, :]
        seen, row = gl.broadcast(gl.broadcast(seen, sums)[0], row)
        sums = gl.where(row >= 8, seen, 0.0)

    # ---- exact tokens, 16 slots a step
    staged = ()
    for i in gl.static_range(len(SPANS)):
        staged = staged + (reinterpret_half(codes[i].index(STAGES - 1), CHUNK, SPANS[i][1]),)
    end_exact = end_chunk
    if newest is not None:
        chunks = (num_slots + CHUNK - 1) // CHUNK
        end_exact = gl.minimum(end_chunk, chunks)
    for chunk in range(first_chunk, end_exact, step_chunk):
        if PAGE == 0:
            acc, sums, peak = exact_step(acc, sums, peak, queries, factor, staged, exact_key_ptr, exact_value_ptr, DIM,
                                         DIM, chunk * CHUNK, length, packed, num_slots, None, None, None, None, None,
                                         softcap,
                                         VALUE_NBITS, SHARED, DIM, VALUE_GROUPS, SINK, RESIDUAL,
                                         AT_ONCE, 0)  # fmt: skip
        else:
            acc, sums, peak = exact_step(acc, sums, peak, queries, factor, staged, exact_key_ptr, exact_value_ptr,
                                         pages[3], pages[6], chunk * CHUNK, length, packed, length - packed, 0, None,
                                         pages[0], pages[1], pages[4], softcap, VALUE_NBITS, SHARED, DIM,
                                         VALUE_GROUPS, SINK,
                                         RESIDUAL, False, PAGE)  # fmt: skip

    # ---- fresh tokens, whose chunks are counted after the exact ones; none beyond the last column's position
    if newest is not None:
        done = (gl.maximum(end_exact - first_chunk, 0) + step_chunk - 1) // step_chunk
        end_fresh = gl.minimum(end_chunk, chunks + newest[7] // CHUNK + 1)
        for chunk in range(first_chunk + done * step_chunk, end_fresh, step_chunk):
            acc, sums, peak = exact_step(acc, sums, peak, queries, factor, staged, newest[0], newest[1], newest[2],
                                         newest[3], (chunk - chunks) * CHUNK, length, packed, newest[4], newest[5],
                                         newest[6], None, None, None, softcap, VALUE_NBITS, SHARED, DIM, VALUE_GROUPS,
                                         SINK,
                                         RESIDUAL, False, 0)  # fmt: skip

    # ---- packed tokens, tile after tile, the next ones on their way
    stage = 0
    tile = first
    ahead = first + (STAGES - 1) * step  # the tile that is asked for while ``tile`` is worked on
    if table_ptr is not None:  # read a step before it is needed
        next_ptr = record_of(base_ptr, table_ptr, ahead, ahead < end, TILES, RECORD_STRIDE)
    if draws_ptr is not None:
        gl.static_assert(STAGES == 2)
        own = owned(end, step)
        # of the tile after ``ahead``, which is known when this step ends: its number was asked for a step before
        turn = STAGES
        asked = gl.full([32], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    while tile < end:
        async_copy.wait_group(STAGES - 2)
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        if table_ptr is not None:
            record_ptr = next_ptr
            next_ptr = record_of(base_ptr, table_ptr, ahead + step, ahead + step < end, TILES, RECORD_STRIDE)
        copy_tile(at_stage(codes, free), at_stage(key_params, free), value_params.index(free),
                  record_of(base_ptr, None, ahead, True, TILES, RECORD_STRIDE) if table_ptr is None else record_ptr,
                  ahead % TILES, ahead < end, DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS,
                  VALUE_PARAMS, BOOST_CODES)  # fmt: skip
        if draws_ptr is not None:
            drawn = gl.max(asked, axis=0)  # before the next is asked for: it may take the register
            asked = draw(draws_ptr, (turn + 1 >= own) & (ahead < end))
        words, key_scales, key_zeros, value_scales = (), (), (), ()
        for i in gl.static_range(len(SPANS)):
            words = words + (load_words(codes[i].index(stage), SPANS[i][1], KEY_NBITS, VALUE_NBITS),)
        for i in gl.static_range(len(SPANS)):
            key_scale, key_zero = load_key_params(key_params[i].index(stage), SPANS[i][1], KEY_GROUPS)
            key_scales, key_zeros = key_scales + (key_scale,), key_zeros + (key_zero,)
        lines = value_params.index(stage).reshape([2 * GROUPS, 4, TILE // 4])
        value_zero = lines.slice(0, GROUPS).load(gl.SliceLayout(0, ZERO_ROWS))
        for i in gl.static_range(len(SPANS)):
            share = lines.slice(GROUPS + SPANS[i][2], SPANS[i][3])
            value_scales = value_scales + (share.load(ONCE if WIDE else share_layout(SPANS[i][3], TILE // 4)),)
        if BOOST_CODES > 0:
            BOOST_SHAPE: gl.constexpr = words_shape(BOOSTED, BOOST)
            boost_words = codes[len(SPANS)].index(stage).reshape(BOOST_SHAPE).load(words_layout(BOOST_SHAPE))
            boost_scale = key_params[0].index(stage).reshape([2 * DIM // BOOSTED, 4, BOOSTED // 4])
            boost_scale = boost_scale.slice(0, 1).load(share_layout(1, BOOSTED // 4))
        largest = largest_scale_of(value_scales)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        margin = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) - 134, 0).to(gl.float32)  # scales from 2**8 on

        # ---- scores: codes, and the zeros' product, the same for every token of a group
        start = gl.zeros([KEY_GROUPS, 16, 8], gl.float32, MMA)
        for i in gl.static_range(len(SPANS)):
            start = mma_v2(repeated_rows(key_zeros[i]), group_queries[i], start)
        start = start * 2.0 ** (KEY_ROOM - 25)
        start = gl.convert_layout(repeat(start, TILE // KEY_GROUPS // 16, 1), MMA, assert_trivial=True)
        score = gl.zeros([KEY_GROUPS, TILE // KEY_GROUPS, 8], gl.float32, MMA)
        if BOOST_CODES > 0:
            key_scale = gl.convert_layout(operand_order(boost_scale), gl.SliceLayout(2, COLUMNS), assert_trivial=True)
            wide, key_scale = gl.broadcast(boosted_query, key_scale[:, :, None])
            rows = code_rows(boost_words, "key", 1, BOOSTED, BOOST)
            if SHARED:
                score = mma_v2(rows, product_or_rest(wide, key_scale, gl.broadcast(boosted_part, wide)[0]), score)
            else:
                rest = product_or_rest(wide, key_scale, gl.full(wide.shape, -1.0, gl.float16, COLUMNS))
                score = mma_v2(rows, wide * key_scale, mma_v2(rows, rest, score))
            if token_in_byte(BOOSTED, BOOST):
                score = undo_token(score, BOOST)
        if WIDE:
            scaled = ()
            for i in gl.static_range(len(SPANS)):
                scaled = scaled + (queries[i] * up_halves[i],)
        for i in gl.static_range(
            len(SPANS) - 1 if NARROW_KEYS else 0, -1 if NARROW_KEYS else len(SPANS), -1 if NARROW_KEYS else 1
        ):
            key_scale = gl.convert_layout(
                operand_order(key_scales[i]), gl.SliceLayout(2, COLUMNS), assert_trivial=True
            )[:, :, None]
            wide, key_scale = gl.broadcast(scaled[i], key_scale)
            rows = code_rows(words[i][0], "key", KEY_GROUPS, SPANS[i][1], KEY_NBITS)
            if SHARED:
                score = mma_v2(rows, product_or_rest(wide, key_scale, gl.broadcast(parts[i], wide)[0]), score)
            else:
                rest = product_or_rest(wide, key_scale, gl.full(wide.shape, -1.0, gl.float16, COLUMNS))
                score = mma_v2(rows, wide * key_scale, mma_v2(rows, rest, score))
            if token_in_byte(SPANS[i][1], KEY_NBITS):  # the first, of which the others' products go on
                score = undo_token(score, KEY_NBITS)
        if SHARED:
            score += swap_halves(score)
        score += start  # of columns n and n ^ 4 that are added, only n's: the other is nobody's
        score = gl.convert_layout(score.reshape([1, TILE, 8]), MMA, assert_trivial=True)
        score, score_factor = capped(score, packed_factor, softcap)
        if window is not None:  # exact tokens are newer than all that leave it
            token = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
            within = SINK + tile * TILE + token >= length - window
            score = gl.where(gl.broadcast(within, score)[0], score, float("-inf"))
        weight, alpha, peak = softmax_step(score, score_factor, peak, margin)

        # ---- values: sums of p * zero and p, then the codes
        if WIDE:
            value_scales = (lines.slice(GROUPS, GROUPS).load(share_layout(GROUPS, TILE // 4)),)
        value_zero = gl.broadcast(value_zero[None, :, :, :], gl.zeros(ZERO_SHAPE, gl.float16, ZERO_ROWS))[0]
        zero_rows = gl.join(value_zero, gl.full(ZERO_SHAPE, 1.0, gl.float16, ZERO_ROWS))
        zero_rows = zero_rows.reshape([8, 4, TILE // 16, 2, 2, 2]).permute([5, 0, 2, 3, 1, 4]).reshape([1, 16, TILE])
        zero_rows = gl.convert_layout(zero_rows, ROWS, assert_trivial=True)
        sums = rescale_add(sums, alpha, mma_v2(zero_rows, weight, gl.zeros([1, 16, 8], gl.float32, MMA)))
        new_acc = ()
        for i in gl.static_range(len(SPANS)):
            value_scale = gl.convert_layout(
                operand_order(value_scales[i]), gl.SliceLayout(2, COLUMNS), assert_trivial=True
            )[:, :, None]
            own_weight = gl.convert_layout(repeat(weight, SPANS[i][3], 0), COLUMNS, assert_trivial=True)
            own_weight, value_scale = gl.broadcast(own_weight, value_scale)
            rows = code_rows(words[i][1], "value", SPANS[i][3], SPANS[i][1], VALUE_NBITS)
            if token_in_byte(SPANS[i][1], VALUE_NBITS):
                fresh = narrow_values(rows, own_weight * value_scale, VALUE_NBITS)
            else:
                fresh = mma_v2(rows, own_weight * value_scale, gl.zeros(acc[i].shape, gl.float32, MMA))
            own_alpha = gl.convert_layout(repeat(alpha, SPANS[i][3], 0), MMA, assert_trivial=True)
            new_acc = new_acc + (rescale_add(acc[i], own_alpha, fresh),)
        acc = new_acc
        if draws_ptr is None:
            tile += step
            ahead += step
        else:
            tile = ahead
            ahead = gl.where(turn < own, ahead + step, own * step + drawn)
            turn += 1
    async_copy.wait_group(0)
    return acc, sums, peak


@gluon.jit
def span_output(
    acc, sums, FIRST: gl.constexpr, FIRST_GROUP: gl.constexpr, VALUE_NBITS: gl.constexpr, BOOST_CODES: gl.constexpr
):
    """What a span's ``acc`` and the sums of p * zero make of the output; the channels before a group, and in it."""
    GROUPS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    PER_HEAD: gl.constexpr = gl.SliceLayout(1, MMA)
    sums_row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    group = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    out = acc * gl.broadcast(power_of_two(24 - VALUE_NBITS * value_places(GROUPS, WIDTH, VALUE_NBITS)), acc)[0]
    for g in gl.static_range(GROUPS):
        zeros = gl.convert_layout(gl.sum(gl.where(sums_row == FIRST_GROUP + g, sums, 0.0), axis=1), PER_HEAD)[
            :, None, :
        ]
        if BOOST_CODES > 0:  # they are sums of p * scale
            zeros = zeros * (-0.5 * ((1 << VALUE_NBITS) - 1))
        out += gl.where(group == g, zeros, 0.0)
    return out, group * WIDTH, channel + FIRST


@gluon.jit
def attend_part(
    query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, partial_ptr, lse_ptr, codes, key_params, value_params,
    block, slot, first, step, end, first_chunk, step_chunk, end_chunk, length, packed, num_slots, num_records,
    scale_log2, stride_qb, stride_qh, num_queries, stride_ql, new, table_ptr, draws_ptr, out_ptr, pages, order_ptr,
    sinks_ptr, softcap, window, begins,
    NUM_HEADS: gl.constexpr, Q_PER_KV: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, KEY_NBITS: gl.constexpr,
    VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr, VALUE_GROUPS: gl.constexpr, RECORD: gl.constexpr,
    SINK: gl.constexpr, RESIDUAL: gl.constexpr, KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr,
    RECORD_WORDS: gl.constexpr, BEGUN: gl.constexpr, EARLY: gl.constexpr, AT_ONCE: gl.constexpr, STAGES: gl.constexpr,
    PAGE: gl.constexpr, BOOST_CODES: gl.constexpr,
):  # fmt: skip
    """Some tokens of one row, for one block of query heads: ``(out, lse)`` to place ``slot``; all of them where
    ``out_ptr`` is given, and the result to there.

    ``begins``: whether it has the row's first tokens, and with them the sinks.
    Several queries a row: a block's columns are some of its ``num_queries * Q_PER_KV`` (query, head)s."""
    blocks = ((1 if num_queries is None else num_queries) * Q_PER_KV + HEADS - 1) // HEADS
    SHARED: gl.constexpr = HEADS <= 4  # columns 4..7 are free for the low parts
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    PER_HEAD: gl.constexpr = gl.SliceLayout(1, MMA)
    row = (block // (NUM_HEADS * blocks)).to(gl.int64)
    head = block // blocks % NUM_HEADS
    first_head = block % blocks * HEADS
    if table_ptr is None:
        base_ptr = records_ptr + (row * num_records * NUM_HEADS + head) * RECORD_WORDS
    else:
        base_ptr = records_ptr + head * RECORD_WORDS
        table_ptr += row * num_records
    if BOOST_CODES > 0:
        order_ptr += (row * NUM_HEADS + head) * DIM
    if PAGE == 0:
        slots = (row * NUM_HEADS + head) * num_slots * DIM
        exact_key_ptr += slots
        exact_value_ptr += slots
    else:  # of this row and head: its table, strides from page to page and token to token
        exact_key_ptr += head.to(gl.int64) * pages[2]
        exact_value_ptr += head.to(gl.int64) * pages[5]
        pages = (pages[0] + row * pages[7], pages[1], pages[2], pages[3], pages[4], pages[5], pages[6], pages[7])
    n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
    if SHARED:
        n = n & 3
    real = (n < HEADS) & (first_head + n < Q_PER_KV)
    column = (head * Q_PER_KV + first_head + n) * stride_qh
    newest = None
    if num_queries is not None:
        member = first_head + n
        real = (n < HEADS) & (member < num_queries * Q_PER_KV)
        column = (head * Q_PER_KV + member % Q_PER_KV) * stride_qh + member // Q_PER_KV * stride_ql
    if new is not None:
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
        position = (first_head + (n & 3 if SHARED else n)) // Q_PER_KV
        since = num_queries - gl.load(new[2] + row)
        newest = (new[0] + row * new[3] + head * new[4], new[1] + row * new[6] + head * new[7], new[5], new[8],
                 num_queries, since, position, (first_head + HEADS - 1) // Q_PER_KV)  # fmt: skip
    sink = None
    if sinks_ptr is not None:
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, PER_HEAD))[None, :]
        member = first_head + (n & 3 if SHARED else n)
        seen = (member < (1 if num_queries is None else num_queries) * Q_PER_KV) & begins
        sink = gl.load(sinks_ptr + head * Q_PER_KV + member % Q_PER_KV, mask=seen, other=0.0).to(gl.float32)
        sink = gl.where(seen, sink * (TWICE_LOG2E / 2), HIDDEN)
    acc, sums, peak = attend_split(
        query_ptr + row * stride_qb, base_ptr, exact_key_ptr, exact_value_ptr, codes, key_params, value_params, first,
        step, end, first_chunk, step_chunk, end_chunk, length, packed, num_slots, scale_log2, column, real, newest,
        table_ptr, draws_ptr, pages, order_ptr, sink, softcap, window, DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS,
        VALUE_GROUPS,
        RECORD,
        KEY_PARAMS, VALUE_PARAMS, NUM_HEADS * RECORD_WORDS, SINK, RESIDUAL, SHARED, BEGUN, EARLY, AT_ONCE, STAGES,
        PAGE, BOOST_CODES,
    )  # fmt: skip

    # ---- (out, lse); where no token was seen, zero and HIDDEN
    sums_row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    total = gl.convert_layout(gl.sum(gl.where(sums_row == 8, sums, 0.0), axis=1), PER_HEAD)  # [1, 8]
    saw = total != 0
    if new is not None:  # queries that are padding see nothing
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, PER_HEAD))[None, :]
        saw = saw & ((first_head + (n & 3 if SHARED else n)) // Q_PER_KV >= num_queries - gl.load(new[2] + row))
    inverse = gl.where(saw, 1.0 / gl.where(saw, total, 1.0), 0.0)
    for i in gl.static_range(len(SPANS)):
        out, first_channel, channel = span_output(acc[i], sums, SPANS[i][0], SPANS[i][2], VALUE_NBITS, BOOST_CODES)
        out = out * inverse[:, None, :]
        if new is not None:
            out = gl.where(gl.broadcast(saw[:, None, :], out)[0], out, 0.0)
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, PER_HEAD))[None, :]
        if out_ptr is not None:
            at = ((row * NUM_HEADS + head) * Q_PER_KV + first_head + n)[:, None, :] * DIM + first_channel + channel
            mask = gl.broadcast(((n < HEADS) & (first_head + n < Q_PER_KV))[:, None, :], out)[0]
            gl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            at = slot * HEADS + n
            mask = gl.broadcast((n < HEADS)[:, None, :], out)[0]
            gl.store(partial_ptr + at[:, None, :] * DIM + first_channel + channel, out, mask=mask)
    if out_ptr is None:
        lse = gl.where(saw, peak - HEADROOM + gl.log2(gl.where(saw, total, 1.0)), HIDDEN)
        gl.store(lse_ptr + at, lse, mask=n < HEADS)


@gluon.constexpr_function
def parts_shape(heads, dim):
    """``(parts, heads, dim)`` that a program merges at a time."""
    heads = 1 << (heads - 1).bit_length()
    return max(2, min(16, 4096 // (heads * dim))), heads, dim


@gluon.constexpr_function
def parts_layout(heads, dim):
    """``[parts, heads, dim]``: 16 bytes a lane along the channels, what lanes are left over heads, then parts."""
    channels = min(32, dim // 4)
    over = min(32 // channels, heads)
    return gl.BlockedLayout([1, 1, 4], [32 // channels // over, over, channels], [1, 1, 1], [2, 1, 0])


@gluon.jit
def merge_parts(partial_ptr, lse_ptr, arrivals_ptr, draws_ptr, out_ptr, block, first_query_head, num_heads, num_parts,
                HEADS: gl.constexpr, DIM: gl.constexpr):  # fmt: skip
    """What :func:`combine_kernel` does, by the last program of a block to come; it leaves the block's count at zero."""
    barrier()  # every lane's part is written before one counts it
    if gl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        gl.store(arrivals_ptr + block, 0)
        if draws_ptr is not None:
            gl.store(draws_ptr + block, 0)
        CHANNELS: gl.constexpr = padded(DIM)
        SHAPE: gl.constexpr = parts_shape(HEADS, CHANNELS)
        PARTS: gl.constexpr = SHAPE[0]
        PADDED: gl.constexpr = SHAPE[1]
        ALL: gl.constexpr = parts_layout(PADDED, CHANNELS)
        EACH: gl.constexpr = gl.SliceLayout(2, ALL)
        PER_HEAD: gl.constexpr = gl.SliceLayout(0, EACH)
        s = gl.arange(0, PARTS, layout=gl.SliceLayout(1, EACH))[:, None]
        n = gl.arange(0, PADDED, layout=PER_HEAD)
        d = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, None, :]
        peak = gl.full([PADDED], HIDDEN, gl.float32, PER_HEAD)
        total = gl.zeros([PADDED], gl.float32, PER_HEAD)
        out = gl.zeros([PADDED, CHANNELS], gl.float32, gl.SliceLayout(0, ALL))
        for begin in range(0, num_parts, PARTS):
            at, wanted = gl.broadcast(
                (block * num_parts + begin + s) * HEADS + n[None, :], (begin + s < num_parts) & (n < HEADS)[None, :]
            )
            lse = gl.load(lse_ptr + at, mask=wanted, other=HIDDEN, cache_modifier=".cg")
            at, wanted = gl.broadcast(at[:, :, None] * DIM + d, wanted[:, :, None])
            if CHANNELS > DIM:
                wanted = wanted & (d < DIM)
            part = gl.load(partial_ptr + at, mask=wanted, other=0.0, cache_modifier=".cg")
            new_peak = gl.maximum(peak, gl.max(lse, axis=0))
            lse, shift = gl.broadcast(lse, new_peak[None, :])
            weight = gl.where(lse > HIDDEN, gl.exp2(lse - shift), 0.0)
            alpha = gl.exp2(peak - new_peak)
            peak = new_peak
            total = total * alpha + gl.sum(weight, axis=0)
            part, weight = gl.broadcast(part, weight[:, :, None])
            out, alpha = gl.broadcast(
                out, gl.convert_layout(alpha, gl.SliceLayout(1, gl.SliceLayout(0, ALL)), assert_trivial=True)[:, None]
            )
            out = out * alpha + gl.sum(part * weight, axis=0)
        total = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, gl.SliceLayout(0, ALL)))[:, None]
        n = gl.arange(0, PADDED, layout=gl.SliceLayout(1, gl.SliceLayout(0, ALL)))[:, None]
        d = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(0, ALL)))[None, :]
        out, total = gl.broadcast(out, total)
        at, wanted = gl.broadcast((first_query_head + n) * DIM + d, (n < HEADS) & (n < num_heads))
        if CHANNELS > DIM:
            wanted = wanted & (d < DIM)
        gl.store(out_ptr + at, (out / total).to(out_ptr.dtype.element_ty), mask=wanted)


@gluon.jit(do_not_specialize=["num_slots", "num_records", "batch_size", "num_splits", "num_queries"])
def attend_kernel(
    query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, order_ptr, lengths_ptr, packed_ptr, partial_ptr, lse_ptr,
    arrivals_ptr, draws_ptr, out_ptr, sinks_ptr, scale_log2, softcap, window, stride_qb, stride_qh, num_slots,
    num_records,
    batch_size, num_splits,
    num_queries, stride_ql, new_key_ptr, new_value_ptr, counts_ptr, stride_kb, stride_kh, stride_kt, stride_vb,
    stride_vh, stride_vt, table_ptr, exact_table_ptr, num_pages,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt,
    NUM_HEADS: gl.constexpr, Q_PER_KV: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, KEY_NBITS: gl.constexpr,
    VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr, VALUE_GROUPS: gl.constexpr, RECORD: gl.constexpr,
    SINK: gl.constexpr, RESIDUAL: gl.constexpr, KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr,
    RECORD_WORDS: gl.constexpr, BLOCK_B: gl.constexpr, AT_ONCE: gl.constexpr, STAGES: gl.constexpr, SPARE: gl.constexpr,
    EARLY: gl.constexpr, WHOLE: gl.constexpr, PAGE: gl.constexpr, BOOST_CODES: gl.constexpr,
):  # fmt: skip
    """``BLOCK_B`` 0: program (split, block) has every num_splits-th tile and chunk, and the last one of a block merges
    its parts where ``arrivals_ptr`` has a count for each; ``WHOLE``: there is one, and nothing to merge; where
    ``draws_ptr`` has one, the last tiles are drawn (:func:`owned`).  Else all blocks' units lie in one line
    (:func:`units_of`), and each of the programs has an equal share of it, which may span blocks.  ``SPARE``:
    :func:`spare`.

    ``sinks_ptr``: a logit a query head, or None; ``softcap``: in powers of two, or None; ``window``: tokens, or
    None.
    ``num_queries`` and what follows: several queries a row and their fresh tokens, or None.
    ``table_ptr``: for each row ``num_records`` places, or None: records lie row after row.
    ``exact_table_ptr``: for each row ``num_pages`` pages of ``PAGE`` exact tokens, ``num_slots`` of which a row has at
    most; keys (``stride_x``) and values (``stride_y``) lie by strides from page to page, head to head,
    token to token."""
    pages = None
    if PAGE > 0:
        pages = (exact_table_ptr, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, num_pages)
    of_head = ((1 if num_queries is None else num_queries) * Q_PER_KV + HEADS - 1) // HEADS
    blocks = NUM_HEADS * of_head  # of a row
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    STAGE_BITS: gl.constexpr = TILE * (KEY_NBITS if KEY_NBITS > VALUE_NBITS else VALUE_NBITS) * 2  # of a channel
    codes, key_params = (), ()
    for i in gl.static_range(len(SPANS)):
        codes = codes + (gl.allocate_shared_memory(gl.int32, [STAGES, STAGE_BITS * SPANS[i][1] // 32], FLAT),)
    if BOOST_CODES > 0:
        BOOST_WORDS: gl.constexpr = TILE * boosted_channels(DIM) * BOOST // 32
        codes = codes + (gl.allocate_shared_memory(gl.int32, [STAGES, BOOST_WORDS], FLAT),)
    for i in gl.static_range(len(SPANS)):
        key_params = key_params + (
            gl.allocate_shared_memory(gl.float16, [STAGES + SPARE, 2 * KEY_GROUPS * SPANS[i][1]], FLAT),
        )
    value_params = gl.allocate_shared_memory(gl.float16, [STAGES, 2 * padded(VALUE_GROUPS) * TILE], FLAT)
    chunks = (num_slots + CHUNK - 1) // CHUNK
    new = None
    if num_queries is not None:
        chunks += (num_queries + CHUNK - 1) // CHUNK
        new = (new_key_ptr, new_value_ptr, counts_ptr, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt)
    if BLOCK_B == 0:
        split = gl.program_id(0)
        block = gl.program_id(1)
        if num_queries is not None:  # neighbours read the same records
            split, block = block, split
        certain = num_records * (RECORD // TILE)
        row_ptr = records_ptr + (block // blocks).to(gl.int64) * num_records * (NUM_HEADS * RECORD_WORDS)
        base_ptr = row_ptr + block // of_head % NUM_HEADS * RECORD_WORDS
        if table_ptr is None:
            copy_first(codes, key_params, value_params, base_ptr, None, split, num_splits, 0, certain, DIM, KEY_NBITS,
                       VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS, VALUE_PARAMS,
                       NUM_HEADS * RECORD_WORDS, STAGES, BOOST_CODES)  # fmt: skip
        if EARLY:
            if num_queries is None and PAGE == 0 and num_splits - 1 - split < chunks:
                lines = gl.minimum(gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0])) * 64, CHUNK * DIM - 1)
                at = gl.minimum((num_splits - 1 - split) * (CHUNK * DIM) + lines, num_slots * DIM - 1)
                at += (block // of_head).to(gl.int64) * num_slots * DIM
                ask_for(exact_key_ptr + at)
                ask_for(exact_value_ptr + at)
            if BOOST_CODES > 0:
                lines = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0])) * (DIM // 32)
                ask_for(order_ptr + (block // of_head).to(gl.int64) * DIM + lines)
            if table_ptr is None:
                tile = split + (STAGES - 1) * num_splits
                if (
                    tile < gl.load(packed_ptr + block // blocks, cache_modifier=".cg") // TILE
                ):  # of before or after that step
                    prefetch(
                        base_ptr + (tile // (RECORD // TILE)).to(gl.int64) * (NUM_HEADS * RECORD_WORDS), RECORD_WORDS
                    )
            gdc_wait()  # for the step that stored the newest token, where this was launched while it ran
            # combine_kernel may take its places on the device while this one runs, and waits there
            gdc_launch_dependents()
        length = gl.load(lengths_ptr + block // blocks)
        packed = gl.load(packed_ptr + block // blocks)
        attend_part(
            query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, partial_ptr, lse_ptr, codes, key_params,
            value_params, block, block * num_splits + split, split, num_splits, packed // TILE, num_splits - 1 - split,
            num_splits, chunks, length, packed, num_slots, num_records, scale_log2, stride_qb, stride_qh, num_queries,
            stride_ql, new, table_ptr, None if draws_ptr is None else draws_ptr + block, out_ptr if WHOLE else None,
            pages, order_ptr, sinks_ptr, softcap, window, split == 0, NUM_HEADS, Q_PER_KV, HEADS, DIM, KEY_NBITS,
            VALUE_NBITS,
            KEY_GROUPS, VALUE_GROUPS, RECORD,
            SINK, RESIDUAL, KEY_PARAMS, VALUE_PARAMS, RECORD_WORDS, table_ptr is None, EARLY, AT_ONCE, STAGES,
            PAGE, BOOST_CODES,
        )  # fmt: skip
        if arrivals_ptr is not None:
            member = block % of_head * HEADS
            merge_parts(
                partial_ptr, lse_ptr, arrivals_ptr, draws_ptr, out_ptr, block, block // of_head * Q_PER_KV + member,
                Q_PER_KV - member, num_splits, HEADS, DIM,
            )  # fmt: skip
    else:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        b = gl.arange(0, BLOCK_B, layout=LANES)
        units = units_of(gl.load(packed_ptr + b, mask=b < batch_size, other=0), chunks) * blocks
        units = gl.where(b < batch_size, units, 0)
        ends = gl.associative_scan(units, 0, add)
        total = gl.sum(units, axis=0)
        share = (total + num_splits - 1) // num_splits
        unit = gl.program_id(0) * share
        end = gl.minimum(unit + share, total)
        while unit < end:
            row = gl.sum((ends <= unit).to(gl.int32), axis=0)
            length = gl.load(lengths_ptr + row)
            packed = gl.load(packed_ptr + row)
            own = units_of(packed, chunks)
            inside = unit - gl.sum(gl.where(b < row, units, 0), axis=0)
            block = row * blocks + inside // own
            start = inside % own
            stop = gl.minimum(own, start + end - unit)
            exact = EXACT_UNITS * chunks
            first = gl.maximum(start - exact, 0)
            last = gl.maximum(stop - exact, 0)
            attend_part(
                query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, partial_ptr, lse_ptr, codes, key_params,
                value_params, block, gl.program_id(0) + block, first, 1, last, (start + EXACT_UNITS - 1) // EXACT_UNITS,
                1, (gl.minimum(stop, exact) + EXACT_UNITS - 1) // EXACT_UNITS, length, packed, num_slots, num_records,
                scale_log2, stride_qb, stride_qh, num_queries, stride_ql, new, table_ptr, None, None, pages, order_ptr,
                sinks_ptr, softcap, window, start == 0, NUM_HEADS, Q_PER_KV, HEADS, DIM, KEY_NBITS, VALUE_NBITS,
                KEY_GROUPS, VALUE_GROUPS, RECORD, SINK, RESIDUAL, KEY_PARAMS, VALUE_PARAMS, RECORD_WORDS, False, EARLY,
                AT_ONCE, STAGES, PAGE, BOOST_CODES,
            )  # fmt: skip
            unit += stop - start


@triton.jit
def weighed_at_once(partial_ptr, lse_ptr, first, parts, d, HEADS: tl.constexpr, DIM: tl.constexpr,
                    BLOCK_S: tl.constexpr):  # fmt: skip
    """Parts merged, of which a program has all channels ``d``: all their weights are known before the first is read, so
    that threads have sums of their own until the end."""
    peak = tl.full([], HIDDEN, tl.float32)
    total = tl.zeros([], tl.float32)
    for begin in range(0, parts, MAX_PARTS_AT_ONCE):
        s = begin + tl.arange(0, MAX_PARTS_AT_ONCE)
        lse = tl.load(lse_ptr + first + s * HEADS, mask=s < parts, other=HIDDEN)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.where(lse > HIDDEN, tl.exp2(lse - new_peak), 0.0), 0)
        peak = new_peak
    summed = tl.zeros([BLOCK_S, d.shape[0]], tl.float32)
    s = tl.arange(0, BLOCK_S)
    at = first + s * HEADS
    lse = tl.load(lse_ptr + at, mask=s < parts, other=HIDDEN)
    part = tl.load(partial_ptr + at[:, None] * DIM + d[None, :], mask=(s < parts)[:, None], other=0.0)
    for begin in range(0, parts, BLOCK_S):
        s = begin + BLOCK_S + tl.arange(0, BLOCK_S)
        at = first + s * HEADS
        next_lse = tl.load(lse_ptr + at, mask=s < parts, other=HIDDEN)
        next_part = tl.load(partial_ptr + at[:, None] * DIM + d[None, :], mask=(s < parts)[:, None], other=0.0)
        weight = tl.where(lse > HIDDEN, tl.exp2(lse - peak), 0.0)
        summed += part * weight[:, None]
        lse = next_lse
        part = next_part
    return tl.sum(summed, 0) / tl.where(total > 0, total, 1.0)


@triton.jit(do_not_specialize=["chunks", "batch_size", "num_splits", "num_queries"])
def combine_kernel(partial_ptr, lse_ptr, packed_ptr, draws_ptr, out_ptr, chunks, batch_size, num_splits, num_queries,
                   NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                   BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
                   ROTATION: tl.constexpr):  # fmt: skip
    """Merge one query head's parts: ``out = sum_s 2**(lse_s - max) out_s / sum_s 2**(lse_s - max)``; with ``ROTATION``,
    which ``BLOCK_D`` then is, rotated."""
    blocks = ((1 if num_queries is None else num_queries) * Q_PER_KV + HEADS - 1) // HEADS
    query_head = tl.program_id(0)
    if num_queries is None:
        member = query_head % Q_PER_KV
        block = query_head // Q_PER_KV * blocks + member // HEADS
    else:  # numbered as the columns are: heads of one query, then the next query
        group = query_head // (num_queries * Q_PER_KV)
        member = query_head % (num_queries * Q_PER_KV)
        block = group * blocks + member // HEADS
        query_head = (group * Q_PER_KV + member % Q_PER_KV) * num_queries + member // Q_PER_KV
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if BLOCK_B == 0:
        slot = block * num_splits
        parts = num_splits
    else:  # the programs whose shares reach into this block
        b = tl.arange(0, BLOCK_B)
        units = units_of(tl.load(packed_ptr + b, mask=b < batch_size, other=0), chunks)
        units = tl.where(b < batch_size, units, 0)
        row = block // (NUM_HEADS * blocks)
        own = tl.sum(tl.where(b == row, units, 0), 0)
        start = tl.sum(tl.where(b < row, units, 0), 0) * (NUM_HEADS * blocks) + block % (NUM_HEADS * blocks) * own
        share = (tl.sum(units, 0) * (NUM_HEADS * blocks) + num_splits - 1) // num_splits
        slot = start // share + block
        parts = (start + own - 1) // share - start // share + 1
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if draws_ptr is not None:  # left as they were found
        if (tl.program_id(1) == 0) & (member % HEADS == 0):
            tl.store(draws_ptr + block, 0)
    if ROTATION > 0:
        out = weighed_at_once(partial_ptr, lse_ptr, slot * HEADS + member % HEADS, parts, d, HEADS, DIM, BLOCK_S)
    else:
        peak = tl.full([], HIDDEN, tl.float32)
        total = tl.zeros([], tl.float32)
        out = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, parts, BLOCK_S):
            s = begin + tl.arange(0, BLOCK_S)
            at = (slot + s) * HEADS + member % HEADS
            part = tl.load(partial_ptr + at[:, None] * DIM + d[None, :], mask=(s < parts)[:, None], other=0.0)
            lse = tl.load(lse_ptr + at, mask=s < parts, other=HIDDEN)
            new_peak = tl.maximum(peak, tl.max(lse, 0))
            weight = tl.where(lse > HIDDEN, tl.exp2(lse - new_peak), 0.0)
            alpha = tl.exp2(peak - new_peak)
            peak = new_peak
            total = total * alpha + tl.sum(weight, 0)
            out = out * alpha + tl.sum(part * weight[:, None], 0)
        out = out / tl.where(total > 0, total, 1.0)
    if ROTATION > 0:
        out = rotate_rows(out.reshape((1, BLOCK_D)), 1, BLOCK_D, ROTATION).reshape((BLOCK_D,))
    tl.store(out_ptr + query_head * DIM + d, out.to(out_ptr.dtype.element_ty))


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    *,
    num_splits: int | None = None,
    equal_shares: bool = False,
    num_tokens: int | None = None,
    arrivals: Tensor | None = None,
    early: bool = True,
    out: Tensor | None = None,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention over everything a layer stores; tensors as :func:`kvruntime.methods.kivi.reference.attend` has them.

    For what :func:`supports` allows: one query a row, or up to ``MAX_QUERIES`` that bring ``fresh`` tokens.
    ``lengths``, ``packed`` and the counts are int32 and stay on the device.  Every row is cut into ``num_splits``
    splits (default: the plan's, for rows of ``num_tokens`` or of what the buffers provide for).  ``equal_shares``: all
    rows' tokens lie in one line instead, and each of ``num_splits`` programs has an equal share of it, for heads of up
    to 128 channels and up to ``MAX_ROWS`` rows of very different lengths.  ``arrivals``: int32 zeros, two a query head
    of a row at least, which no other call uses at the same time: then, where a row has one query, programs share out
    the end of long rows as they come to it, and one launch does it all where splits are few.

    ``out [batch_size, num_q_heads, L, value_dim]``: where the output goes, contiguous; None: to a tensor of its own.

    ``early``: from compute capability 9.0 on this is launched while what runs before it on the stream still ends, and
    waits for that before it reads what that may have written, but for one thing: without a block table a program asks
    for its first tiles at once, and asks again for those of the record that ``step`` packs last.  Hence the
    precondition: a kernel before it that lets its dependents start before it ends
    (``griddepcontrol.launch_dependents``) packs into the rows' own records nothing but each row's newest one, as
    ``step`` does.  Kernels that never do, and those over a pool, are always safe; for others give ``early=False``.
    """
    record, sink, residual = layout
    if not supports(record, query, fresh, starts):
        queries = "a line of queries" if starts is not None else f"{query.shape[2]} queries"
        raise ValueError(f"{record} with {queries} of {query.dtype}: see supports()")
    if scores.window is not None and (fresh is not None or residual > scores.window):
        raise ValueError(f"a window of {scores.window}: allowed is one query a row, and no fewer than the residual")
    batch_size, q_heads, length, dim = query.shape
    heads = stored.exact_key.shape[1]
    where = places(stored, layout)
    num_slots, num_records, block_table = where.num_slots, where.num_records, where.block_table
    query = query if query.stride(3) == 1 else query.contiguous()
    num_queries = None if fresh is None else length
    fixed = constants(record, sink, residual, heads, q_heads // heads, num_queries)
    chunks = -(-num_slots // CHUNK.value)
    new: tuple[Any, ...] = (None,) * 9
    if fresh is not None:
        key, value = (x if x.stride(3) == 1 else x.contiguous() for x in fresh[:2])
        if record.rotation:
            value = rotated(value, record.rotation)
        new = (key, value, fresh[2], *key.stride()[:3], *value.stride()[:3])
        chunks += -(-length // CHUNK.value)
    if not chunks:  # nothing is provided for, nothing is held
        return query.new_zeros(batch_size, q_heads, length, dim) if out is None else out.zero_()
    blocks = heads * -(-fixed["Q_PER_KV"] * length // fixed["HEADS"])
    properties = torch.cuda.get_device_properties(query.device)
    sms = properties.multi_processor_count
    block_b = (
        max(32, triton.next_power_of_2(batch_size)) if equal_shares and dim <= 128 and batch_size <= MAX_ROWS else 0
    )
    splits = num_splits
    provided = num_records * record.num_tokens
    longest = provided if num_tokens is None else min(provided, num_tokens)
    if splits is None and block_b:
        splits = PROGRAMS_PER_SM[dim] * sms
    elif splits is None:
        splits = plan_splits(batch_size * blocks, longest // TILE.value + chunks, programs_per_sm(fixed), sms)
    early = early and properties.major >= 9
    draws, count = None, batch_size * blocks
    whole = splits == 1 and fresh is None and not block_b and not record.rotation
    if fresh is not None or block_b or whole or (arrivals is not None and arrivals.numel() < 2 * count):
        arrivals = None
    if arrivals is not None:
        if block_table is None and dim <= 128 and longest // TILE.value // splits > DRAWN.value:
            draws = arrivals[count : 2 * count]
        own = merges(splits, count, fixed["HEADS"] * dim, sms) and not record.rotation  # combine_kernel rotates
        arrivals = arrivals[:count] if own else None
    slots = batch_size * blocks + splits if block_b else 0 if whole else batch_size * blocks * splits
    partial = query.new_empty(slots, fixed["HEADS"], dim, dtype=torch.float32)
    lse = query.new_empty(slots, fixed["HEADS"], dtype=torch.float32)
    if out is None:
        out = query.new_empty(batch_size, q_heads, length, dim)
    grid = (splits, batch_size * blocks) if num_queries is None else (batch_size * blocks, splits)
    launch_kernel(
        attend_kernel, (splits,) if block_b else grid, query, stored.records, stored.exact_key, stored.exact_value,
        stored.key_order, stored.lengths, stored.packed,
        partial, lse, arrivals, draws, out, scores.sinks, scale * merge.LOG2E, scores.softcap_log2, scores.window,
        *query.stride()[:2], num_slots, num_records, batch_size, splits, num_queries,
        None if num_queries is None else query.stride(2), *new, block_table, where.exact_table, where.num_pages,
        *where.strides,
        **fixed, BLOCK_B=block_b, AT_ONCE=batch_size == 1 and not where.page, STAGES=STAGES, PAGE=where.page,
        SPARE=spare(fixed, properties.shared_memory_per_multiprocessor), EARLY=early, WHOLE=whole,
        enable_fp_fusion=True, num_warps=1,
        maxnreg=MAX_REGISTERS[dim] if fresh is None else REGISTERS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    if arrivals is not None or whole:
        return out
    parts = splits // (batch_size * blocks) + 2 if block_b else splits
    block_s, block_d, warps = plan_merge(parts, dim, record.rotation)
    launch_kernel(
        combine_kernel, (batch_size * q_heads * length, dim // block_d), partial, lse, stored.packed, draws, out,
        chunks, batch_size, splits, num_queries, NUM_HEADS=heads,
        Q_PER_KV=fixed["Q_PER_KV"], HEADS=fixed["HEADS"], DIM=dim, BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_S=block_s,
        EARLY=early, ROTATION=record.rotation,
        enable_fp_fusion=merge.FUSED_MERGE, num_warps=warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
