"""Decode steps under transformers' tensor parallelism: stock cache, kvruntime's, and ``Engine`` in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache

import kvruntime
from kvruntime.bench.harness.session import release
from kvruntime.bench.harness.store import Row
from kvruntime.hf.cache import argument
from kvruntime.hf.models import layer_shapes
from kvsim.engines import make_engine
from kvsim.layout import Method
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.models.model import Model
from validation.ranks.group import Group

STOCK = "DynamicCache"
WAYS = ("model", "engine", "engine without all-reduces")
"""The model's own forward as the host launches it; ``Engine``; and that with its all-reduces left out: the difference
is what they take."""
WARM, STEPS, PASSES = 4, 16, 3


class Load:
    """``batch_size`` rows up to ``num_tokens`` tokens of one split model."""

    def __init__(self, group: Group, model: Any, batch_size: int, num_tokens: int) -> None:
        self.group, self.model, self.batch_size, self.num_tokens = group, model, batch_size, num_tokens
        self.vocab_size = model.config.vocab_size
        self.held = num_tokens - WARM - STEPS * PASSES
        if self.held < 1:
            raise ValueError(f"{num_tokens} tokens: allowed are {WARM + STEPS * PASSES + 1} and above")

    def rows(self, way: str, methods: Sequence[Method]) -> Iterator[Row]:
        """A row a method; of the model's own forward one of the stock cache first.  One that fails says why."""
        for method in (None, *methods) if way == WAYS[0] else methods:
            try:
                yield self.row(way, method)
            except (RuntimeError, ValueError) as error:
                failed = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                yield self.about(way, method) | {"failed": failed}

    def about(self, way: str, method: Method | None) -> Row:
        about: Row = {"kind": "step", "way": way, "method": STOCK if method is None else method.name}
        return about | {"batch_size": self.batch_size, "num_tokens": self.num_tokens}

    def row(self, way: str, method: Method | None) -> Row:
        """Seconds a step ``[median, least, most]`` of the slowest rank, bytes a rank, and whether tokens are equal."""
        found = self.about(way, method)
        release()
        cuda = self.group.device.type == "cuda"
        if cuda:  # of this row alone, also after one that failed
            torch.cuda.reset_peak_memory_stats()
        self.group.wait()
        with torch.no_grad(), silent() if way == WAYS[2] else _as_it_is():
            if way == WAYS[0] or method is None:
                step, tokens, cache = self.model_step(method)
            else:
                step, tokens, cache = self.engine_step(method)
            passes = self.group.slowest(self.timed(step))
        found["seconds_per_step"] = [median(passes), min(passes), max(passes)]
        if way != WAYS[2]:
            found["equal_tokens"] = self.group.equal(tokens())
        if method is not None:
            found |= {"nbytes": cache.nbytes, "kvsim_nbytes": self.nbytes(method)}
        if cuda:
            peak = torch.cuda.max_memory_allocated()
            found["peak_nbytes"] = int(self.group.slowest([peak])[0])
        return found

    def nbytes(self, method: Method) -> int:
        """kvsim's bytes of a rank."""
        model = Model.from_config(self.model.config.to_dict())
        split = Sharding(tensor_parallel_size=self.group.ranks)
        engine = make_engine("kvruntime", max_seq_len=self.num_tokens)
        return Deployment(model, method, engine, split).rank_nbytes(self.batch_size, self.num_tokens)

    def timed(self, step: Callable[[], Any]) -> list[float]:
        """Seconds of one of ``STEPS`` steps back to back, pass by pass."""
        for _ in range(WARM):
            step()
        out = []
        for _ in range(PASSES):
            self.group.wait()
            start = perf_counter()
            for _ in range(STEPS):
                step()
            if self.group.device.type == "cuda":
                torch.cuda.synchronize()
            out.append((perf_counter() - start) / STEPS)
        return out

    def engine_step(self, method: Method) -> tuple[Callable[[], Any], Callable[[], torch.Tensor], Any]:
        engine = kvruntime.Engine(self.model, method, batch_size=self.batch_size, max_seq_len=self.num_tokens)
        engine.fill(self.held, seed=self.group.rank)
        engine.tokens.copy_(self.first_tokens()[:, 0])
        return engine.step, lambda: engine.tokens, engine

    def model_step(self, method: Method | None) -> tuple[Callable[[], Any], Callable[[], torch.Tensor], Any]:
        """``model(...)`` as transformers' ``generate()`` calls it, its host's work included."""
        if method is None:
            cache: Any = DynamicCache(config=self.model.config)
        else:
            cache = kvruntime.make_cache(self.model, method, max_seq_len=self.num_tokens)
        generator = torch.Generator(self.group.device).manual_seed(self.group.rank)
        for index, shape in enumerate(layer_shapes(self.model)):
            size = self.batch_size, shape.num_kv_heads, self.held
            given = {"dtype": self.model.dtype, "device": self.group.device, "generator": generator}
            cache.update(
                torch.randn(*size, shape.key_dim, **given), torch.randn(*size, shape.value_dim, **given), index
            )
        tokens = self.first_tokens()
        position = torch.full_like(tokens, self.held)

        def step() -> None:
            out = self.model(tokens, position_ids=position, use_cache=True, logits_to_keep=1, **argument(cache))
            tokens.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
            position.add_(1)

        return step, lambda: tokens, cache

    def first_tokens(self) -> torch.Tensor:
        """``[batch_size, 1]``, on every rank the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocab_size, (self.batch_size, 1), generator=generator).to(self.group.device)


@contextmanager
def silent() -> Iterator[None]:
    """All-reduces of the model do nothing: its numbers are wrong, its other work is the same."""
    stock = dist.all_reduce

    def nothing(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        return stock(tensor, *args, **kwargs) if group is None else None

    dist.all_reduce = nothing
    try:
        yield
    finally:
        dist.all_reduce = stock


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
