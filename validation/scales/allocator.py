"""What a device says it holds: bytes now, and the most since the last restart, above what stood at the start."""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Any

import torch

from validation.scales.live import LiveBytes


class Allocator:
    """``with Allocator(device) as held``: ``held.now``, ``held.peak``, ``held.restart()``; all above the start.

    CUDA: the caching allocator's own counters.  Elsewhere: live tensors, counted as they come and go.
    ``counters`` are its counts, each with the unit in bytes that it counts in: CUDA's are of the blocks handed out
    (``allocated``) and of the bytes asked for (``requested``), elsewhere there is only ``live``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.counters = {"allocated": 512, "requested": 1} if self.cuda else {"live": 1}
        self.live: Any = None
        self.start: dict[str, int] = {}

    def __enter__(self) -> Allocator:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # so that no block left over is larger than what is asked for
            self.start = self._read("current")
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
    def now(self) -> dict[str, int]:
        """Bytes held, by counter."""
        return self._above("current") if self.cuda else {"live": self.live.now}

    @property
    def peak(self) -> dict[str, int]:
        """The most bytes held since the start or the last restart, by counter."""
        return self._above("peak") if self.cuda else {"live": self.live.peak}

    def _above(self, figure: str) -> dict[str, int]:
        torch.cuda.synchronize(self.device)
        return {name: value - self.start[name] for name, value in self._read(figure).items()}

    def _read(self, figure: str) -> dict[str, int]:
        stats = torch.cuda.memory_stats(self.device)
        return {name: stats.get(f"{name}_bytes.all.{figure}", 0) for name in self.counters}

    def rows(self, base: dict[str, Any], measured: dict[str, int]) -> list[dict[str, Any]]:
        """One row a counter."""
        return [
            {**base, "counter": name, "rounding": self.counters[name], "measured": measured[name]} for name in measured
        ]

    def restart(self) -> None:
        """The peak starts anew from what is held now."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.live.restart()
