"""How kernels are launched: what a launch asks of the device, and launches that are recorded to be made again.

Triton looks at every argument of a launch, which costs the host some 50 microseconds where a kernel has 60 of them.  A
decode step makes the same launches for every token, only with other addresses: :class:`LaunchRecord` calls the compiled
kernels with those.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver


@cache
def num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


OVERLAP = True


def overlaps(x: Tensor) -> bool:
    """Whether kernels may be launched while their predecessor still runs (each waits for it before it reads)."""
    return OVERLAP and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


ALIGNED = 16
"""Bytes: Triton compiles a kernel for addresses that are multiples of it, and one for others."""
TEMPORARY = 512
"""Bytes at multiples of which temporary tensors begin, as PyTorch's own do."""
STREAM = 3
"""Where the stream comes among what runs a compiled kernel, after the grid."""
DIRECT = triton.__version__.startswith("3.6.")
"""Whether it is known what Triton's launcher, which is Python, calls: a function of C.  For a kernel that wants no
scratch memory it does nothing else."""

_recording = threading.local()


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``; a :class:`LaunchRecord` that is being made remembers it."""
    compiled = kernel[grid](*args, **options)
    calls = getattr(_recording, "calls", None)
    if calls is not None:
        calls.append((kernel, compiled, grid, args, options))


def recorded(call: Callable[[], Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, LaunchRecord]:
    """What ``call`` returns, and its launches."""
    calls: list[Any] = []
    _recording.calls = calls
    try:
        out = call()
    finally:
        del _recording.calls
    return out, LaunchRecord(calls, tensors, out)


class LaunchRecord:
    """The launches of one call, to be made again with tensors of the same shapes, strides and types in other places.

    The call launches all that it runs by :func:`launch_kernel`, reads ``tensors`` and nothing else that changes, and
    returns a
    new tensor, ``out``.  What else it allocates is temporary, and only its kernels write it.
    """

    def __init__(self, calls: list[Any], tensors: Sequence[Tensor], out: Tensor) -> None:
        self.device = None if any(compiled is None for _, compiled, *_ in calls) else out.get_device()
        """None in Triton's interpreter, which compiles nothing and takes tensors."""
        self.shape = tuple(out.shape)
        self.dtype = None if out.dtype == tensors[0].dtype else out.dtype
        """None: that of the first tensor, which takes the host less to say."""
        self.at = [tensor.data_ptr() for tensor in tensors]
        self.temporary = 0
        """Bytes of the temporary tensors together."""
        places: dict[int, int] = {}
        given = [*tensors, out]

        def slot(x: Tensor) -> tuple[int, int]:
            """Which of the tensors holds ``x``, and where in it; of temporary ones the number after the last."""
            address = x.data_ptr()
            for index, tensor in enumerate(given):
                if address == tensor.data_ptr():
                    return index, 0
            for index, tensor in enumerate(given):
                if tensor.data_ptr() < address < tensor.data_ptr() + tensor.nbytes and tensor.is_contiguous():
                    return index, address - tensor.data_ptr()
            if address not in places:
                places[address] = self.temporary
                self.temporary += -(-x.untyped_storage().nbytes() // TEMPORARY) * TEMPORARY
            return len(given), places[address]

        self.calls: list[tuple[Any, list[Any], list[Any]]] = []
        """Of the interpreter: a launch as a function of all its values, those values, and which of them are tensors:
        ``(which value, which tensor, offset in bytes, type)``."""
        self.launches: list[tuple[Any, list[Any], int, Any]] = []
        """Of a GPU: what runs a compiled kernel, all that it is given, how many of these come before the kernel's own,
        and the kernel as Triton's hooks are told."""
        self.slots: list[list[tuple[list[Any], int, int]]] = [[] for _ in range(len(given) + 1)]
        """Where in these each tensor's address goes: ``(all that is given, which of it, offset in bytes)``."""
        self.addresses: list[int] = [0] * len(self.slots)
        """That were last given."""
        for kernel, compiled, grid, args, options in calls:
            parameters = inspect.signature(kernel.fn).parameters
            by_name = dict(zip(kernel.arg_names, args, strict=False)) | options
            values = [by_name[name] if name in by_name else parameters[name].default for name in kernel.arg_names]
            tensors_at = [(at, *slot(x), x.dtype) for at, x in enumerate(values) if isinstance(x, Tensor)]
            values = [None if isinstance(x, Tensor) else x for x in values]
            if compiled is None:
                more = {name: value for name, value in options.items() if name not in parameters}
                self.calls.append((_interpreted(kernel, grid, more), values, tensors_at))
                continue
            size = (*grid, 1, 1)[:3]
            told = compiled[size]  # what it runs is loaded now
            run, head = _entry(compiled, size)
            whole = [*head, *values]
            self.launches.append((run, whole, len(head), told))
            for at, index, offset, _ in tensors_at:
                self.slots[index].append((whole, len(head) + at, offset))

    def __call__(self, tensors: Sequence[Tensor], num_given: int) -> Tensor | None:
        """The launches again, over ``tensors`` in the place of those that were recorded; returns the new tensor.

        None, and nothing is launched, where one of the first ``num_given`` lies so that Triton would compile other
        kernels; the rest begin where PyTorch's allocator lets tensors begin.
        """
        addresses, before = list(map(Tensor.data_ptr, tensors)), self.addresses
        if addresses[:num_given] != before[:num_given]:
            for address, recorded_at in zip(addresses[:num_given], self.at, strict=False):
                if (address ^ recorded_at) % ALIGNED:
                    return None
        out = tensors[0].new_empty(self.shape, dtype=self.dtype)
        temporary = tensors[0].new_empty(self.temporary, dtype=torch.uint8) if self.temporary else out
        if self.device is None:
            held = [*tensors, out, temporary]
            for run, values, slots in self.calls:
                places = {at: _at(held[index], offset, dtype) for at, index, offset, dtype in slots}
                run([places.get(at, value) for at, value in enumerate(values)])
            return out
        addresses += (out.data_ptr(), temporary.data_ptr())
        if addresses != before:  # most lie where they lay
            stays = addresses[num_given:-2] == before[num_given:-2]
            for index in (*range(num_given), -2, -1) if stays else range(len(addresses)):
                if (address := addresses[index]) != before[index]:
                    for given, at, offset in self.slots[index]:
                        given[at] = address + offset
            self.addresses = addresses
        stream, hooks = driver.active.get_current_stream(self.device), knobs.runtime
        hooked = _calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook)
        for run, given, head, told in self.launches:
            if hooked:
                told(*given[head:], stream=stream)
            else:  # without what Triton gathers at each launch for hooks
                given[STREAM] = stream
                run(*given)
        return out


