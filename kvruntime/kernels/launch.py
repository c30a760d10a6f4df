"""What a launch asks of the device: its multiprocessors, and whether kernels may overlap."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


OVERLAP = True


def overlaps(x: Tensor) -> bool:
    """Whether kernels may be launched while their predecessor still runs (each waits for it before it reads)."""
    return OVERLAP and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
