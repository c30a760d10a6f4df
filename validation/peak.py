"""Claim: the worst moment of a layer's work needs the cache and the few tensors that kvsim's figure counts.

On CUDA the caching allocator's peak counter is asked, elsewhere live tensors are counted as they come and go.
"""

from __future__ import annotations

import torch

from kvruntime.layers import make_layer
from kvsim.layout import Method
from kvsim.methods import Kivi
from validation.allocator import Allocator
from validation.memory import activations, base_row, fits, random_tokens
from validation.predict import load_row_model
from validation.subjects import Grid
from validation.tasks import Row, Task


def peak_tasks(grid: Grid, device: torch.device) -> list[Task]:
    """Bulk append, one query, and growth by a block, one layer each, over long sequences."""
    return [
        _task(name, method, num_tokens, device)
        for name in grid.peak_models
        for method in grid.core
        for num_tokens in grid.peak_lengths
        if fits(name, method)
    ]


def _task(name: str, method: Method, num_tokens: int, device: torch.device) -> Task:
    def measure() -> list[Row]:
        model, dtype = load_row_model(name), activations(device)
        shape = model.layers[0]
        key, value = random_tokens(shape, 1, num_tokens + 1, device, dtype)
        query = torch.randn(1, model.num_q_heads, 1, shape.key_dim, device=device, dtype=dtype)
        warm = make_layer(method, shape, 1, num_tokens, device)  # compiles kernels, brings library workspaces
        warm.append(key[:, :, :num_tokens], value[:, :, :num_tokens])
        warm.attend(query, shape.key_dim**-0.5)
        del warm
        base = base_row("peak", "layers", name, method, 1, device) | {"num_tokens": num_tokens, "provided": "known"}
        rows = []
        with Allocator(device) as held:
            layer = make_layer(method, shape, 1, num_tokens, device)
            layer.append(key[:, :, :num_tokens], value[:, :, :num_tokens])
            base |= {"max_seq_len": num_tokens, "rounding": held.rounding}
            rows.append(base | {"phase": "append", "measured": held.peak})
            held.restart()
            layer.attend(query, shape.key_dim**-0.5)
            rows.append(
                base | {"phase": "attend", "measured": held.peak, **_splits(model.num_q_heads, method, layer, device)}
            )
        del layer
        if num_tokens % 256 == 0:
            with Allocator(device) as held:
                layer = make_layer(method, shape, 1, None, device)
                layer.append(key[:, :, :num_tokens], value[:, :, :num_tokens])
                held.restart()
                layer.append(key[:, :, num_tokens:], value[:, :, num_tokens:])
                grown = {"phase": "grow", "provided": "grown", "max_seq_len": None, "measured": held.peak}
                rows.append(base | grown)
        return rows

    return Task(f"peak {name} {method.name} {num_tokens}", num_tokens * 2, measure)


def _splits(num_q_heads: int, method: Method, layer: object, device: torch.device) -> dict[str, int]:
    """How many ways the decode kernel splits the tokens, as it plans it itself."""
    if device.type != "cuda" or not isinstance(method, Kivi):
        return {}
    return {"num_splits": planned_splits(method, layer, device)}


def planned_splits(method: Kivi, layer: object, device: torch.device) -> int:
    """The decode kernel's splits for one query a row of ``layer``."""
    from kvruntime.kivi.attention import plan_splits

    tensors = layer.tensors  # type: ignore[attr-defined]
    slots, records = tensors["exact_key"].shape[2], tensors["records"].shape[1]
    programs = tensors["exact_key"].shape[0] * tensors["exact_key"].shape[1]
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return plan_splits(programs, records * method.record_length + slots, sms)
