"""Which calls the tensor-core kernel takes, and how it shares out their work."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvruntime.methods.kivi.reference import Fresh
from kvruntime.methods.kivi.words import record_constants
from kvsim.methods import packing as layout
from kvsim.methods.kivi import Record

TILE = gl.constexpr(layout.MAX_TILE)
STAGES = 2
"""Tiles that a program holds in shared memory: the one it works on and those under way."""
PROGRAMS_PER_SM = {64: 12, 80: 8, 96: 8, 128: 8, 256: 8, 512: 8}
"""Programs at once on a multiprocessor, by head dimension: as measured on an H100 (80 and 96: as 128),
not as many as would fit."""
LARGE_TILE = 16 << 10
"""Bytes of codes."""
MAX_REGISTERS = {64: 168, 80: 248, 96: 248, 128: 248, 256: 255, 512: 255}
"""What a thread may take so that as many programs have room: left alone, the assembler spills rather than take them."""
SCHEDULERS = 4
"""Of a multiprocessor: a program is one warp."""
MAX_ROWS = 1024
MAX_PARTS = 256
ROTATED_PARTS, ROTATED_VALUES = 32, 1024
"""Of a program that has all channels, because it rotates them: parts at a time, and values a warp, four warps at most.
More are slower: the next attention finds fewer registers."""
RESERVED_BYTES = 1024
"""Of a program's shared memory, by the driver."""
MERGED_PARTS = 16
"""Parts of a block that the last of its programs may merge itself.  More are left to
:func:`kvruntime.kernels.merge.combine_kernel`'s many programs."""
MERGED_VALUES = 1024
"""Values of those parts where the device is not full: one warp takes longer over more than a second launch."""
MAX_QUERIES = 64
"""Queries a row: every block of 8 (query, head)s reads the records again, from the L2 cache."""
REGISTERS = 255
"""Of a thread where there are several queries: left to choose, ptxas at times takes 168 and spills in the loop."""


@gluon.constexpr_function
def padded(size):
    """The power of two that ``size`` fits."""
    return 1 << (size - 1).bit_length()


