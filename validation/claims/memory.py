"""Claim: a cache holds exactly the bytes that kvsim predicts, at every length, and nothing beside them.

``layers``: layer objects filled with random keys and values, no model; any length, beyond a model's positions too.
``generate``: the real thing, ``model.generate()`` on the model's shape with seeded random weights.
"""

from __future__ import annotations

from typing import Any

import torch

from kvruntime.bench.harness.weigh import weigh
from kvruntime.checkpoints.load import shape_sha256
from kvruntime.methods import Layer, make_layer, shared_tensors
from kvsim.layout import LayerShape, Method
from kvsim.models.load import load_config
from validation.claims.predict import load_row_model
from validation.claims.subjects import Grid, describe_method, lengths
from validation.claims.tasks import Row, Task
from validation.scales.allocator import Allocator

SEED = 0


def layer_tasks(grid: Grid, device: torch.device) -> list[Task]:
    """Every method at its boundary lengths, made for the length exactly and grown; single tokens one by one."""
    tasks = []
    for index, name in enumerate(grid.models):
        for method in grid.grid if index == 0 else grid.core:
            if not fits(name, method):
                continue
            for known in (True, False):
                tasks.append(_boundary_task(grid, name, method, device, known))
    for method in grid.step_methods:
        if fits(grid.models[0], method):
            tasks.append(_step_task(grid, grid.models[0], method, device))
    return tasks


def fits(name: str, method: Method) -> bool:
    """Whether the method holds the model's heads (a group of 64 channels does not divide a head of 80)."""
    try:
        for shape in set(load_row_model(name).cache_layers):
            method.buffers(shape, 1, 1)
    except ValueError:
        return False
    return True


def random_tokens(shape: LayerShape, batch_size: int, num_tokens: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Key and value ``[batch_size, num_kv_heads, num_tokens, dim]``."""
    generator = torch.Generator(device).manual_seed(SEED)
    return tuple(
        torch.randn(batch_size, shape.num_kv_heads, num_tokens, dim, generator=generator, device=device, dtype=dtype)
        for dim in (shape.key_dim, shape.value_dim)
    )


def activations(device: torch.device) -> torch.dtype:
    """What models compute in: float16 on CUDA, float32 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32


def base_row(kind: str, way: str, name: str, method: Method, num_layers: int, device: torch.device) -> Row:
    """The fields that every row on memory has."""
    dtype = str(activations(device)).removeprefix("torch.")
    described = {"model": name, "method": describe_method(method), "num_layers": num_layers, "batch_size": 1}
    return {"kind": kind, "way": way, **described, "dtype": dtype, "device": device.type, "unit": "B"}


def _boundary_task(grid: Grid, name: str, method: Method, device: torch.device, known: bool) -> Task:
    points = lengths(method, grid.longest)
    kind = "exactly" if known else "grown"

    def measure() -> list[Row]:
        shapes = load_row_model(name).cache_layers[: grid.fill_layers]
        filling = {shape: random_tokens(shape, 1, points[-1], device, activations(device)) for shape in set(shapes)}
        layers: list[Layer] = []
        trace = []
        held = Allocator(device) if device.type == "cuda" else None
        if held:
            held.__enter__()
        for num_tokens in points:
            done = 0 if known or not layers else layers[0].seq_lengths[0]
            if known or not layers:
                layers.clear()
                shared = shared_tensors(method, shapes, device)
                size = num_tokens if known else None
                layers += [make_layer(method, shape, 1, size, device, shared) for shape in shapes]
            for layer, shape in zip(layers, shapes, strict=True):
                key, value = filling[shape]
                new_key, new_value = (x[:, :, done:num_tokens] for x in (key, value))
                layer.append(new_key, new_value, None, new_key if layer.wants_query else None)
            trace.append([num_tokens, weigh(layers)])
        row = base_row("memory", "layers", name, method, len(shapes), device)
        row |= {"provided": kind, "max_seq_len": points[-1] if known else None, "num_tokens": points[-1]}
        rows = [{**row, "measured": trace[-1][1], "trace": trace}]
        if held:
            rows += held.rows({**row, "kind": "held"}, held.now)
        return rows

    cost = points[-1] * (grid.fill_layers or 4) * (1 if known else 0.7)
    about = about_model(name, method) | {"num_tokens": points[-1]}
    if grid.fill_layers is not None:
        about["num_layers"] = min(grid.fill_layers, len(load_row_model(name).cache_layers))
    shown = f"layers {name} {method.name} {method_dtype(method)} {kind}"
    return Task(shown, cost, f"{name} {method}", measure, about)


def about_model(name: str, method: Method) -> Row:
    """What a task's name leaves out: a model file may change, a method's name is not all of it."""
    return {"model_sha256": shape_sha256(load_config(name)[1]), "method": describe_method(method)}


def method_dtype(method: Method) -> str:
    """The type of the method's exact tokens: two methods may differ in nothing else."""
    return str(getattr(method, "dtype", ""))


def _step_task(grid: Grid, name: str, method: Method, device: torch.device) -> Task:
    def measure() -> list[Row]:
        model = load_row_model(name)
        shape, dtype = model.cache_layers[0], activations(device)
        key, value = random_tokens(shape, 1, grid.steps, device, dtype)
        query = torch.randn(1, model.num_q_heads, 1, shape.key_dim, device=device, dtype=dtype)
        layer = make_layer(method, shape, 1, None, device)
        trace: list[list[int]] = []
        for step in range(grid.steps):
            layer.append(key[:, :, step : step + 1], value[:, :, step : step + 1], None, query)
            layer.attend(query, shape.key_dim**-0.5)
            note(trace, step + 1, weigh(layer))
        row = base_row("memory", "layers", name, method, 1, device)
        row |= {"provided": "grown", "max_seq_len": None, "num_tokens": grid.steps, "every_step": True}
        return [{**row, "measured": weigh(layer), "trace": trace}]

    shown = f"steps {name} {method.name} {grid.steps}"
    return Task(shown, 4 * grid.steps, f"{name} {method}", measure, about_model(name, method))


def note(trace: list[list[int]], num_tokens: int, nbytes: int) -> None:
    """Adds a weighing to a trace of every step, which keeps only changes."""
    if not trace or trace[-1][1] != nbytes:
        trace.append([num_tokens, nbytes])
