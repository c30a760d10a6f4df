"""The cache under the real ``generate()``: weighed after every forward, with the peaks of prefill and of decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvsim.layout import Method
from kvsim.load import load_config
from kvsim.methods import Kivi
from validation.allocator import Allocator
from validation.memory import SEED, activations, base_row, fits, note
from validation.peak import planned_splits
from validation.subjects import Grid
from validation.tasks import Row, Task
from validation.transients import modelled
from validation.weigh import weigh


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
        from kvruntime.weights import Source, load

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
        if holder.device.type == "cuda":  # compiles the kernels, so that nothing of that is in the peak
            _run(model, method, prompt, 2, holder.device)
        return _rows(name, method, prompt, _run(model, method, prompt, new, holder.device), holder.device)

    return Task(f"generate {name} {method.name} {prompt}+{new}", 300 + 30 * new, measure)


class Observer:
    """A stopping criterion that stops nothing: called after every forward, it weighs the cache and reads the peak."""

    def __init__(self, cache: Any, held: Allocator, prompt: int) -> None:
        self.cache, self.held, self.num_tokens = cache, held, prompt
        self.trace: list[list[int]] = []
        self.prefill = self.decode = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        peak = self.held.peak
        if self.trace:
            self.num_tokens += 1
            self.decode = max(self.decode, peak)
        else:
            self.prefill = peak
        note(self.trace, self.num_tokens, weigh(self.cache))
        self.held.restart()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _run(model: Any, method: Method, prompt: int, new: int, device: torch.device) -> dict[str, Any]:
    from transformers import StoppingCriteriaList

    from kvruntime import make_cache

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=generator).to(device)
    known = prompt + new - 1  # the last token is not fed back
    with Allocator(device) as held, torch.inference_mode():
        cache = make_cache(model, method, max_seq_len=known)
        observer = Observer(cache, held, prompt)
        with _quiet():
            model.generate(
                ids,
                past_key_values=cache,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([observer]),
            )
        allocated = held.now
    splits = {}
    if device.type == "cuda" and isinstance(method, Kivi):
        splits = {"num_splits": planned_splits(method, cache.stores[0], device)}
    peaks = {"prefill": observer.prefill, "decode": observer.decode}
    return {
        "trace": observer.trace,
        "peaks": peaks,
        "allocated": allocated,
        "measured": weigh(cache),
        "known": known,
        "num_tokens": observer.num_tokens,
        "rounding": held.rounding,
        "splits": splits,
        "layers": len(cache.layers),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rows(name: str, method: Method, prompt: int, ran: dict[str, Any], device: torch.device) -> list[Row]:
    row = base_row("memory", "generate", name, method, ran["layers"], device)
    row |= {"weights": f"random (seed {SEED})", "provided": "known", "max_seq_len": ran["known"]}
    row |= {"prompt_tokens": prompt, "num_tokens": ran["num_tokens"]}
    rows = [row | {"every_step": True, "measured": ran["measured"], "trace": ran["trace"]}]
    rounding = {"rounding": ran["rounding"]}
    rows.append(row | rounding | {"kind": "allocated", "measured": ran["allocated"]})
    if modelled(load_config(name)[1]):
        for phase, peak in ran["peaks"].items():
            rows.append(row | rounding | {"kind": "peak", "phase": phase, "measured": peak, **ran["splits"]})
    return rows
