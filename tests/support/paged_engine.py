"""The pools of one layer and the tables of some rows, as an engine keeps them, for tests of pages.

Pools are poisoned, and tables hold places alone that a step may look at.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

from kvruntime import paged
from kvruntime.methods import room_of
from kvsim.layout import LayerShape
from kvsim.methods import Full, Kivi, PerTokenHead, TurboQuant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, GROUP, ROWS, MOST, NOWHERE = 2, 2, 3, 192, -(1 << 30)
METHODS = {
    "2-bit g32": (Kivi(residual_length=64), 64),
    "4-bit g64": (Kivi(nbits=4, group_size=64, residual_length=64), 64),
    "3-bit d96": (Kivi(nbits=3, residual_length=32), 96),
    "rotated values": (Kivi(2, value_nbits=4, residual_length=64, rotate_values=True), 64),
    "fp16": (Full(), 64),
    "turboquant 3": (TurboQuant(3), 128),
    "turboquant 2.5 and 4": (TurboQuant(key_nbits=2.5), 64),
    "int4": (PerTokenHead("int4", scale_dtype="float16"), 80),
    "int8": (PerTokenHead("int8"), 64),
    "fp8": (PerTokenHead("fp8"), 64),
}


class Engine(NamedTuple):
    """The pools of one layer and the tables of its rows."""

    method: object
    dim: int
    pages: paged.Pages
    blocks: torch.Tensor
    places: torch.Tensor

    def batch(self, before: list[int], counts: tuple[int, ...]) -> paged.Batch:
        """A step, with the tables' needed places alone."""
        after = [n + count for n, count in zip(before, counts, strict=True)]
        shape = paged.page_shape(self.method, LayerShape(HEADS, self.dim, self.dim))
        size = shape.exact_tokens or shape.record_tokens
        blocks, places = self.blocks.clone(), self.places.clone()
        slots, stored = [], places if shape.exact_tokens else blocks
        for row, (n, end) in enumerate(zip(before, after, strict=True)):
            slots += [int(stored[row, t // size]) * size + t % size for t in range(n, end)]
            needed = {t // size for t in range(paged.num_packed(self.method, n), end)}
            places[row, [page for page in range(places.shape[1]) if page not in needed]] = NOWHERE
            if blocks.shape[1]:
                blocks[row, -(-paged.num_packed(self.method, end) // shape.record_tokens) :] = NOWHERE
        numbers = torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(after, dtype=torch.int32)
        tensors = (x.to(DEVICE) for x in (*numbers, blocks, places, torch.tensor(slots, dtype=torch.int64)))
        return paged.batch(self.method, *tensors, max(counts))


def engine(name: str) -> Engine:
    method, dim = METHODS[name]
    shape = paged.page_shape(method, LayerShape(HEADS, dim, dim))
    generator = torch.Generator().manual_seed(1)
    tables = []
    for size in (shape.record_tokens, shape.exact_tokens):
        each = MOST // size if size else 0
        order = torch.randperm(ROWS * each + 2, generator=generator)[: ROWS * each]
        tables.append(order.view(ROWS, each).int())
    records = None
    if shape.record_tokens:
        words = shape.record_nbytes // HEADS // 4
        records = torch.full((tables[0].numel() + 2, HEADS, words), -7, dtype=torch.int32, device=DEVICE)
    pool = (tables[1].numel() + 2, HEADS, shape.exact_tokens, 2 * dim)
    exact = torch.full(pool, float("nan"), dtype=torch.float16, device=DEVICE)
    return Engine(method, dim, paged.Pages(records, *exact.split(dim, 3)), *tables)


def line(seed: int, tokens: int, heads: int, dim: int) -> torch.Tensor:
    made = torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(seed))
    return made.half().to(DEVICE)


def step(one: Engine, run: ModuleType, batch: paged.Batch, seed: int) -> torch.Tensor:
    tokens = int(batch.starts[-1])
    key, value = (line(seed + i, tokens, HEADS, one.dim) for i in range(2))
    query = line(seed + 2, tokens, HEADS * GROUP, one.dim)
    run.store(one.method, key, value, one.pages, batch)
    run.pack(one.method, one.pages, batch)
    return run.attend(one.method, query, key, value, one.pages, batch, 0.125)


def modules(method: object) -> tuple[ModuleType, ModuleType]:
    reference = room_of(method).paged
    return reference, import_module(f"{reference.__name__}_kernels")
