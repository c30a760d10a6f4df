"""Gluon: attention over tokens that are kept exactly, 16 slots a step, for :mod:`kvruntime.methods.kivi.fast`.

Slots are a row's own (the sink's, then the ring's), a pool's by a block table, or those of fresh tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvruntime.methods.kivi.fast_operands import (
    CHUNK,
    COLUMNS,
    MMA,
    ROWS,
    capped,
    power_of_two,
    repeat,
    rescale_add,
    rows_layout,
    softmax_step,
    spans,
    swap_halves,
    to_half,
    value_places,
)


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
