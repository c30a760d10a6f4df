"""Quantizing and storing, timed: a long prompt at once, one token, and the step that packs a record.

What only one method has to measure is asked of its room (``kvruntime.methods.LAYERS``, ``measures``).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvruntime.bench.harness.timing import Bench, Call
from kvruntime.bench.kernels.attention import Shape, Tokens, attempt, dtype_of, filled_layers
from kvruntime.methods import make_layer, room_of
from kvsim.layout import Method
from kvsim.methods import Full


def measure_pack(bench: Bench, shape: Shape, method: Method, *, compiled: bool = True) -> dict[str, Any]:
    """Seconds to store a whole prompt in an empty layer; ``nbytes``: the prompt read and the cache written.

    Where the method's room has other packers, their seconds on the same tokens: ``eager_seconds``, and where
    ``compiled`` is wanted ``compiled_seconds``.  A text instead of a figure says why there is none.
    """
    tokens = Tokens(bench, shape, dtype_of(method))
    key, value = tokens.pair(shape.num_tokens)
    layer = make_layer(method, shape.layer, shape.batch_size, shape.num_tokens, bench.device)

    def store() -> None:
        layer.reset()
        layer.append(key, value)

    timing = bench.timer([store])
    size = shape.nbytes_read(Full(str(tokens.dtype).removeprefix("torch."))) + shape.nbytes_read(method)
    row: dict[str, Any] = {"seconds": timing.spread, "nbytes": size, "bandwidth": size / timing.seconds}
    own = room_of(method).measures
    for name, pack in (own.packers(layer, key, value) if own else {}).items():
        if compiled or name != "compiled":
            row[f"{name}_seconds"] = attempt(lambda pack=pack: bench.eager([pack]).seconds)  # type: ignore[misc]
    return row


def measure_append(bench: Bench, shape: Shape, method: Method) -> dict[str, Any]:
    """Seconds to store one token a row where the ring has room (``append``) and where a record leaves it (``flush``).

    Each is one layer, as its ``append`` does it; the step that puts the layer back is timed alone and taken off.
    ``step_append``, ``step_flush``: the engine's kernel, whose plan lies on the device.  ``*_launches``: graph nodes.
    Raises ``ValueError`` for a method whose room does not measure it, and tokens that do not fill the ring.
    """
    own = room_of(method).measures
    if own is None:
        raise ValueError(f"method {method.name}: its room does not say how to put a layer back by one token")
    own.check_flushes(method, shape.num_tokens)
    row: dict[str, Any] = {}
    for name, num_tokens in (("append", shape.num_tokens - 1), ("flush", shape.num_tokens)):
        figures = time_appending(bench, replace(shape, num_tokens=num_tokens), method, own)
        row |= {f"{prefix}{name}_{what}": value for (prefix, what), value in figures.items()}
    return row


def time_appending(bench: Bench, shape: Shape, method: Method, own: Any) -> dict[tuple[str, str], Any]:
    """Seconds and launches of one more token for layers that hold the shape's; ``own``: the room's measures."""
    tokens = Tokens(bench, shape, dtype_of(method))
    layers = filled_layers(bench, method, tokens, room=own.room_beside(method))
    key, value = tokens.pair(1)
    rewinds = [own.rewinder(layer) for layer in layers]
    alone = bench.timer(rewinds).seconds

    def timed(store: Callable[..., Any]) -> float:
        def one(layer: Any, rewind: Call) -> None:
            rewind()
            store(layer)

        return bench.timer([partial(one, *pair) for pair in zip(layers, rewinds, strict=True)]).seconds - alone

    def step() -> float:
        rewinds[0]()  # the lengths that the kernel is told are this layer's, which ``launches`` left a token longer
        query = tokens.draw(shape.num_q_heads, 1)
        store = own.storer(layers[0], shape.num_q_heads)
        return timed(lambda layer: store(layer, query, key, value))

    seconds = timed(lambda layer: layer.append(key, value))
    rewinds[0]()
    nodes = launches(bench, lambda: layers[0].append(key, value))
    return {("", "seconds"): seconds, ("", "launches"): nodes, ("step_", "seconds"): attempt(step)}


def launches(bench: Bench, call: Call) -> int | None:
    """Kernels, fills and copies that ``call`` puts on the device, as nodes of its CUDA graph; None where not known."""
    if bench.device.type != "cuda":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        graph.enable_debug_mode()
        with torch.cuda.graph(graph):
            call()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            graph.debug_dump(str(path))
            return len(set(re.findall(r'"(graph_\d+_node_\d+)"', path.read_text(errors="replace")))) or None
    except Exception:
        return None
