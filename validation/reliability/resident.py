"""Resident memory: what a cache that is filled adds to the process, as the operating system counts it."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import torch

from kvruntime.methods import make_layer, shared_tensors
from kvsim.layout import Method
from kvsim.models.load import load_model
from validation.claims.memory import random_tokens
from validation.claims.phases import resident_nbytes
from validation.claims.subjects import describe_method
from validation.reliability import subjects
from validation.reliability.findings import Broken, Findings, each
from validation.reliability.subjects import Scale

BAND = (0.98, 1.08)
"""Least and greatest resident / predicted: pages are whole, and the interpreter keeps some of what it frees."""
NAME, TOKENS, WEIGHED = "llama-3.2-1b", 2048, 24 << 20
"""Whose layers are filled with how many tokens, as many layers as take so many bytes."""
STATM = Path("/proc/self/statm")


def resident(device: torch.device, scale: Scale) -> Findings:
    """Layers are made and filled; what the process holds more is what kvsim says, within :data:`BAND`.  On a CPU."""
    if device.type != "cpu" or not STATM.exists():
        return Findings(f"not on {device.type}: a cache lies in the card's memory, or the system does not say")
    return each(subjects.layouts(device, scale), lambda method: _resident(method, device))


def _resident(method: Method, device: torch.device) -> Findings:
    shape = load_model(NAME).cache_layers[0]
    key, value = random_tokens(shape, 1, TOKENS, device, subjects.dtype_of(device))
    shared = shared_tensors(method, [shape], device)
    figure = {"model": NAME, "method": describe_method(method), "num_tokens": TOKENS, "layers": 1}
    count = -(-WEIGHED // resident_nbytes(figure))
    figure["layers"] = count

    def filled() -> object:
        layer = make_layer(method, shape, 1, TOKENS, device, shared)
        layer.append(key, value)
        return layer

    filled()  # what PyTorch's operators keep for another time
    before = _held()
    layers = [filled() for _ in range(count)]
    measured = _held() - before
    del layers
    figure["measured"] = measured
    predicted = resident_nbytes(figure)
    ratio = measured / predicted
    told = f"{count} layers of {TOKENS:,} tokens, {predicted:,} B, resident {ratio:.3f} times as many"
    if not BAND[0] <= ratio <= BAND[1]:
        raise Broken(told, [figure])
    return Findings(told, [figure])


def _held() -> int:
    """Bytes of the process's pages in memory, what is free given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
