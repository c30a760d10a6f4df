"""What a decode step without a graph costs the host: the model of Llama-3.2-1B's shape, random weights, at 1 x 4k.

``python host-time.py`` prints, for ``DynamicCache`` and for a planned cache of 2 bits, milliseconds a step of
``generate()`` and those until a forward returns, which waits for nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers

from kvruntime import make_cache
from kvruntime.bench.generate.suite import Clock, prompt
from kvruntime.hf.cache import argument
from kvruntime.methods.kivi.benched import LAYOUTS

TOKENS, FIRST, LAST = 4096, 15, 55


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
        return transformers.LlamaForCausalLM(config).eval()


def main() -> None:
    model, clock = made(), Clock("cuda")
    torch.set_default_dtype(torch.float32)
    method = replace(LAYOUTS[3], dtype="bfloat16")
    caches = {
        "DynamicCache": lambda: transformers.DynamicCache(config=model.config),
        method.name: lambda: make_cache(model, method, compiled=False),
    }
    ids = prompt(model, 1, TOKENS, 0)
    for name, make in caches.items():
        clock(model, ids, 6, make())
        steps, host, cache = [], [], make()
        for _ in range(2):
            at, _ = clock(model, ids, LAST + 1, make())
            steps.append(1e3 * (at[LAST] - at[FIRST]) / (LAST - FIRST))
        with torch.no_grad():
            model(ids, logits_to_keep=1, **argument(cache))
            mask = torch.ones(1, TOKENS + LAST, dtype=torch.long, device="cuda")
            for turn in range(LAST):
                torch.cuda.synchronize()
                start = perf_counter()
                model(ids[:, :1], attention_mask=mask[:, : TOKENS + turn + 1], **argument(cache))
                host.append(1e3 * (perf_counter() - start))
        print(json.dumps({"cache": name, "ms_a_step": steps, "host_ms": median(host[FIRST:])}), flush=True)


if __name__ == "__main__":
    main()
