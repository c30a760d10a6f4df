"""The uncompressed cache in plain PyTorch, over rows' own slots or a pool of blocks: the meaning of the kernels.

Lengths: ``Stored.lengths`` counts what lies in its tensors when a call begins, without what the call brings;
the caller counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvruntime.kernels import slot_reference
from kvruntime.kernels.reference import Fresh, embed
from kvruntime.kernels.slot_reference import Slots, arriving


class Stored(NamedTuple):
    """What a layer holds.

    | tensor | shape |
    |---|---|
    | key, value | [batch_size, num_kv_heads, slots, dim]: token t in slot t |
    | lengths | [batch_size] int32: tokens stored |
    | block_table | [batch_size, num_blocks] int32, or None |

    With a block table, key and value are pools [pool_size, num_kv_heads, n, dim] of any strides but the last, 1: token
    t of row b lies in slot ``t % n`` of block ``block_table[b, t // n]``.  Rows may share blocks.  Entries for tokens
    that a row does not have are not looked at.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor
    block_table: Tensor | None = None


def slots(stored: Stored, stepped: bool = False) -> Slots:
    """Where its tokens lie, ``stepped`` ones too.  Raises ``ValueError`` for a block table of another shape or type."""
    found = Slots(stored.lengths + 1 if stepped else stored.lengths, stored.key.shape[2], stored.block_table)
    found.check("[pool_size, num_kv_heads, n, dim]")
    return found


def check(stored: Stored) -> None:
    """Raises ``ValueError`` where :func:`slots` does.  Kernels ask at every step: nothing runs on the device."""
    slots(stored)


def append(
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | Tensor | None,
    stored: Stored,
    starts: Tensor | None = None,
) -> None:
    """Store new tokens behind what each row holds: :func:`kvruntime.kernels.slot_reference.arriving` has the shapes."""
    index, slot, *new = arriving(key, value, counts, slots(stored), starts)
    for store, tokens in zip((stored.key, stored.value), new, strict=True):
        store[index, :, slot] = tokens.to(store.dtype)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stored: Stored,
    positions: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store one token a row, ``value [batch_size, num_kv_heads, 1, value_dim]``.

    :func:`kvruntime.kernels.reference.embed` has the other shapes; ``positions`` may be ``stored.lengths``.
    """
    append(embed(query, key, rotary, positions), value, None, stored)


def attend(
    query: Tensor,
    stored: Stored,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    stepped: bool = False,
) -> Tensor:
    """Attention over everything a layer stores: :func:`kvruntime.kernels.reference.by_row` has the shapes.

    ``stepped``: each row holds one token more than its length says, which :func:`step` has just stored.
    """

    def read(index: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        return stored.key[index, :, slot].transpose(1, 2), stored.value[index, :, slot].transpose(1, 2)

    shape = stored.key.shape[1], stored.value.shape[-1]
    return slot_reference.attend(query, slots(stored, stepped), read, *shape, scale, fresh, starts)
