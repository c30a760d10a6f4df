"""Generation speed: prefill and decode timed apart, a greedy loop around the model, the same for every cache."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kvruntime.bench.harness.tables import of_kernel
from kvruntime.bench.model.caches import Contender
from kvruntime.checkpoints.load import LoadedModel

Tick = Callable[[float], None]


def measure_speed(
    loaded: LoadedModel,
    contender: Contender,
    batch_size: int,
    *,
    prompt_tokens: int,
    decode_tokens: int,
    warmup: int,
    repeats: int,
    seed: int,
    tick: Tick = lambda _: None,
) -> dict[str, Any]:
    """Seconds of ``repeats`` runs after ``warmup`` ones, each on a fresh cache.

    Prefill: ``batch_size`` prompts of ``prompt_tokens`` random tokens in one forward.  Decode: ``decode_tokens``
    greedy steps, each one forward of one token a row, the next token taken on the device.  ``tokens_per_second``
    counts all rows, ``ms_per_token`` is one step; each is ``[median, min, max]`` over the repeats.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("decode tokens", decode_tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} {value}: allowed are 1 and above")
    limit = loaded.max_positions
    if limit is not None and prompt_tokens + decode_tokens > limit:
        raise ValueError(f"{prompt_tokens} prompt + {decode_tokens} decode tokens exceed the model's {limit} positions")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(loaded.vocab_size, (batch_size, prompt_tokens), generator=generator).to(loaded.device)
    prefill: list[float] = []
    decode: list[float] = []
    with torch.inference_mode(), contender.around(loaded.model):
        for turn in range(warmup + repeats):
            *seconds, kernel = _run(loaded, contender, ids, decode_tokens)
            if turn >= warmup:
                prefill.append(seconds[0])
                decode.append(seconds[1])
            tick(1 / (warmup + repeats))
    return {
        "prefill_seconds": _spread(prefill),
        "tokens_per_second": _spread([batch_size * decode_tokens / seconds for seconds in decode]),
        "ms_per_token": _spread([1e3 * seconds / decode_tokens for seconds in decode]),
        "prefill_runs": prefill,
        "decode_runs": decode,
        **kernel,
    }


def _run(
    loaded: LoadedModel, contender: Contender, ids: torch.Tensor, decode_tokens: int
) -> tuple[float, float, dict[str, Any]]:
    from kvruntime.hf.cache import argument

    model, length = loaded.model, ids.shape[1] + decode_tokens
    cache = contender.build(model, length)
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    wait()
    start = perf_counter()
    logits = model(ids, **argument(cache), use_cache=True, logits_to_keep=1).logits
    wait()
    middle = perf_counter()
    for _ in range(decode_tokens):
        token = logits[:, -1:].argmax(-1)
        logits = model(token, **argument(cache), use_cache=True, logits_to_keep=1).logits
    wait()
    return middle - start, perf_counter() - middle, of_kernel(cache)


def _spread(values: list[float]) -> list[float]:
    return [median(values), min(values), max(values)]