def constants(
    record: Record, sink: int, residual: int, num_heads: int, q_per_kv: int, num_queries: int | None = None
) -> dict[str, int]:
    """The kernel's compile-time constants: as few blocks of at most 8 query heads as hold them all, evenly filled; of
    several queries' heads, 4 where that holds them all and else 8, because ``num_queries`` is not compiled in.  Of 256
    channels a block has 4 at most."""
    own = record_constants(record)
    most = 4 if record.key_dim > 128 else 8
    columns = q_per_kv if num_queries is None else 4 if num_queries * q_per_kv <= 4 else most
    blocks = -(-columns // most)
    return {
        name: own[name]
        for name in ("KEY_NBITS", "VALUE_NBITS", "RECORD", "KEY_PARAMS", "VALUE_PARAMS", "RECORD_WORDS", "BOOST_CODES")
    } | {
        "NUM_HEADS": num_heads, "Q_PER_KV": q_per_kv, "HEADS": -(-columns // blocks), "DIM": record.key_dim,
        "KEY_GROUPS": max(1, record.tile // record.key_group), "VALUE_GROUPS": record.num_value_groups,
        "SINK": sink, "RESIDUAL": residual, "CENTERED": record.rotation > 0,
    }  # fmt: skip


def plan_splits(programs: int, units: int, per_sm: int, num_sms: int) -> int:
    """Splits of a row of ``units`` (tiles, and chunks of exact slots) where there are ``programs`` blocks
    of heads and rows.

    At most one a scheduler of ``num_sms`` multiprocessors where that is three units each, or hardly more than four,
    because two that share a scheduler take as long as one after the other; as few as have no more units.  Else
    ``per_sm`` on each."""
    most = max(1, min(units, SCHEDULERS * num_sms // max(1, programs)))
    each = -(-units // most)
    if each <= 3:
        return -(-units // each)
    if 4 * units <= 17 * most:
        return most
    return max(1, min(units // 2, per_sm * num_sms // max(1, programs)))


def programs_per_sm(fixed: dict[str, int]) -> int:
    """``PROGRAMS_PER_SM``, and half of them where the codes of a tile are 16 KiB and more:
    fewer then have as much under way."""
    large = TILE.value * fixed["DIM"] * (fixed["KEY_NBITS"] + fixed["VALUE_NBITS"]) // 8 >= LARGE_TILE
    return PROGRAMS_PER_SM[fixed["DIM"]] // (2 if large else 1)


def merges(splits: int, programs: int, values: int, num_sms: int) -> bool:
    """Whether the last program of a block of ``values`` outputs merges its parts, or a second launch does."""
    full = splits * programs > SCHEDULERS * num_sms
    return splits <= MERGED_PARTS and (full or splits * values <= MERGED_VALUES)


def plan_merge(parts: int, dim: int, rotation: int) -> tuple[int, int, int]:
    """Parts at a time, channels and warps of a program of ``combine_kernel``.

    >>> plan_merge(132, 128, 0), plan_merge(132, 128, 128), plan_merge(16, 128, 128)
    ((256, 16, 4), (32, 128, 4), (16, 128, 2))
    """
    block_s = min(ROTATED_PARTS if rotation else MAX_PARTS, 1 << (parts - 1).bit_length())
    if rotation:
        return block_s, rotation, max(1, min(4, block_s * rotation // ROTATED_VALUES))
    block_d = min(dim & -dim, max(16, 4096 // block_s))  # it divides the channels
    return block_s, block_d, 4 if block_s * block_d >= 1024 else 1


def spare(fixed: dict[str, int], sm_nbytes: int) -> int:
    """Stages of key scales and zeros that a program takes besides, so that no more than ``PROGRAMS_PER_SM`` of them
    share a multiprocessor's ``sm_nbytes`` of shared memory: launched while another kernel ends, they would crowd where
    it ended first."""
    dim, tile = fixed["DIM"], TILE.value
    stage = 4 * fixed["KEY_GROUPS"] * dim
    codes = tile * dim * max(fixed["KEY_NBITS"], fixed["VALUE_NBITS"]) // 4
    own = STAGES * (codes + stage + 4 * padded(fixed["VALUE_GROUPS"]) * tile) + RESERVED_BYTES
    if fixed["BOOST_CODES"]:
        own += STAGES * tile * layout.boosted_channels(dim) // 4
    least = sm_nbytes // (PROGRAMS_PER_SM[dim] + 1) + 1
    return max(0, -(-(least - own) // stage))


def supports(record: Record, query: Tensor, fresh: Fresh | None = None, starts: Tensor | None = None) -> bool:
    """Whether :func:`kvruntime.methods.kivi.fast.attend` takes this record and query, else ``attention.attend`` does: a
    line of queries always."""
    return (
        query.is_cuda
        and starts is None
        and query.shape[2] <= (1 if fresh is None else MAX_QUERIES if record.key_dim <= 128 else 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and holds(record)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def holds(record: Record) -> bool:
    """Whether the kernel reads this record: tiles of 64 tokens, heads of 64, 80, 96, 128, 256 or 512 channels,
    2, 4 or 8 bits.

    Of 80 channels with value groups of 16 or the head, of 96 with 32 or the head:
    each of their chunks has whole groups or one.
    Rotated values of 64 and 128 channels; boosted keys beside them alone, of 2 bits and 2 more, groups of 64 and more.
    Of 256 channels only with groups of 64 and more: others take more registers than there are.  Of 512 a twelfth of the
    loop's instructions are spills, and 8 bits would leave a multiprocessor one program."""
    return (
        record.tile == layout.MAX_TILE
        and record.key_dim == record.value_dim
        and record.key_dim in (64, 80, 96, 128, 256, 512)
        and {record.key_nbits, record.value_nbits} <= ({2, 4} if record.key_dim > 256 else {2, 4, 8})
        and record.value_group in {80: (16, 80), 96: (32, 96)}.get(record.key_dim, (32, 64, 128))
        and (record.key_group == record.num_tokens or (record.num_tokens == 64 and record.key_group in (16, 32)))
        and (record.key_dim <= 128 or min(record.key_group, record.value_group) >= 64)
        and (not record.rotation or record.key_dim in (64, 128))
        and (not record.boosted or holds_boosted(record))
    )


def holds_boosted(record: Record) -> bool:
    """Whether the kernel reads these boosted keys."""
    return record.rotation > 0 and record.key_nbits == record.boost_nbits == 2 and record.key_group >= 64
