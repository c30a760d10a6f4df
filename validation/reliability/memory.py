"""Memory by phase against the prediction, and what kvsim says fits, run: it fits, and 3 % more does not."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvruntime import make_cache
from kvruntime.checkpoints.load import Source, load
from kvruntime.engine import Engine
from kvruntime.hf.cache import argument
from kvruntime.methods import make_layer
from kvruntime.methods.rows import free_nbytes
from kvsim.layout import Method, nbytes
from kvsim.memory.capacity import max_batch
from kvsim.memory.estimate import cache_nbytes
from kvsim.models.load import load_config, load_model
from validation.claims.peak import splits
from validation.claims.transients import predicts, transient
from validation.reliability import subjects
from validation.reliability.runs import Broken
from validation.reliability.subjects import Scale
from validation.scales.allocator import Allocator

BAR = {"cuda": 0.01, "cpu": 0.06}
"""Largest relative error of a phase's current or peak bytes; on a CPU the model is so small that a peak is mostly what
PyTorch's operators make inside themselves, and its current bytes are held to a thousandth."""
EXACT = 0.001
BESIDE = 0.02
"""Share of a card's memory that is left to activations, graphs and rounding where the largest batch is asked for."""
MORE = 1.03
LONG = 32768
GROW = 256
"""Tokens a row by which a cache grows: a pin."""


def phases(device: torch.device, scale: Scale) -> str:
    """Current and peak bytes of the allocator while a model is loaded, a prompt is read whole and in chunks, tokens
    are decoded (on a GPU by a CUDA graph, whose pool is in it), a cache grows, and is used again; each against weights,
    buffers and the transients of the claims, within a hundredth."""
    cuda = device.type == "cuda"
    said = []
    with tempfile.TemporaryDirectory() as folder:
        models = ("llama-3.2-1b", "gpt2-large") if cuda else (_tiny(Path(folder), scale),)
        for name in models:
            for method in subjects.layouts(device):
                if not predicts(method):
                    said.append(f"{Path(name).stem} {method.name}: no peak is predicted")
                    continue
                measured = list(
                    _phases(name, method, device, 2048 if cuda and "gpt2" not in name else 512 if cuda else 96)
                )
                wrong = [
                    each
                    for each in measured
                    if abs(each[3]) > (EXACT if device.type == "cpu" and each[1] == "now" else BAR[device.type])
                ]
                if wrong:
                    told = ", ".join(
                        f"{phase} {what} {have:,.0f} B, {error:+.2%}" for phase, what, have, error in wrong
                    )
                    raise Broken(f"{Path(name).stem}, {method.name}: {told}")
                worst = max(measured, key=lambda each: abs(each[3]))
                said.append(
                    f"{Path(name).stem} {method.name}: {len(measured)} figures, worst {worst[3]:+.2%} ({worst[0]})"
                )
    return "; ".join(said)


Figure = tuple[str, str, float, float]
"""Phase, ``now`` or ``peak``, bytes measured, measured / predicted - 1."""


