"""The cache under the real ``generate()``: weighed after every forward, with the peaks of prefill and of decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvruntime.bench.harness.weigh import weigh
from kvsim.layout import Method
from kvsim.models.load import load_config
from validation.claims.memory import SEED, about_model, activations, base_row, fits, note
from validation.claims.peak import splits
from validation.claims.subjects import Grid
from validation.claims.tasks import Row, Task
from validation.claims.transients import modelled, predicts
from validation.scales.allocator import Allocator

FEW = 8
"""Tokens of the prompt that a process which compiles nothing reads first."""


def generate_tasks(grid: Grid, device: torch.device) -> list[Task]:
    """Each run of the grid, one a method; the model is loaded once for runs that follow each other."""
    holder = ModelHolder(device)
    return [
        _task(holder, name, method, prompt, new)
        for name, prompt, new, methods in grid.generated
        for method in methods
        if fits(name, method)
    ]


class ModelHolder:
    """The model last asked for, on its device, with the workspaces of the libraries it calls already there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name, self.model = device, "", None

    def get(self, name: str) -> Any:
        if name == self.name:
            return self.model
        from kvruntime.checkpoints.load import Source, load

        self.name, self.model = "", None
        title, config = load_config(name)
        config = config.get("text_config", config)
        source = Source(title, f"random (seed {SEED})", config=config, seed=SEED)
        model = load(source, str(self.device), str(activations(self.device)).removeprefix("torch.")).model
        model.generation_config.eos_token_id = None  # random weights: an end may come at any token
        with torch.inference_mode():
            model.generate(
                torch.ones(1, 64, dtype=torch.int64, device=self.device),
                max_new_tokens=2,
                pad_token_id=0,
                do_sample=False,
            )
        self.name, self.model = name, model
        return model


def _task(holder: ModelHolder, name: str, method: Method, prompt: int, new: int) -> Task:
    def measure() -> list[Row]:
        model = holder.get(name)
        # compiles the kernels, and makes the tables that a process keeps, so that nothing of that is weighed
        _run(model, name, method, prompt if holder.device.type == "cuda" else FEW, 2, holder.device)
        return _run(model, name, method, prompt, new, holder.device)

    shown = f"generate {name} {method.name} {prompt}+{new}"
    return Task(shown, 2000 + 300 * new, f"{name} {method}", measure, about_model(name, method))


class Observer:
    """A stopping criterion that stops nothing: called after every forward, it weighs the cache and reads the peak."""

    def __init__(self, cache: Any, held: Allocator, prompt: int) -> None:
        self.cache, self.held, self.num_tokens = cache, held, prompt
        self.trace: list[list[int]] = []
        self.prefill: dict[str, int] = {}
        self.decode: dict[str, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        peak = self.held.peak
        if self.trace:
            self.num_tokens += 1
            self.decode = {name: max(self.decode.get(name, 0), value) for name, value in peak.items()}
        else:
            self.prefill = peak
        note(self.trace, self.num_tokens, weigh(self.cache) - self.cache.step_nbytes)
        self.held.restart()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _run(model: Any, name: str, method: Method, prompt: int, new: int, device: torch.device) -> list[Row]:
    from transformers import StoppingCriteriaList

    from kvruntime import make_cache, restore
    from kvruntime.hf.cache import argument

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=generator).to(device)
    mask = torch.ones_like(ids)  # a random token may be the padding one: not to be taken for padding
    known = prompt + new - 1  # the last token is not fed back
    with Allocator(device) as held, torch.inference_mode():
        cache = make_cache(model, method, max_seq_len=known, compiled=False)  # a graph's own pool is not predicted
        observer = Observer(cache, held, prompt)
        with _quiet():
            model.generate(
                ids,
                attention_mask=mask,
                **argument(cache),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([observer]),
            )
        restore(model)  # it keeps the ids of its last prompt, by which the next one is judged: no part of the cache
        left = held.now
    row = base_row("memory", "generate", name, method, len(cache.layers), device)
    row |= {"weights": f"random (seed {SEED})", "provided": "known", "max_seq_len": known}
    row |= {"prompt_tokens": prompt, "num_tokens": observer.num_tokens}
    rows = [row | {"every_step": True, "measured": weigh(cache) - cache.step_nbytes, "trace": observer.trace}]
    asked = {name for name, unit in held.counters.items() if unit == 1}  # blocks are rounded with what steps check in
    left = {name: size - cache.step_nbytes * (name in asked) for name, size in left.items()}
    rows += held.rows(row | {"kind": "held"}, left)
    if modelled(load_config(name)[1]) and predicts(method, device.type):
        store = cache.stores[0]
        heads, dim = model.config.num_attention_heads, store.shape.key_dim
        query = torch.zeros(1, heads, 1, dim, dtype=model.dtype, device=device)
        for phase, peak in (("prefill", observer.prefill), ("decode", observer.decode)):
            rows += held.rows(row | {"kind": "peak", "phase": phase, **splits(method, store, query)}, peak)
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
