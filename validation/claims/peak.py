"""Claim: the worst moment of a layer's work needs the cache and the few tensors that kvsim's figure counts.

On CUDA the caching allocator's peak counter is asked, elsewhere live tensors are counted as they come and go.
"""

from __future__ import annotations

from typing import Any

import torch

from kvruntime.methods import LAYERS, make_layer
from kvsim.layout import Method
from validation.claims.memory import about_model, activations, base_row, fits, random_tokens
from validation.claims.predict import load_row_model
from validation.claims.subjects import Grid
from validation.claims.tasks import Row, Task
from validation.claims.transients import predicts
from validation.scales.allocator import Allocator


def peak_tasks(grid: Grid, device: torch.device) -> list[Task]:
    """Bulk append, one query, and growth by a block, one layer each, of the methods whose peaks are predicted."""
    return [
        _task(name, method, num_tokens, device)
        for name in grid.peak_models
        for method in grid.core
        for num_tokens in grid.peak_lengths
        if fits(name, method) and predicts(method, device.type)
    ]


def _task(name: str, method: Method, num_tokens: int, device: torch.device) -> Task:
    def measure() -> list[Row]:
        model, dtype = load_row_model(name), activations(device)
        shape = model.cache_layers[0]
        key, value = random_tokens(shape, 1, num_tokens + 1, device, dtype)
        query = torch.randn(1, model.num_q_heads, 1, shape.key_dim, device=device, dtype=dtype)
        warm = make_layer(method, shape, 1, num_tokens, device)  # compiles kernels, brings library workspaces
        warm.append(key[:, :, :num_tokens], value[:, :, :num_tokens])
        warm.attend(query, shape.key_dim**-0.5)
        del warm
        base = base_row("peak", "layers", name, method, 1, device) | {"num_tokens": num_tokens}
        known = base | {"provided": "known", "max_seq_len": num_tokens}
        with Allocator(device) as held:
            layer = make_layer(method, shape, 1, num_tokens, device)
            layer.append(key[:, :, :num_tokens], value[:, :, :num_tokens])
            rows = held.rows(known | {"phase": "append"}, held.peak)
            held.restart()
            layer.attend(query, shape.key_dim**-0.5)
            rows += held.rows(known | {"phase": "attend", **splits(method, layer, query)}, held.peak)
        del layer
        with Allocator(device) as held:
            layer = make_layer(method, shape, 1, None, device)
            layer.append(key[:, :, :num_tokens], value[:, :, :num_tokens])
            held.restart()
            layer.append(key[:, :, num_tokens:], value[:, :, num_tokens:])
            rows += held.rows(base | {"phase": "grow", "provided": "grown", "max_seq_len": None}, held.peak)
        return rows

    shown = f"peak {name} {method.name} {num_tokens}"
    return Task(shown, num_tokens * 2, f"{name} {method}", measure, about_model(name, method))


def splits(method: Method, layer: Any, query: torch.Tensor) -> dict[str, int]:
    """How many ways the kernel that attends ``query`` over ``layer`` splits the tokens, as it plans it itself."""
    count = LAYERS[type(method)].splits
    return {"num_splits": count(layer, query)} if query.is_cuda and count is not None else {}
