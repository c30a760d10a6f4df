"""Gluon: operands and accumulators of the products of :mod:`kvruntime.methods.kivi.fast`.

Layouts of the matrix unit, codes masked out of their words as float16 subnormals, queries scaled so that a code's place
in its byte is undone, and the steps of a softmax that goes along a row.
"""

import math

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvruntime.kernels import merge
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.fast_plan import TILE
from kvsim.methods import packing

NEW_API = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # Triton 3.9
CHUNK = gl.constexpr(16)
HIDDEN = gl.constexpr(-1.0e30)
TWICE_LOG2E = gl.constexpr(2 * merge.LOG2E)
HEADROOM = gl.constexpr(8.0)
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


@triton.jit
def add(a, b):
    return a + b


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
