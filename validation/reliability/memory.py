"""What kvsim says fits a card, run on it: it is allocated and steps, and 3 % more is not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from kvruntime.checkpoints.load import Source, load
from kvruntime.engine import Engine
from kvruntime.methods import make_layer
from kvsim.layout import Method, nbytes
from kvsim.memory.capacity import max_batch
from kvsim.memory.estimate import cache_nbytes
from kvsim.models.load import load_config, load_model
from validation.claims.phases import RESERVE, planned
from validation.claims.subjects import describe_method
from validation.reliability import subjects
from validation.reliability.findings import Broken, Findings, each
from validation.reliability.phases import phases
from validation.reliability.subjects import Scale

MORE = 1.03
NAME, LONG = "llama-3.2-1b", 32768


def fits(device: torch.device, scale: Scale) -> Findings:
    """The largest batch that kvsim says fits, at 32k tokens of Llama-3.2-1B's shape: it is allocated, and steps; 3 %
    more is refused.  On a CPU the same arithmetic within a budget of bytes, and the buffers allocated."""
    if device.type != "cuda":
        return each(subjects.layouts(device, scale), lambda method: _fits_budget(method, device))
    model = load(Source(NAME, "random (seed 0)", config=dict(load_config(NAME)[1])), str(device), "bfloat16").model
    return each(subjects.layouts(device, scale), lambda method: _fits(model, method, device))


def _fits(model: Any, method: Method, device: torch.device) -> Findings:
    shape = load_model(NAME)
    batch = planned(shape, torch.cuda.get_device_name(device), method, LONG)
    more = int(batch * MORE) + 1
    _free()
    engine = _stepped(model, method, batch)
    predicted = cache_nbytes(shape, method, batch, LONG)
    if engine.nbytes != predicted:
        raise Broken(f"{batch} rows hold {engine.nbytes:,} B, predicted {predicted:,}")
    if engine.lengths != [16] * batch or not engine.logits.isfinite().all():
        raise Broken(f"{batch} rows do not step")
    del engine
    _free()
    if _steps(model, method, more):
        raise Broken(f"{batch} rows fit by prediction, and {more} fit too")
    figure = {
        "model": NAME,
        "method": describe_method(method),
        "num_tokens": LONG,
        "rows": batch,
        "refused": more,
        "reserve": RESERVE,
    }
    told = f"{batch:,} rows of {LONG:,} tokens fit and step ({predicted:,} B), {more:,} do not"
    return Findings(told, [figure])


def _stepped(model: Any, method: Method, batch: int) -> Engine:
    """An engine with 16 tokens a row, 8 of them decoded."""
    engine = Engine(model, method, batch_size=batch, max_seq_len=LONG)
    engine.fill(8)
    for _ in range(8):
        engine.step()
    torch.cuda.synchronize()
    return engine


def _steps(model: Any, method: Method, batch: int) -> bool:
    """Whether so many rows can be allocated and stepped."""
    try:
        _stepped(model, method, batch)
    except torch.OutOfMemoryError:
        return False
    return True


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _fits_budget(method: Method, device: torch.device) -> Findings:
    shape, budget = load_model("gpt2"), 24 << 20
    batch = max_batch(shape, method, 128, budget) or 0
    for count, within in ((batch, True), (int(batch * MORE) + 1, False)):
        layers = [make_layer(method, layer, count, 128, device) for layer in shape.cache_layers]
        held = sum(layer.nbytes for layer in layers)
        if (held <= budget) != within or held != sum(
            nbytes(method.buffers(layer, count, 128)) for layer in shape.cache_layers
        ):
            raise Broken(f"{count} rows hold {held:,} B of {budget:,}")
    return Findings(f"{batch} rows fit {budget >> 20} MiB, {int(batch * MORE) + 1} do not")


RUNS: dict[str, Callable[[torch.device, Scale], Findings]] = {"memory by phase": phases, "the largest batch": fits}
