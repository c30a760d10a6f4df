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


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes(known) as live``: ``live.now`` and ``live.peak`` in bytes, ``live.restart()`` the peak anew.

    ``known``: tensors that are counted from the start (a cache's buffers).  Storages of other tensors that were made
    outside are told by being operator inputs first, and left out.
    """

    def __init__(self, known: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in known or []:
            self._count(tensor, counted=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the guard around every operator costs more than the counting

    def restart(self) -> None:
        """The peak starts anew from what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for item in args:
            self._count_all(item, counted=False)
        for item in (kwargs or {}).values():
            self._count_all(item, counted=False)
        out = func(*args, **(kwargs or {}))
        self._count_all(out, counted=True)
        return out

    def _count_all(self, item: Any, *, counted: bool) -> None:
        if isinstance(item, torch.Tensor):
            self._count(item, counted=counted)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                self._count_all(inner, counted=counted)

    def _count(self, tensor: torch.Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
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
