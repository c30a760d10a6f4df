"""Triton: a row's oldest records leave, with nothing for the host to plan (the kernel of ``KiviLayer.forget_in_step``).

Record i takes the place of record ``i - MOVE``.  Each word of those places is a chain of its own: a program carries its
words down the chain in order, and no other program reads or writes them.  Rows that need no room are left at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvruntime.kernels.launch import launch_kernel
from kvruntime.methods.kivi.reference import Stored
from kvsim.methods.kivi import Record

WORDS = 512
"""Words of a record that a program carries; the heads' records lie one after the other."""
AT_ONCE = 4
"""Records that it reads before it writes them."""


@triton.jit
def forget_kernel(records_ptr, lengths_ptr, packed_ptr, ticket_ptr, limit, num_records,
                  WORDS: tl.constexpr, MOVE: tl.constexpr, RECORD: tl.constexpr, CHUNKS: tl.constexpr,
                  BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Of rows that hold ``limit`` tokens or more, the ``MOVE`` oldest records leave.  The last of a row's programs
    writes its counts.  ``WORDS``: of a record, all heads."""
    row = tl.program_id(0) // (MOVE * CHUNKS)
    first = tl.program_id(0) % (MOVE * CHUNKS) // CHUNKS
    length = tl.load(lengths_ptr + row)
    if length >= limit:
        packed = tl.load(packed_ptr + row)
        number = packed // RECORD
        word = tl.program_id(0) % CHUNKS * BLOCK + tl.arange(0, BLOCK)
        turn = tl.arange(0, AT_ONCE)
        records_ptr += row.to(tl.int64) * num_records * WORDS
        for at in range(first, number - MOVE, MOVE * AT_ONCE):
            to = at + MOVE * turn
            there = (to < number - MOVE)[:, None] & (word < WORDS)[None, :]
            place = to.to(tl.int64)[:, None] * WORDS + word[None, :]
            held = tl.load(records_ptr + place + MOVE * WORDS, mask=there)
            tl.debug_barrier()  # what is written now, other threads of the program have read
            tl.store(records_ptr + place, held, mask=there)
            tl.debug_barrier()
        tl.debug_barrier()
        seen = tl.atomic_add(ticket_ptr + row, 1)  # counts may change only when all have read them
        if seen == MOVE * CHUNKS - 1:
            tl.store(lengths_ptr + row, length - MOVE * RECORD)
            tl.store(packed_ptr + row, packed - MOVE * RECORD)
            tl.store(ticket_ptr + row, 0)


def forget(stored: Stored, record: Record, limit: int, count: int, ticket: Tensor) -> None:
    """Rows of ``stored`` that hold ``limit`` tokens or more forget their ``count`` oldest, whole records.

    ``ticket [batch_size]``: int32 zeros, and zeros again afterwards.
    """
    batch_size, num_records, heads, words = stored.records.shape
    move, chunks = count // record.num_tokens, triton.cdiv(heads * words, WORDS)
    launch_kernel(
        forget_kernel, (batch_size * move * chunks,), stored.records, stored.lengths, stored.packed, ticket, limit,
        num_records, WORDS=heads * words, MOVE=move, RECORD=record.num_tokens, CHUNKS=chunks, BLOCK=WORDS,
        AT_ONCE=AT_ONCE, num_warps=4,
    )  # fmt: skip
