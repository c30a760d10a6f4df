"""The rows' lengths on a device, as a step that the host plans reads them: one tensor for all layers of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.methods import Layer, Steps


class Lengths:
    """What :meth:`kvruntime.methods.room.Layer.step` is told by a cache whose books the host keeps."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], tuple[list[int], Tensor, Tensor]] = {}

    def before(self, store: Layer, num_q_heads: int) -> Steps:
        """For one more token a row of ``store``; layers that hold as many tokens as the last one change nothing."""
        rows = store.row_lengths
        place = store.device, len(rows), num_q_heads
        if place not in self._held:
            with torch.inference_mode(False):
                lengths = torch.tensor(rows, dtype=torch.int32).to(store.device)
                self._held[place] = list(rows), lengths, store.scratch(num_q_heads)
        known, lengths, scratch = self._held[place]
        if known != rows:
            if [length + 1 for length in known] == rows:
                lengths.add_(1)
            else:
                lengths.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)
            known[:] = rows
        return Steps(lengths, lengths, scratch, store.most_held)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return sum(
            tensor.untyped_storage().nbytes()
            for _, lengths, scratch in self._held.values()
            for tensor in (lengths, scratch)
        )
