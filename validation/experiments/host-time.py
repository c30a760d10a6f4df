"""What a decode step without a graph costs the host: the model of Llama-3.2-1B's shape, random weights, at 1 x 4k.

``python host-time.py METHOD ...``, as commands take methods, steps ``DynamicCache`` and planned caches in turns: each
meets the same host.  It prints of every cache the milliseconds until a forward returns, which waits for nothing: the
least, the lower quartile and the median of ``ROUNDS``, and the median of what it takes more than ``DynamicCache`` in
the same round.  Then the same with a hook on one module, because of which a cache as it comes has no graph.  The
dynamic cache's lengths were seen before: cuDNN plans its attention anew for each.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
import transformers

from kvruntime import make_cache
from kvruntime.bench.generate.suite import prompt
from kvruntime.hf.cache import argument
from kvruntime.kernels import launch

TOKENS, FIRST, ROUNDS = 4096, 6, 90
BY_LAUNCHER = ", by Triton's launcher"


def made() -> Any:
    """The model, on the GPU."""
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


@torch.no_grad()
def in_turns(model: Any, makers: dict[str, Callable[[], Any]], direct: dict[str, bool]) -> dict[str, list[float]]:
    """Milliseconds of the host, of ``ROUNDS`` steps of each cache.  ``direct``: whether its launches are recorded to
    call Triton's function of C, where that is known."""
    ids = prompt(model, 1, TOKENS, 0)
    mask = torch.ones(1, TOKENS + FIRST + ROUNDS, dtype=torch.long, device="cuda")
    caches, held, known = {name: make() for name, make in makers.items()}, dict.fromkeys(makers, TOKENS), launch.DIRECT
    taken: dict[str, list[float]] = {name: [] for name in makers}

    def step(name: str) -> None:
        held[name] += 1
        model(ids[:, :1], attention_mask=mask[:, : held[name]], **argument(caches[name]))

    for name, cache in caches.items():
        launch.DIRECT = known and direct.get(name, True)
        model(ids, logits_to_keep=1, **argument(cache))
        for _ in range(FIRST):
            step(name)
    launch.DIRECT, order = known, list(makers)
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for name in order:
            torch.cuda.synchronize()
            start = perf_counter()
            step(name)
            taken[name].append(1e3 * (perf_counter() - start))
        order.append(order.pop(0))
    gc.enable()
    return taken


def main(methods: list[str]) -> None:
    model = made()
    makers: dict[str, Callable[[], Any]] = {"DynamicCache": lambda: transformers.DynamicCache(config=model.config)}
    in_turns(model, dict(makers), {})
    for method in methods:
        makers[f"{method}, planned"] = partial(make_cache, model, method, compiled=False)
    last = f"{methods[-1]}, planned"
    show("no hook", in_turns(model, makers | {last + BY_LAUNCHER: makers[last]}, {last + BY_LAUNCHER: False}))
    model.model.layers[-1].mlp.register_forward_hook(lambda *_: None)
    show("a hook", in_turns(model, makers | {methods[-1]: partial(make_cache, model, methods[-1])}, {}))


def show(title: str, taken: dict[str, list[float]]) -> None:
    """A line of JSON a cache."""
    base = taken["DynamicCache"]
    for name, each in taken.items():
        more = median(own - other for own, other in zip(each, base, strict=True))
        row = {"model": title, "cache": name, "least_ms": min(each), "quartile_ms": quantiles(each)[0]}
        print(json.dumps(row | {"median_ms": median(each), "more_than_dynamic_ms": more}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
