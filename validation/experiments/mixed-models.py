"""Steps of models that mix layers under stock ``generate()``: random weights in the shapes of Gemma 3 4B, of gpt-oss
20B's first six layers and of Qwen3.5 27B's first eight.

``python mixed-models.py`` prints the median of a step in milliseconds with ``DynamicCache``, with a cache of 2 bits as
it comes, and with one whose every step the host plans; and how its steps ran.
"""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import transformers

from kvruntime import make_cache
from kvruntime.bench.generate.suite import Clock
from kvruntime.methods.kivi.benched import LAYOUTS
from kvsim.models.load import load_config

SUBJECTS = {"gemma-3-4b-it": (34, 1, 16384), "gpt-oss-20b": (6, 1, 8192), "Qwen3.5-27B": (8, 1, 2048)}
"""Name -> layers, batch size, tokens of the prompt."""
METHOD = replace(LAYOUTS[3], residual_length=64, dtype="bfloat16")
FIRST, LAST = 8, 40


def made(name: str, num_layers: int) -> Any:
    """The model, on the GPU."""
    config = load_config(name)[1]
    config = dict(config.get("text_config", config)) | {"num_hidden_layers": num_layers}
    for key in ("quantization_config", "layer_types"):
        config.pop(key, None)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
        )
    return model.eval()


def main() -> None:
    clock = Clock("cuda")
    for name, (num_layers, batch_size, num_tokens) in SUBJECTS.items():
        model = made(name, num_layers)
        ids = torch.randint(1, 1000, (batch_size, num_tokens), device="cuda")
        caches = {
            "DynamicCache": lambda model=model: transformers.DynamicCache(config=model.config),
            "as it comes": lambda model=model: make_cache(model, METHOD),
            "planned by the host": lambda model=model: make_cache(model, METHOD, compiled=False),
        }
        for what, make in caches.items():
            clock(model, ids, LAST, make())
            cache = make()
            at, _ = clock(model, ids, LAST, cache)
            step = median(later - at[index] for index, later in enumerate(at[1:]) if index >= FIRST)
            row = {"model": name, "layers": num_layers, "prompt": [batch_size, num_tokens], "cache": what}
            print(json.dumps(row | {"ms": round(1e3 * step, 2), "steps": getattr(cache, "steps", "")}), flush=True)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
