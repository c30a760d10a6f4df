"""What the card can do, measured before anything is compared with it."""

from __future__ import annotations

from typing import Any

import torch

from kvruntime.bench.harness.timing import Bench

NBYTES = 2 << 30


def read_ceiling(bench: Bench, size: int = NBYTES) -> dict[str, Any]:
    """Reading: the sum of ``size`` bytes of float32.  ``bandwidth`` in bytes a second."""
    x = torch.randn(size // 4, device=bench.device, generator=bench.generator())
    timing = bench.timer([lambda: x.sum()])
    return {"seconds": timing.spread, "nbytes": x.nbytes, "bandwidth": x.nbytes / timing.seconds}


def copy_ceiling(bench: Bench, size: int = NBYTES) -> dict[str, Any]:
    """A copy on the device: ``size`` bytes read and as many written, both counted."""
    x = torch.randn(size // 4, device=bench.device, generator=bench.generator())
    y = torch.empty_like(x)
    timing = bench.timer([lambda: y.copy_(x)])
    return {"seconds": timing.spread, "nbytes": 2 * x.nbytes, "bandwidth": 2 * x.nbytes / timing.seconds}


CEILINGS = {"read": read_ceiling, "copy": copy_ceiling}
