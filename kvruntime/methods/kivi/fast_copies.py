"""Gluon: copies of packed tiles to shared memory, ahead of the products of :mod:`kvruntime.methods.kivi.fast`.

A tile is ``TILE`` tokens of a record: codes of keys and values, their scales and zeros.  Which tiles a split owns, and
which are drawn by whoever comes first, is here too.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kvruntime.methods.kivi.fast_operands import BOOST, boosted_channels, line_layout, spans
from kvruntime.methods.kivi.fast_plan import TILE, padded

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.9, before it
DRAWN = gl.constexpr(8)
"""One tile in so many of a long row is nobody's own."""


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
              KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr, BOOST_CODES: gl.constexpr,
              CENTERED: gl.constexpr):  # fmt: skip
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
    if CENTERED:  # no zeros: the scales stand for them
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
               STAGES: gl.constexpr, BOOST_CODES: gl.constexpr, CENTERED: gl.constexpr):  # fmt: skip
    """Start copying the first tiles of a split, ``least`` and above: fewer than ``certain`` may be read."""
    TILES: gl.constexpr = RECORD // TILE
    for index in gl.static_range(STAGES - 1):
        tile = first + index * step
        if tile >= least:
            copy_tile(at_stage(codes, index), at_stage(key_params, index), value_params.index(index),
                      record_of(base_ptr, table_ptr, tile, tile < certain, TILES, RECORD_STRIDE), tile % TILES,
                      tile < certain, DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS,
                      VALUE_PARAMS, BOOST_CODES, CENTERED)  # fmt: skip


@triton.jit
def owned(tiles, num_splits):
    """Tiles that are a split's own; the rest is drawn, tile after tile, by whoever comes first: memory serves some
    multiprocessors better than others."""
    each = tiles // num_splits
    return tl.maximum(each - each // DRAWN, 3)
