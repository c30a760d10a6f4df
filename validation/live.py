"""Bytes alive at every moment, counted from the tensors themselves: a peak for devices whose allocator keeps none.

Every operator that PyTorch dispatches passes through; each storage that comes out is counted once and whole, until
it is freed.  Workspaces inside one operator (a matrix multiplication's packing, a flash attention's blocks) are not
tensors and are not seen.  Storages that existed before are not counted, even when something new points into them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes(known) as live``: ``live.now`` and ``live.peak`` in bytes, ``live.restart()`` the peak anew.

    ``known``: tensors that are counted from the start (a cache's buffers).  Storages of other tensors that were made
    outside are told by being operator inputs first, and left out.
    """

    def __init__(self, known: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: list[int] = []
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in known or []:
            self._count(tensor, counted=True)

    def restart(self) -> None:
        """The peak starts anew from what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._count(leaf, counted=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._count(leaf, counted=True)
        return out

    def _count(self, leaf: Any, *, counted: bool) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes() if counted else 0

        def freed(_: Any) -> None:
            self.now -= self._seen.pop(key)[1]

        self._seen[key] = weakref.ref(storage, freed), nbytes
        self.now += nbytes
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = sorted((size for _, size in self._seen.values() if size), reverse=True)
