"""KIVI in plain PyTorch: the meaning of every kernel, and the product on machines without a GPU.

Quantization (arXiv 2402.02750, asymmetric min/max), for each group ``x`` of finite values::

    zero = float16(min x)    scale = float16((max x - min x) / (2**nbits - 1))
    code = clamp(round_half_even((x - zero) / scale), 0, 2**nbits - 1)          x ~ code * scale + zero

with ``scale`` and ``zero`` as stored, and ``1 / scale`` rounded to float32 once a group.

Outcomes at the edges: values beyond +-``LIMIT`` (infinities too) are clamped to it, so that ``code * scale`` stays
inside float16; a group without range has scale 0 and codes 0 and reads back as its value in float16; a group with a
NaN has scale and zero NaN and reads back as NaN throughout, as 16-bit attention would.  With scales given (frozen
over a sequence) a NaN reads back as the group's zero.

Boosted key channels: a row's key channels are packed in the order of ``key_order``, first the ``record.boosted`` of
the widest range in its first record times the weight that the prompt's queries give them.  Those have codes of
``boost_nbits`` more bits, whose lower bits lie in a plane of their own::

    scale = float16((max x - min x) * 2**boost / (2**(nbits + boost) - 1))
    long code = clamp(round_half_even((x - zero) / scale * 2**boost), 0, 2**(nbits + boost) - 1)

Rotated values: everything of the value side that is stored is rotated (:func:`rotated`), exact tokens too, and
attention's output is rotated back.  A token and head has one scale, and no zero::

    scale = float16(STEPS[nbits] * rms x)         code = clamp(floor(x / scale) + 2**(nbits - 1), 0, 2**nbits - 1)
    x ~ (code - (2**nbits - 1) / 2) * scale

A rotated element is clamped to +-``LIMIT``; a value vector with a NaN reads back as NaN throughout.

Lengths, everywhere: :class:`Stored` counts what lies in its tensors when a call begins.  What a call brings
(``append``'s and ``step``'s tokens, ``attend``'s ``fresh`` ones) is not among them.  ``step`` counts its tokens there
itself, ``append`` leaves that to the caller (:func:`flush_plan` says how many are packed then), and ``attend`` changes
nothing.  An engine whose lengths count this step's tokens already takes those off; what was packed is a function of the
length without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvruntime.kernels.reference import (
    PLAIN,
    Fresh,
    Partial,
    Scores,
    by_row,
    causal,
    embed,
    padded,
    rotated,
    row_counts,
)
from kvsim.methods.kivi import Record
from kvsim.methods.packing import channel_chunks

LIMIT = 32704.0
WEIGHING = 256
"""The prompt's last tokens whose queries say what key channels weigh."""
TOP_WEIGHT = 31
"""Binary places of the largest weight, above which a byte's ``(8 + c % 8) 2**(c // 8)`` ends."""
BLOCK_TOKENS = 1024
STEPS = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
"""Bits -> the step of the uniform quantizer of least squared error, in deviations of a normal variable."""


def group_params(x: Tensor, dim: int, nbits: int) -> tuple[Tensor, Tensor]:
    """``(scale, zero)`` in float16 of groups that lie along ``dim`` of ``x`` (which is reduced)."""
    return range_params(x.amin(dim), x.amax(dim), nbits)