def _entry(compiled: Any, size: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """What runs a compiled kernel, and what it is given before the kernel's own values, the stream among it."""
    launcher, given = compiled.run, [compiled.packed_metadata, None, None, None]
    direct = getattr(launcher, "launch", None)
    if not (DIRECT and hasattr(launcher, "launch_pdl")) or isinstance(direct, FunctionType):
        return launcher, [*size, 0, compiled.function, *given]
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return launcher, [*size, 0, compiled.function, *given]
    options = launcher.launch_cooperative_grid, launcher.launch_pdl
    return direct, [*size, 0, compiled.function, *options, None, None, *given]


def _interpreted(kernel: Any, grid: Any, options: dict[str, Any]) -> Callable[[list[Any]], None]:
    """A launch in Triton's interpreter as a function of all its values."""
    return lambda values: kernel[grid](**dict(zip(kernel.arg_names, values, strict=True)), **options)


def _calls(hook: Any) -> bool:
    """Whether a hook is set: Triton keeps a chain of them, or none."""
    return bool(getattr(hook, "calls", hook))


def _at(x: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """What lies ``offset`` bytes into ``x``, as ``dtype``."""
    if not offset and x.dtype == dtype:
        return x
    rest = x.view(-1).view(torch.uint8)[offset:]
    return rest[: len(rest) // dtype.itemsize * dtype.itemsize].view(dtype)