def _phases(name: str, method: Method, device: torch.device, prompt: int) -> Iterator[Figure]:
    """The phases of one model and layout."""
    shape, config = load_model(name), load_config(name)[1]
    dtype = str(subjects.dtype_of(device)).removeprefix("torch.")
    counter = "requested" if device.type == "cuda" else "live"
    cuda = device.type == "cuda"
    new = 24 if cuda else 6
    longest = prompt + new
    warm = load(Source("warm", "random (seed 0)", config=config), str(device), dtype).model  # workspaces, kernels
    _run(warm, make_cache(warm, method, max_seq_len=longest), device, prompt, 4)
    _run(warm, make_cache(warm, method), device, prompt, 4)
    del warm
    with _collected(device), Allocator(device) as held:
        made = load(Source("measured", "random (seed 0)", config=config), str(device), dtype).model
        weights = sum(tensor.nbytes for tensor in {id(t): t for t in (*made.parameters(), *made.buffers())}.values())
        counted = shape.weights.total * made.dtype.itemsize if shape.weights else 0
        yield "load", "kvsim", weights, weights / counted - 1
        yield "load", "now", held.now[counter], held.now[counter] / weights - 1
        row = {"model": name, "batch_size": 1, "dtype": dtype, "device": device.type, "prompt_tokens": prompt}

        def peak(phase: str, **more: Any) -> int:
            own = row | {"phase": phase, "num_tokens": longest} | more
            return sum(transient(own, shape, method, shape.cache_layers[0]))

        cache = make_cache(made, method, max_seq_len=longest)
        full = weights + cache_nbytes(shape, method, 1, longest)
        for phase in ("prefill", "reuse"):
            held.restart()
            ids = _ids(made, prompt, device)
            _forward(made, cache, ids)
            yield phase, "now", held.now[counter] - ids.nbytes, (held.now[counter] - ids.nbytes) / full - 1
            yield phase, "peak", held.peak[counter], held.peak[counter] / (full + peak("prefill")) - 1
            if phase == "prefill":
                held.restart()
                _decode(made, cache, device, prompt, new)
                more = splits(method, cache.stores[0], _query(made, cache, device)) if cuda else {}
                now, most = held.now[counter] - ids.nbytes, held.peak[counter]
                yield "decode", "now", now, now / full - 1
                yield "decode", "peak", most, most / (full + peak("decode", **more)) - 1
            cache.reset()
            del ids
        if cuda:  # on a CPU the reference reads a warm cache back, which no transient predicts
            held.restart()
            _chunks(made, cache, device, prompt)
            chunk = max(1, prompt // 4)
            yield "chunked prefill", "now", held.now[counter], held.now[counter] / full - 1
            yield (
                "chunked prefill",
                "peak",
                held.peak[counter],
                held.peak[counter] / (full + peak("prefill", prompt_tokens=chunk)) - 1,
            )
        del cache
        gc.collect()
        growing = make_cache(made, method, compiled=False)
        provided = -(-prompt // GROW) * GROW
        _forward(made, growing, _ids(made, prompt, device))
        full = weights + cache_nbytes(shape, method, 1, provided)
        yield "growth, before", "now", held.now[counter], held.now[counter] / full - 1
        held.restart()
        _forward_steps(made, growing, device, prompt, provided + 1)
        grown = weights + cache_nbytes(shape, method, 1, provided + GROW)
        yield "growth", "now", held.now[counter], held.now[counter] / grown - 1
        yield (
            "growth",
            "peak",
            held.peak[counter],
            held.peak[counter]
            / (
                grown
                + max(_side_by_side(shape, method, provided), peak("decode", num_tokens=provided + 1, num_splits=1))
            )
            - 1,
        )
        del growing, made


def _side_by_side(shape: Any, method: Method, provided: int) -> int:
    """The largest tensor of a layer that is still there while it is copied into a larger one."""
    old, new = (method.buffers(shape.cache_layers[0], 1, count) for count in (provided, provided + GROW))
    return max(
        (before.nbytes for before, after in zip(old, new, strict=True) if before.shape != after.shape), default=0
    )


def _tiny(folder: Path, scale: Scale) -> str:
    """A config.json of the tiny model, whose name is its path."""
    path = folder / "config.json"
    path.write_text(json.dumps(subjects.config(scale, 1024).to_dict()), encoding="utf-8")
    return str(path)


@contextmanager
def _collected(device: torch.device) -> Iterator[None]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
    gc.collect()


def _ids(model: Any, count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (1, count), generator=generator).to(device)


@torch.inference_mode()
def _forward(model: Any, cache: Any, ids: torch.Tensor, start: int = 0) -> None:
    at = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    out = model(ids, position_ids=at, **argument(cache), use_cache=True, logits_to_keep=1)
    out.logits.float()  # as generate() takes them


def _chunks(model: Any, cache: Any, device: torch.device, prompt: int) -> None:
    ids, size = _ids(model, prompt, device), max(1, prompt // 4)
    for start in range(0, prompt, size):
        _forward(model, cache, ids[:, start : start + size], start)


def _forward_steps(model: Any, cache: Any, device: torch.device, start: int, stop: int) -> None:
    ids = _ids(model, 1, device)
    for token in range(start, stop):
        _forward(model, cache, ids, token)


def _decode(model: Any, cache: Any, device: torch.device, prompt: int, new: int) -> None:
    _forward_steps(model, cache, device, prompt, prompt + new - 1)


def _run(model: Any, cache: Any, device: torch.device, prompt: int, new: int) -> None:
    _forward(model, cache, _ids(model, prompt, device))
    _decode(model, cache, device, prompt, new)


def _query(model: Any, cache: Any, device: torch.device) -> torch.Tensor:
    heads, dim = model.config.num_attention_heads, cache.stores[0].shape.key_dim
    return torch.zeros(1, heads, 1, dim, dtype=model.dtype, device=device)


def fits(device: torch.device, scale: Scale) -> str:
    """The largest batch that kvsim says fits, at 32k tokens of Llama-3.2-1B's shape: it is allocated, and steps; 3 %
    more is refused.  On a CPU the same arithmetic within a budget of bytes, and the buffers allocated."""
    if device.type != "cuda":
        return _fits_budget(device)
    name, said = "llama-3.2-1b", []
    shape, config = load_model(name), dict(load_config(name)[1])
    model = load(Source(name, "random (seed 0)", config=config), str(device), "bfloat16").model
    total = torch.cuda.get_device_properties(device).total_memory
    for method in subjects.layouts(device):
        gc.collect()
        torch.cuda.empty_cache()
        room = free_nbytes(device) - int(BESIDE * total)
        batch = max_batch(shape, method, LONG, room) or 0
        engine = Engine(model, method, batch_size=batch, max_seq_len=LONG)
        engine.fill(8)
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize(device)
        predicted = cache_nbytes(shape, method, batch, LONG)
        if engine.nbytes != predicted:
            raise Broken(f"{method.name}: {batch} rows hold {engine.nbytes:,} B, predicted {predicted:,}")
        if engine.lengths != [16] * batch or not engine.logits.isfinite().all():
            raise Broken(f"{method.name}: {batch} rows do not step")
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        more = int(batch * MORE) + 1
        if _steps(model, method, more, device):
            raise Broken(f"{method.name}: {batch} rows fit by prediction, and {more} fit too")
        said.append(f"{method.name}: {batch:,} rows of {LONG:,} tokens fit and step ({predicted:,} B), {more:,} do not")
    return "; ".join(said)


def _steps(model: Any, method: Method, batch: int, device: torch.device) -> bool:
    """Whether so many rows can be allocated and stepped."""
    try:
        engine = Engine(model, method, batch_size=batch, max_seq_len=LONG)
        engine.fill(8)
        engine.step()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    return True


def _fits_budget(device: torch.device) -> str:
    shape, said, budget = load_model("gpt2"), [], 24 << 20
    for method in subjects.layouts(device):
        batch = max_batch(shape, method, 128, budget) or 0
        for count, within in ((batch, True), (int(batch * MORE) + 1, False)):
            layers = [make_layer(method, layer, count, 128, device) for layer in shape.cache_layers]
            held = sum(layer.nbytes for layer in layers)
            if (held <= budget) != within or held != sum(
                nbytes(method.buffers(layer, count, 128)) for layer in shape.cache_layers
            ):
                raise Broken(f"{method.name}: {count} rows hold {held:,} B of {budget:,}")
        said.append(f"{method.name}: {batch} rows fit {budget >> 20} MiB, {int(batch * MORE) + 1} do not")
    return "; ".join(said)


RUNS: dict[str, Callable[[torch.device, Scale], str]] = {"memory by phase": phases, "the largest batch": fits}
