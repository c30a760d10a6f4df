"""A plugin of pytest for ``validation/record.sh``: references attend on the CPU, whatever the test's device is.

compute-sanitizer's racecheck aborts in some of PyTorch's own products, and says then nothing of our kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kvruntime.methods.full import reference as full
from kvruntime.methods.kivi import reference as kivi
from kvruntime.methods.token import reference as token


def on_cpu(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``attend``, its tensors copied to the CPU and its output back to where the first one lies."""

    def moved(query: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        there = pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, (query, args, named))
        return attend(there[0], *there[1], **there[2]).to(query.device)

    return moved


for module in (full, kivi, token):
    module.attend = on_cpu(module.attend)
