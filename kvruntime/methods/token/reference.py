"""Tokens coded one by one in plain PyTorch: the meaning of the kernels, and the product on machines without a GPU.

A head's vector ``x`` of one token becomes codes and one scale (:mod:`kvruntime.methods.token.coding` says which codings
there are), and reads back as ``level(code) * scale``:

* ``int8``, ``e4m3``, ``e5m2``: ``scale = max |x| / largest level``; codes are the nearest levels of ``x / scale``.
* ``int4``: ``scale = (max(x, 0) - min(x, 0)) / 15``, whose lowest four bits are then replaced by the zero point
  ``round(-min(x, 0) / scale)``, rounding the rest up; ``level = code - zero point``, with the scale that is left.
* ``lloyd*``: ``y = H (signs * x)`` with a normalised Hadamard matrix H; codes are the nearest levels of ``y / rms y``.
  ``scale`` is ``rms y``, or with norm correction ``rms y / rms level``, which gives back the vector's own norm.  What
  is read is turned back.

``x`` is clamped to +-``LIMIT`` first.  A vector of zeros has scale 0.  A vector with a NaN has a NaN for its scale and
reads back as NaN throughout.  ``1 / scale`` is rounded to float32 once a vector; ties go to the even code.

Lengths: ``Stored.lengths`` counts what lies in its tensors when a call begins, without what the call brings; the caller
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvruntime.kernels import slot_reference
from kvruntime.kernels.reference import PLAIN, Fresh, Scores, embed, rotated
from kvruntime.kernels.slot_reference import Slots, arriving
from kvruntime.methods.token.coding import (
    LARGEST,
    LIMIT,
    chunks,
    piece_widths,
    planes,
    rotation,
    second_order,
    sections,
)
from kvruntime.methods.token.levels import magnitudes, steps, thresholds

TINY = 2.0**-100
"""Scales below it count as 0: their reciprocals would leave float32."""
ZERO_BITS = 15
"""The bits of an ``int4`` scale that are its zero point."""
SAME_SIZE = {torch.float32: torch.int32, torch.float16: torch.int16}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Layout(NamedTuple):
    """The coding and the channels of keys and of values; ``corrected``: scales with norm correction."""

    key: str
    value: str
    key_dim: int
    value_dim: int
    corrected: bool = True


class Stored(NamedTuple):
    """What a layer holds.

    | tensor | shape |
    |---|---|
    | key_codes, value_codes | [batch_size, num_kv_heads, slots, bytes] uint8: token t in slot t |
    | key_scale, value_scale | [batch_size, num_kv_heads, slots] |
    | lengths | [batch_size] int32: tokens stored |
    | key_signs, value_signs | [dim] int8 of the rotation, or None |
    | key_lookup, value_lookup | [sections * LOOKUP] int32, or None |
    | block_table | [batch_size, num_blocks] int32, or None |

    With a block table the others are pools [pool_size, num_kv_heads, n, ...]: token t of row b lies in slot ``t % n``
    of block ``block_table[b, t // n]``.  Rows may share blocks.  Entries for tokens that a row does not have are not
    looked at.  ``*_lookup``: :func:`kvruntime.methods.token.levels.lookup_table` of each section.
    """

    key_codes: Tensor
    key_scale: Tensor
    value_codes: Tensor
    value_scale: Tensor
    lengths: Tensor
    key_signs: Tensor | None = None
    value_signs: Tensor | None = None
    key_lookup: Tensor | None = None
    value_lookup: Tensor | None = None
    block_table: Tensor | None = None


def sum_of_squares(x: Tensor) -> Tensor:
    """``[...]`` of ``x [..., dim]``: of each power of two of channels neighbours are added until one is left."""
    total = x.new_zeros(x.shape[:-1])
    for first, width in chunks(x.shape[-1]):
        part = x[..., first : first + width].square()
        while part.shape[-1] > 1:
            part = part[..., ::2] + part[..., 1::2]
        total = total + part[..., 0]
    return total


def inverse_of(scale: Tensor) -> Tensor:
    """``1 / scale`` in float32, 0 where the scale counts as none."""
    return torch.where(scale > TINY, 1.0 / scale.float(), 0.0)


def canonical(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` in its stored type; every NaN is one bit pattern."""
    scale = scale.to(dtype)
    return scale.masked_fill(scale.isnan(), torch.nan)


def encode(
    x: Tensor, coding: str, scale_dtype: torch.dtype, signs: Tensor | None = None, corrected: bool = True
) -> tuple[Tensor, Tensor]:
    """``(codes [..., bytes] uint8, scale [...])`` of ``x [..., dim]``."""
    x = torch.where(x.isnan(), torch.nan, x.float().clamp(-LIMIT, LIMIT))
    dim = x.shape[-1]
    if coding.startswith("lloyd"):
        assert signs is not None
        return _encode_lloyd(rotated(x * signs, rotation(coding, dim)), coding, scale_dtype, corrected)
    if coding == "int4":
        return _encode_int4(x, scale_dtype)
    most = x.abs().amax(-1)  # NaN where there is one
    scale = canonical(most / torch.full_like(most, LARGEST[coding]), scale_dtype)
    level = x * inverse_of(scale)[..., None]
    level = torch.where(level.isnan(), 0.0, level).clamp(-LARGEST[coding], LARGEST[coding])
    if coding == "int8":
        return level.round().to(torch.int8).view(torch.uint8), scale
    return level.to(FLOAT8[coding]).view(torch.uint8), scale


def _encode_int4(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1).clamp(max=0.0), x.amax(-1).clamp(min=0.0)
    span = high - low
    scale = canonical(span / torch.full_like(span, 15), scale_dtype)
    bits = scale.view(SAME_SIZE[scale_dtype])
    scale = torch.where(scale.isnan(), bits, bits + ZERO_BITS & ~ZERO_BITS).view(scale_dtype)
    inverse = inverse_of(scale)
    zero = (-low * inverse).round()
    zero = torch.where(zero.isnan(), 0.0, zero).clamp(0, 15)
    level = (x * inverse[..., None]).round()
    code = torch.where(level.isnan(), 0.0, level + zero[..., None]).clamp(0, 15).int()
    bits = scale.view(SAME_SIZE[scale_dtype]) | zero.to(SAME_SIZE[scale_dtype])
    return packed(code, "int4"), bits.view(scale_dtype)


def _encode_lloyd(y: Tensor, coding: str, scale_dtype: torch.dtype, corrected: bool) -> tuple[Tensor, Tensor]:
    dim = y.shape[-1]
    squares = sum_of_squares(y)
    rms = (squares * (1 / dim)).sqrt()
    level = y * inverse_of(rms)[..., None]
    codes = []
    for first, count, nbits, _ in sections(coding, dim):
        part = level[..., first : first + count]
        code = torch.zeros_like(part, dtype=torch.int32)
        for threshold in thresholds(dim, nbits):
            code += part.abs() > threshold
        codes.append(code + (part < 0).int() * (1 << nbits - 1))
    code = torch.cat(codes, -1)
    scale = rms
    if corrected:
        scale = (squares / squares_of_levels(code, coding)).sqrt().clamp(max=LIMIT)
    return packed(code, coding), canonical(scale, scale_dtype)


def squares_of_levels(code: Tensor, coding: str) -> Tensor:
    """The sum of the squares of codes' levels, of each section in whole numbers."""
    total = torch.zeros(code.shape[:-1], device=code.device)
    for first, count, nbits, _ in sections(coding, dim := code.shape[-1]):
        unit, numbers = steps(dim, nbits)
        squares = torch.tensor([(2 * number + 1) ** 2 for number in numbers], device=code.device)
        part = code[..., first : first + count] & (1 << nbits - 1) - 1
        total = total + squares[part].sum(-1).float() * (unit * unit / 4)
    return total


def packed(code: Tensor, coding: str) -> Tensor:
    """Bytes ``[..., num_bytes]`` of codes ``[..., dim]`` (int32)."""
    out = []
    for section in sections(coding, code.shape[-1]):
        part = code[..., section[0] : section[0] + section[1]]
        for bits, low, _ in planes(section):
            shifts = torch.arange(0, 8, bits, device=code.device)
            part = reordered(part, back=False) if low else part
            field = (part >> low & (1 << bits) - 1).unflatten(-1, (-1, 8 // bits))
            out.append((field << shifts).sum(-1).to(torch.uint8))
    return torch.cat(out, -1)


def unpacked(codes: Tensor, coding: str, dim: int) -> Tensor:
    """:func:`packed` read back: codes ``[..., dim]`` int32."""
    out = []
    for section in sections(coding, dim):
        code = torch.zeros(*codes.shape[:-1], section[1], dtype=torch.int32, device=codes.device)
        for bits, low, at in planes(section):
            shifts = torch.arange(0, 8, bits, device=codes.device)
            field = codes[..., at : at + section[1] * bits // 8, None].int() >> shifts & (1 << bits) - 1
            field = field.flatten(-2).int()
            code |= (reordered(field, back=True) if low else field) << low
        out.append(code)
    return torch.cat(out, -1)


def reordered(x: Tensor, back: bool) -> Tensor:
    """Channels ``[..., count]`` of a section in the order of a second plane, or ``back`` from it."""
    out = []
    for part in x.split(piece_widths(x.shape[-1]), -1):
        first, *others = second_order(part.shape[-1])
        if back:
            part = part.unflatten(-1, (*others[:2], first, others[2])).movedim(-2, -4)
        else:
            part = part.unflatten(-1, (first, *others)).movedim(-4, -2)
        out.append(part.flatten(-4))
    return torch.cat(out, -1)


@cache
def table(dim: int, nbits: int, device: torch.device) -> Tensor:
    """The levels of codes 0 to ``2**nbits - 1``, float32."""
    levels = torch.tensor(magnitudes(dim, nbits), device=device)
    return torch.cat((levels, -levels))


def levels_of(code: Tensor, coding: str) -> Tensor:
    """The Lloyd-Max levels of codes ``[..., dim]``, float32."""
    dim = code.shape[-1]
    parts = (
        table(dim, nbits, code.device)[code[..., first : first + count]]
        for first, count, nbits, _ in sections(coding, dim)
    )
    return torch.cat(list(parts), -1)


def decode(codes: Tensor, scale: Tensor, coding: str, dim: int, signs: Tensor | None = None) -> Tensor:
    """:func:`encode` read back: float32 ``[..., dim]``."""
    if coding == "int8":
        level = codes.view(torch.int8).float()
    elif coding in FLOAT8:
        level = codes.view(FLOAT8[coding]).float()
    elif coding == "int4":
        bits = scale.contiguous().view(SAME_SIZE[scale.dtype])
        level = (unpacked(codes, coding, dim) - (bits & ZERO_BITS)[..., None]).float()
        scale = torch.where(scale.isnan(), bits, bits & ~ZERO_BITS).view(scale.dtype)
    else:
        assert signs is not None
        level = levels_of(unpacked(codes, coding, dim), coding)
        return rotated(level * scale.float()[..., None], rotation(coding, dim)) * signs
    return level * scale.float()[..., None]


def slots(stored: Stored, stepped: bool = False) -> Slots:
    """Where its tokens lie, ``stepped`` ones too.  Raises ``ValueError`` for a block table of another shape or type."""
    found = Slots(stored.lengths + 1 if stepped else stored.lengths, stored.key_codes.shape[2], stored.block_table)
    found.check("[pool_size, num_kv_heads, n, ...]")
    return found


def check(stored: Stored) -> None:
    """Raises ``ValueError`` where :func:`slots` does.  Kernels ask at every step: nothing runs on the device."""
    slots(stored)


def append(
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | Tensor | None,
    stored: Stored,
    layout: Layout,
    starts: Tensor | None = None,
) -> None:
    """Store new tokens behind what each row holds: :func:`kvruntime.kernels.slot_reference.arriving` has the shapes."""
    index, slot, new_key, new_value = arriving(key, value, counts, slots(stored), starts)
    for new, coding, codes, scale, signs in (
        (new_key, layout.key, stored.key_codes, stored.key_scale, stored.key_signs),
        (new_value, layout.value, stored.value_codes, stored.value_scale, stored.value_signs),
    ):
        made = encode(new, coding, scale.dtype, signs, layout.corrected)
        codes[index, :, slot], scale[index, :, slot] = made


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stored: Stored,
    layout: Layout,
    positions: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store one token a row, ``value [batch_size, num_kv_heads, 1, value_dim]``.

    :func:`kvruntime.kernels.reference.embed` has the other shapes; ``positions`` may be ``stored.lengths``.
    """
    append(embed(query, key, rotary, positions), value, None, stored, layout)


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    stepped: bool = False,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention over everything a layer stores: :func:`kvruntime.kernels.reference.by_row` has the shapes.

    ``stepped``: each row holds one token more than its length says, which :func:`step` has just stored.
    """

    def decoded(index: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        return read(stored, layout, index, slot)

    shape = stored.key_codes.shape[1], layout.value_dim
    return slot_reference.attend(query, slots(stored, stepped), decoded, *shape, scale, fresh, starts, scores=scores)


def read(stored: Stored, layout: Layout, index: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[batch_size, num_kv_heads, n, dim]`` float32 of the tokens at ``index``, ``slot``."""
    key, value = (
        decode(codes[index, :, slot], scale[index, :, slot], coding, dim, signs).transpose(1, 2)
        for codes, scale, coding, dim, signs in (
            (stored.key_codes, stored.key_scale, layout.key, layout.key_dim, stored.key_signs),
            (stored.value_codes, stored.value_scale, layout.value, layout.value_dim, stored.value_signs),
        )
    )
    return key, value