def range_params(low: Tensor, high: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """``(scale, zero)`` in float16 of groups with these least and greatest values."""
    low, high = (x.float().clamp(-LIMIT, LIMIT) for x in (low, high))
    span = high - low  # divided by a tensor: by a number, CUDA multiplies with its rounded reciprocal
    scale = (span / torch.full_like(span, 2**nbits - 1)).half()
    nan = low.isnan()  # written as one bit pattern, so that the words are the same everywhere
    return scale.masked_fill(nan, torch.nan), low.half().masked_fill(nan, torch.nan)


def sequence_params(parts: list[Tensor], nbits: int) -> tuple[Tensor, Tensor]:
    """:func:`group_params` over the tokens of several tensors ``[..., tokens, channels]``, some perhaps without any."""
    parts = [part for part in parts if part.shape[-2]]
    low = torch.stack([part.amin(-2).float() for part in parts]).amin(0)
    high = torch.stack([part.amax(-2).float() for part in parts]).amax(0)
    return range_params(low, high, nbits)


def encode(x: Tensor, scale: Tensor, zero: Tensor, nbits: int) -> Tensor:
    """Codes (int32) of ``x`` under ``scale`` and ``zero``, which broadcast against it."""
    scale, zero = scale.float(), zero.float()
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    level = (x.float().clamp(-LIMIT, LIMIT) - zero) * inverse
    return torch.where(level.isnan(), 0.0, level).clamp(0, 2**nbits - 1).round().int()


def stored_values(value: Tensor, record: Record, dtype: torch.dtype) -> Tensor:
    """Values as a layer stores exact ones: as they are, or rotated and in ``dtype``."""
    if not record.rotation:
        return value
    value = rotated(value, record.rotation).clamp(-LIMIT, LIMIT).to(dtype)
    return value.masked_fill(value.isnan(), torch.nan)  # one bit pattern


def fresh_type(dtype: torch.dtype) -> torch.dtype:
    """The type of fresh values that are rotated: what they are multiplied in."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def channel_weights(query: Tensor, num_kv_heads: int, lengths: Sequence[int] | None = None) -> Tensor:
    """What key channels weigh by a prompt's queries ``[batch_size, num_q_heads, L, key_dim]``.

    ``[batch_size, num_kv_heads, key_dim]`` uint8 ``c``, which stands for ``(8 + c % 8) 2**(c // 8)``: the root mean
    square of a head's queries, in the last ``WEIGHING`` tokens, in proportion to that of its largest channel.
    ``lengths``: row b's real tokens are the last ``lengths[b]``.
    """
    query = query[:, :, -WEIGHING:].nan_to_num(0.0).float().clamp(-LIMIT, LIMIT)
    batch_size, _, length, dim = query.shape
    if lengths is not None:
        counts = torch.tensor(lengths).clamp(max=length).to(query.device, non_blocking=True)
        real = torch.arange(length, device=query.device) >= length - counts[:, None]
        query = query * real[:, None, :, None]
    square = query.square().reshape(batch_size, num_kv_heads, -1, dim).sum(2)
    share = square / square.amax(-1, keepdim=True).clamp(min=1e-30)
    share = share.double().sqrt().float()  # correctly rounded, which PyTorch's float32 root on a CPU is not
    mantissa, exponent = torch.frexp(share * 2.0**TOP_WEIGHT)
    code = (exponent - 4) * 8 + (mantissa * 16).round().long() - 8
    return code.clamp(0, 255).to(torch.uint8)


def channel_order(key: Tensor, boosted: int, weights: Tensor | None = None) -> Tensor:
    """The channels ``[..., key_dim]`` (uint8) in which a row's keys are packed,
    from its first record's ``[..., tokens, key_dim]``.

    The ``boosted`` of the widest range come first (of equals the lower channel), else channels are in their own order.
    ``weights``: :func:`channel_weights`, by which ranges are multiplied.  A NaN counts as 0.
    """
    finite = torch.where(key.isnan(), 0.0, key.float()).clamp(-LIMIT, LIMIT)
    span = finite.amax(-2) - finite.amin(-2)
    if weights is not None:
        code = weights.int()
        span = span * ((8 + code % 8).float() * torch.exp2((code // 8).float()))
    by_range = span.sort(dim=-1, descending=True, stable=True).indices
    first, rest = by_range[..., :boosted], by_range[..., boosted:]
    return torch.cat([first.sort(-1).values, rest.sort(-1).values], -1).to(torch.uint8)


def by_order(key: Tensor, order: Tensor) -> Tensor:
    """``key [..., tokens, key_dim]`` with its channels as ``order [..., key_dim]`` says."""
    return key.gather(-1, order.long().unsqueeze(-2).expand(key.shape))


def boost_factors(record: Record, device: torch.device) -> Tensor:
    """``[key_dim]``: how many long codes a step of the stored scale has, 2**boost_nbits of boosted channels, else 1."""
    channel = torch.arange(record.key_dim, device=device)
    return torch.where(channel < record.boosted, 2.0**record.boost_nbits, 1.0)


def pack_boosted(key: Tensor, record: Record) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(codes, lower bits, scale, zero)`` of key groups ``[..., tokens, key_dim]`` whose channels are in their order.

    The lower bits are those of the first ``record.boosted`` channels.
    """
    factor = boost_factors(record, key.device)
    top = factor * 2**record.key_nbits - 1
    low, high = (x.float().clamp(-LIMIT, LIMIT) for x in (key.amin(-2), key.amax(-2)))
    nan = low.isnan()
    scale = ((high - low) / (top / factor)).half().masked_fill(nan, torch.nan)
    zero = low.half().masked_fill(nan, torch.nan)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0) * factor
    level = (key.float().clamp(-LIMIT, LIMIT) - zero.float().unsqueeze(-2)) * inverse.unsqueeze(-2)
    code = torch.where(level.isnan(), 0.0, level).clamp(0).minimum(top).round().int()
    step = factor.int()
    return code // step, (code % step)[..., : record.boosted], scale, zero


def sum_of_squares(x: Tensor) -> Tensor:
    """Of ``x [..., channels]``, each power-of-two chunk of channels halved and added until one is left:
    as the kernels add."""
    total = torch.zeros_like(x[..., 0])
    for part in x.square().split(channel_chunks(x.shape[-1]), -1):
        while part.shape[-1] > 1:
            first, second = part.chunk(2, -1)
            part = first + second
        total = total + part[..., 0]
    return total


def pack_symmetric(value: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """``(codes, scale [...])`` of rotated values ``[..., channels]``."""
    value = value.float()
    square = sum_of_squares(value) * (1 / value.shape[-1])
    rms = square.double().sqrt().float()  # correctly rounded, which PyTorch's float32 root on a CPU is not
    scale = (rms * STEPS[nbits]).half()
    scale = scale.masked_fill(scale.isnan(), torch.nan)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    level = (value * inverse.unsqueeze(-1)).floor() + 2 ** (nbits - 1)
    return torch.where(level.isnan(), 0.0, level).clamp(0, 2**nbits - 1).int(), scale


def pack_codes(codes: Tensor, record: Record, stream: str) -> Tensor:
    """Codes ``[..., record.num_tokens, dim]`` to words ``[..., tiles * tile_words]`` (int32)."""
    lead, tile = codes.shape[:-2], record.tile
    tiles = codes.reshape(-1, record.num_tokens // tile, tile, codes.shape[-1])
    words = []
    for channel, width, low, _, order in record.orders(stream):
        bits = 32 // order.codes_per_word
        plane = tiles[..., channel : channel + width] >> low & (1 << bits) - 1
        plane = plane.reshape(*tiles.shape[:2], *order.logical_shape).permute(
            0, 1, *(2 + i for i in order.from_logical)
        )
        shift = _shifts(order.codes_per_word, codes.device)
        plane = plane.reshape(*tiles.shape[:2], order.num_words, order.codes_per_word).long() << shift
        words.append(plane.sum(-1))
    packed = torch.cat(words, -1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int().reshape(*lead, -1)


def unpack_codes(words: Tensor, record: Record, stream: str) -> Tensor:
    """Words ``[..., tiles * tile_words]`` to codes ``[..., record.num_tokens, dim]`` (int32)."""
    lead, tile = words.shape[:-1], record.tile
    tiles = words.reshape(-1, record.num_tokens // tile, record.tile_words(stream))
    codes = words.new_zeros(*tiles.shape[:2], tile, record.dim(stream))
    for channel, width, low, offset, order in record.orders(stream):
        bits = 32 // order.codes_per_word
        plane = tiles[..., offset : offset + order.num_words, None] >> _shifts(order.codes_per_word, words.device)
        plane = (plane & (1 << bits) - 1).reshape(*tiles.shape[:2], *order.memory_shape)
        plane = plane.permute(0, 1, *(2 + i for i in order.to_logical)).reshape(*tiles.shape[:2], tile, width)
        codes[..., channel : channel + width] += plane << low
    return codes.reshape(*lead, record.num_tokens, record.dim(stream))


def _shifts(codes_per_word: int, device: torch.device) -> Tensor:
    index = torch.arange(codes_per_word, device=device, dtype=torch.int32)
    return (32 // codes_per_word) * (index >> 1) + 16 * (index & 1)


def _value_param_axes(record: Record) -> tuple[int, ...]:
    return (record.num_tokens // 16, 2, 4, 2, record.num_value_groups)  # ts, kk, c, e, group


def pack_records(
    key: Tensor,
    value: Tensor,
    record: Record,
    key_params: tuple[Tensor, Tensor] | None = None,
    key_order: Tensor | None = None,
) -> Tensor:
    """Quantize and pack whole records.

    ``key [..., n * record.num_tokens, key_dim]`` and ``value`` alike to words ``[..., n, record.num_words]`` (int32).
    ``key_params``: ``(scale, zero)``, each ``[..., key_dim]``, where the record keeps none of its own.  ``key_order
    [..., key_dim]``: of a record with boosted channels.  Values are given as they are stored, rotated where they are.
    """
    lead = key.shape[:-2]
    last = []
    if record.boosted:
        assert key_order is not None
        key = by_order(key, key_order)
    key = key.reshape(*lead, -1, record.num_tokens, record.key_dim)
    value = value.reshape(*lead, -1, record.num_tokens, record.value_dim)
    if record.key_group:
        groups = key.unflatten(-2, (record.num_key_groups, record.key_group))
        if record.boosted:
            key_codes, lower, key_scale, key_zero = pack_boosted(groups, record)
            key_codes = key_codes.flatten(-3, -2)
            last.append(pack_codes(lower.flatten(-3, -2), record, "boost"))
        else:
            key_scale, key_zero = group_params(groups, -2, record.key_nbits)
            key_codes = encode(groups, key_scale.unsqueeze(-2), key_zero.unsqueeze(-2), record.key_nbits).flatten(
                -3, -2
            )
        key_sections = [_words(key_scale.flatten(-2)), _words(key_zero.flatten(-2))]
    else:
        assert key_params is not None
        key_scale, key_zero = (param[..., None, None, :] for param in key_params)
        key_codes = encode(key, key_scale, key_zero, record.key_nbits)
        key_sections = []
    if record.rotation:
        value_codes, scale = pack_symmetric(value, record.value_nbits)
        params: tuple[Tensor, ...] = (scale.unsqueeze(-1),)
    else:
        groups = value.unflatten(-1, (record.num_value_groups, record.value_group))
        params = group_params(groups, -1, record.value_nbits)
        value_codes = encode(groups, params[0].unsqueeze(-1), params[1].unsqueeze(-1), record.value_nbits).flatten(-2)
    # [ts, kk, c, e, group] -> [group, c, ts, kk, e]
    moved = [param.unflatten(-2, _value_param_axes(record)[:4]).movedim((-1, -3), (-5, -4)) for param in params]
    value_sections = [_words(param.flatten(-5)) for param in moved]
    codes = [pack_codes(key_codes, record, "key"), pack_codes(value_codes, record, "value")]
    return torch.cat([*codes, *key_sections, *value_sections, *last], -1)


def _words(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def unpack_records(
    records: Tensor,
    record: Record,
    key_params: tuple[Tensor, Tensor] | None = None,
    key_order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read records back: words ``[..., n, record.num_words]`` to ``(key, value)``, each ``[..., n * num_tokens, dim]``
    in float32, exactly ``code * scale + zero``.  Rotated values stay rotated; key channels are
    in the head's own order."""

    def section(name: str) -> Tensor:
        start = record.offset(name)
        size = next(words for other, _, words in record.sections if other == name)
        return records[..., start : start + size]

    def halves(name: str) -> Tensor:
        return section(name).contiguous().view(torch.float16)

    key = unpack_codes(section("key_codes"), record, "key").float()
    if record.key_group:
        groups = (record.num_key_groups, record.key_group)
        key = key.unflatten(-2, groups)
        scale, zero = (halves(name).unflatten(-1, (groups[0], 1, -1)) for name in ("key_scale", "key_zero"))
        if record.boosted:
            lower = unpack_codes(section("key_boost_codes"), record, "boost").unflatten(-2, groups)
            key[..., : record.boosted] += lower / 2**record.boost_nbits
        key = (key * scale.float() + zero.float()).flatten(-3, -2)
    else:
        assert key_params is not None
        scale, zero = (param[..., None, None, :] for param in key_params)
        key = key * scale.float() + zero.float()
    if record.boosted:
        assert key_order is not None
        key = by_order(key, key_order.long().argsort(-1).unsqueeze(-2).expand(*key.shape[:-2], -1))
    value = unpack_codes(section("value_codes"), record, "value").float()
    if record.rotation:
        value = value - (2**record.value_nbits - 1) / 2
    value = value.unflatten(-1, (record.num_value_groups, record.value_group))
    ts, kk, c, e, group = _value_param_axes(record)
    scale, *zeros = (
        # [group, c, ts, kk, e] -> [ts, kk, c, e, group]
        halves(name)
        .unflatten(-1, (group, c, ts, kk, e))
        .movedim((-5, -4), (-1, -3))
        .flatten(-5, -2)
        .unsqueeze(-1)
        .float()
        for name in (("value_scale",) if record.rotation else ("value_scale", "value_zero"))
    )
    value = value * scale + zeros[0] if zeros else value * scale
    return key.flatten(-3, -2), value.flatten(-2).flatten(-3, -2)


def flush_plan(length: int, packed: int, count: int, record_length: int, sink: int, residual: int) -> int:
    """Tokens in records after ``count`` more: whole records leave the ring while it cannot hold what is unpacked."""
    over = max(0, length + count - sink - packed - residual)
    return packed + -(-over // record_length) * record_length


class Layout(NamedTuple):
    """How a layer's tokens are divided: records of packed ones,
    and the exact ones before (sink) and after (residual)."""

    record: Record
    sink: int
    residual: int


class Stored(NamedTuple):
    """What a layer holds.

    | tensor | shape |
    |---|---|
    | records | [batch_size, num_records, num_kv_heads, record.num_words] int32 |
    | exact_key, exact_value | [batch_size, num_kv_heads, slots, dim]: sink, then a ring of residual slots |
    | lengths, packed | [batch_size] int32: tokens stored, and those of them in records |
    | key_params | [2, batch_size, num_kv_heads, key_dim] float16, or None; written at a row's first flush |
    | key_order | [batch_size, num_kv_heads, key_dim] uint8, or None; of boosted channels, from a row's first flush on |
    | block_table | [batch_size, num_blocks] int32, or None: which record of the pool each packed block of a row is |
    | exact_table | [batch_size, num_pages] int32, or None: which page of the pool each n of a row's tokens lie in |

    With a block table, records are a pool [pool_size, num_kv_heads, record.num_words]: record i of row b is
    ``block_table[b, i]``.  With an exact table, exact tokens are pools [pool_size, num_kv_heads, n, dim] of any strides
    but the last, 1: token t of row b lies in slot ``t % n`` of page ``exact_table[b, t // n]`` while packed <= t <
    length; then there is no sink, no ``key_params`` and no ``key_order``.  Rows may share what lies in a pool.  Entries
    for tokens that a row does not have there are not looked at.
    """

    records: Tensor
    exact_key: Tensor
    exact_value: Tensor
    lengths: Tensor
    packed: Tensor
    key_params: Tensor | None = None
    block_table: Tensor | None = None
    exact_table: Tensor | None = None
    key_order: Tensor | None = None

    def exact(self) -> tuple[Tensor, Tensor]:
        return self.exact_key, self.exact_value


def check(stored: Stored, layout: Layout, batch_size: int) -> None:
    """Raises ``ValueError`` for a table of another shape or type, and for what no pool of exact tokens holds."""
    records, table, pages = stored.records, stored.block_table, stored.exact_table
    if table is not None and (
        table.dtype != torch.int32 or table.shape[:-1] != (batch_size,) or table.dim() != 2 or records.dim() != 3
    ):
        raise ValueError(
            f"block table {list(table.shape)} of {table.dtype} over records {list(records.shape)}: "
            f"expected [{batch_size}, num_blocks] int32 over [pool_size, num_kv_heads, num_words]"
        )
    if pages is None:
        return
    if pages.dtype != torch.int32 or pages.shape[:-1] != (batch_size,) or pages.dim() != 2:
        raise ValueError(
            f"exact table {list(pages.shape)} of {pages.dtype}: expected [{batch_size}, num_pages] int32 over "
            f"[pool_size, num_kv_heads, n, dim]"
        )
    if layout.sink:
        raise ValueError(f"exact tokens in a pool and sink_length {layout.sink}: allowed is 0, a pool keeps no sink")
    if stored.key_params is not None:
        raise ValueError("exact tokens in a pool and key_group_size 'sequence': a row's scales lie in no pool")
    if layout.record.boosted:
        raise ValueError("exact tokens in a pool and boosted keys: a row's order of channels lies in no pool")
    if any(exact.stride(3) != 1 for exact in stored.exact()):
        raise ValueError("a pool of exact tokens whose channels do not lie next to each other")


def records_a_row(stored: Stored) -> int:
    """How many records a row's packed tokens may lie in."""
    return stored.records.shape[1] if stored.block_table is None else stored.block_table.shape[1]


def exact_tokens(exact: Tensor, token: Tensor, layout: Layout, table: Tensor | None) -> Tensor:
    """Tokens ``token [n]`` of rows, ``[rows, num_kv_heads, n, dim]``: ``exact`` are the rows' slots, or the pool where
    there is a ``table`` of the rows."""
    if table is None:
        sink = layout.sink
        return exact[:, :, torch.where(token < sink, token, sink + (token - sink) % layout.residual)]
    size = exact.shape[2]
    return exact[table[:, token // size].long(), :, token % size].transpose(1, 2)


def append(
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | Tensor | None,
    stored: Stored,
    layout: Layout,
    books: tuple[list[int], list[int]] | None = None,
    starts: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Store new tokens: pack what the residual cannot hold, oldest first, then write the rest to their exact slots.

    | tensor | shape |
    |---|---|
    | key, value | [batch_size, num_kv_heads, L, dim]; row b's tokens are the last counts[b] of the L |
    | counts | a number a row; None: all are |
    | books | (lengths, packed) of ``stored`` as the host knows them; None: they are read |
    | starts | [batch_size + 1] int32: key and value are one line [tokens, num_kv_heads, dim], row b's from starts[b] |
    | query | [batch_size, num_q_heads, N, key_dim]: the last N of the L, by which a prompt's channels weigh; or None |

    ``stored.lengths`` and ``packed`` stay as they are.  What is written is a function of the tokens alone: rows that
    share a record or a page write the same words to it.
    """
    record, sink, residual = layout
    batch_size = len(stored.lengths)
    check(stored, layout, batch_size)
    counts = row_counts(counts, starts, batch_size, key.shape[2])
    if starts is not None:
        key, value = padded(key, counts), padded(value, counts)
    lengths, packed = books or (stored.lengths.tolist(), stored.packed.tolist())
    value = stored_values(value, record, stored.exact_value.dtype)
    tables = (stored.block_table, stored.exact_table)
    key_params, key_order = stored.key_params, stored.key_order
    if query is not None and key_order is not None:
        brings = [row for row, count in enumerate(counts) if count]  # others keep theirs
        key_order[brings] = channel_weights(query, key.shape[1], counts)[brings]
    alike: dict[tuple[int, int, int], list[int]] = {}
    for row, state in enumerate(zip(lengths, packed, counts, strict=True)):
        alike.setdefault(state, []).append(row)
    for (length, before, count), same in alike.items():
        if not count:
            continue
        rows: slice | list[int] = slice(None) if len(same) == len(counts) else same
        after = flush_plan(length, before, count, record.num_tokens, sink, residual)
        new = [x[rows, :, x.shape[2] - count :] for x in (key, value)]
        places, pages = (None if table is None else table[rows] for table in tables)
        exact = [x if pages is not None else x[rows] for x in stored.exact()]

        def packing(which: int, first: int, last: int) -> Tensor:
            """The rows' tokens ``first`` to ``last`` after the sink: those that are stored, then new ones."""
            held = min(max(length - sink - first, 0), last - first)  # noqa: B023
            fresh = new[which][:, :, sink + first + held - length : sink + last - length]  # noqa: B023
            if not held:
                return fresh
            token = sink + torch.arange(first, first + held, device=fresh.device)
            return torch.cat([exact_tokens(exact[which], token, layout, pages).to(fresh.dtype), fresh], 2)  # noqa: B023

        if key_params is not None and after > before == 0:
            key_params[:, rows] = torch.stack(sequence_params([packing(0, 0, after)], record.key_nbits))
        if key_order is not None and after > before == 0:
            key_order[rows] = channel_order(packing(0, 0, record.num_tokens), record.boosted, key_order[rows])
        params = None if key_params is None else (key_params[0, rows], key_params[1, rows])
        order = None if key_order is None else key_order[rows]
        step = max(1, BLOCK_TOKENS // record.num_tokens) * record.num_tokens
        for first in range(before, after, step):
            last = min(first + step, after)
            words = pack_records(packing(0, first, last), packing(1, first, last), record, params, order)
            words = words.transpose(1, 2)
            some = slice(first // record.num_tokens, last // record.num_tokens)
            if places is None:
                stored.records[rows, some] = words
            else:
                stored.records[places[:, some].long()] = words
        token = torch.arange(length, length + count, device=key.device)
        token = token[(token < sink) | (token >= sink + after)]
        index = torch.tensor(same, device=key.device)[:, None]
        slot = torch.where(token < sink, token, sink + (token - sink) % residual)
        if pages is not None:
            size = exact[0].shape[2]
            index, slot = pages[:, token // size].long(), token % size
        for store, given in zip(stored.exact(), new, strict=True):
            store[index, :, slot] = given[:, :, token - length].transpose(1, 2).to(store.dtype)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stored: Stored,
    layout: Layout,
    lengths: Tensor,
    positions: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store one token a row, ``value [batch_size, num_kv_heads, 1, value_dim]``, and count it.

    ``lengths [batch_size]`` int32: tokens that each row holds before, in memory of its own; left as it is.
    :func:`kvruntime.kernels.reference.embed` has the other shapes; ``positions`` may be ``lengths``.
    ``stored.lengths`` becomes ``lengths + 1``, and ``stored.packed`` what is packed then.
    """
    key = embed(query, key, rotary, positions)
    held, packed = lengths.tolist(), stored.packed.tolist()
    append(key, value, None, stored, layout, (held, packed))
    plan = (layout.record.num_tokens, layout.sink, layout.residual)
    packed = [flush_plan(length, before, 1, *plan) for length, before in zip(held, packed, strict=True)]
    stored.packed.copy_(torch.tensor(packed, dtype=torch.int32))
    stored.lengths.copy_(lengths + 1)


def ring_positions(lengths: Tensor, packed: Tensor, sink: int, residual: int, slots: int) -> Tensor:
    """Which token each exact slot holds: ``[batch_size, slots]`` (int64), -1 where it holds none.

    ``lengths`` and ``packed`` ``[batch_size]`` count a row's tokens and those of them in records.
    """
    slot = torch.arange(slots, device=lengths.device)
    ahead = (slot - sink - packed[:, None]) % residual  # ring slots, as distance from the oldest unpacked token
    ring = sink + packed[:, None] + ahead
    token = torch.where(slot < sink, slot, ring)
    return torch.where(token < lengths[:, None], token, -1)


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention over everything a layer stores, one block of records at a time.

    :func:`kvruntime.kernels.reference.by_row` has the shapes; a line has chunks of prompts, single tokens and drafts
    beside each other.  Raises ``ValueError`` where :func:`check` does.
    """
    if starts is not None:

        def rows(query: Tensor, fresh: Fresh | None) -> Tensor:
            return attend(query, stored, layout, scale, fresh, scores=scores)

        return by_row(rows, query, fresh, starts)
    record, sink, residual = layout
    lengths, packed, block_table, pages = stored.lengths, stored.packed, stored.block_table, stored.exact_table
    check(stored, layout, query.shape[0])
    batch, q_heads, length, _ = query.shape
    heads = stored.exact_key.shape[1]
    q_per_kv = q_heads // heads
    grouped = query.reshape(batch, heads, q_per_kv * length, -1)
    state = Partial(grouped, stored.exact_value.shape[-1], scale, scores.softcap)
    newest = (lengths[:, None] - 1).expand(-1, q_per_kv)
    if fresh is not None and fresh[2] is not None:
        ahead = torch.arange(length, device=query.device) - (length - fresh[2][:, None])
        newest = (lengths[:, None] + ahead).repeat(1, q_per_kv)
    most = int(packed.max()) if batch else 0
    params = None if stored.key_params is None else (stored.key_params[0], stored.key_params[1])
    step = max(1, BLOCK_TOKENS // record.num_tokens)
    for first in range(0, most // record.num_tokens, step):
        last = min(first + step, most // record.num_tokens)
        if block_table is None:
            blocks = stored.records[:, first:last]
        else:
            held = torch.arange(first, last, device=query.device) < packed[:, None] // record.num_tokens
            blocks = stored.records[torch.where(held, block_table[:, first:last], 0)]
        key, value = unpack_records(blocks.transpose(1, 2), record, params, stored.key_order)
        token = torch.arange(first * record.num_tokens, last * record.num_tokens, device=query.device)
        even = bool((packed >= last * record.num_tokens).all())
        visible = None if even else (token < packed[:, None])[:, None, None]
        state.add(key, value, visible, scores.sees(sink + token[None], newest))
    if pages is not None:
        size = stored.exact_key.shape[2]
        ahead = torch.arange(int((lengths - packed).max()) if batch else 0, device=query.device)
        token = packed[:, None] + ahead
        held = token < lengths[:, None]
        page = pages.gather(1, torch.where(held, token // size, 0)).long() * held if len(ahead) else token
        key, value = (x[page, :, token % size].transpose(1, 2) for x in stored.exact())
        if len(ahead):
            state.add(key, value, held[:, None, None], scores.sees(token, newest))
    elif stored.exact_key.shape[2]:
        token = ring_positions(lengths, packed, sink, residual, stored.exact_key.shape[2])
        held = (token >= 0)[:, None, None]
        state.add(stored.exact_key, stored.exact_value, held, scores.sees(token, newest))
    real = None
    if fresh is not None:
        key, value, counts = fresh
        value = stored_values(value, record, fresh_type(value.dtype))
        real, visible = causal(counts, length, q_per_kv)
        state.add(key, value, visible, scores.sees(lengths[:, None] + ahead, newest))
    out = state.result(scores.sinks_of(heads, length)).reshape(batch, q_heads, length, -1)
    if record.rotation:
        out = rotated(out, record.rotation)
    if real is not None:
        out = torch.where(real[:, None, :, None], out, 0.0)
    return out.to(query.dtype)
