"""What a device says it holds: bytes now, and the most since the last restart, above what stood at the start."""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Any

import torch

from validation.live import LiveBytes


class Allocator:
    """``with Allocator(device) as held``: ``held.now``, ``held.peak``, ``held.restart()``; all above the start.

    CUDA: the caching allocator's own counters.  Elsewhere: live tensors, counted as they come and go.
    ``rounding`` is the allocator's unit in bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.rounding = 512 if self.cuda else 1
        self.live: Any = None
        self.start = 0

    def __enter__(self) -> Allocator:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # so that no block left over is larger than what is asked for
            self.start = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.live = LiveBytes().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)

    @property
    def now(self) -> int:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device) - self.start
        return self.live.now

    @property
    def peak(self) -> int:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return self.live.peak

    def restart(self) -> None:
        """The peak starts anew from what is held now."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.live.restart()
