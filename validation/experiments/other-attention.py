"""Stock ``generate()`` of models whose layers slide, are chunked or keep latents: before steps were graphs, and since.

    python other-attention.py OUT.json METHOD [SECONDS] [MODEL ...]

Random weights, greedy, one call a cache: milliseconds a step from the 8th to the 72nd new token, what the first step of
a capture takes, bytes of the cache and those that kvsim says.  ``append, attend``: the host plans a step's storing and
attending apart, as it did before packed windows had a step.  A line of JSON each.  METHOD: as
``kvsim --method`` takes it; SECONDS: after which nothing begins; MODEL: of ``MODELS``, all by default.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import kvruntime
from kvruntime.bench.generate.suite import LONG, SHORT, Clock
from kvruntime.hf.cache import argument
from kvruntime.methods.evict.layer import EvictLayer
from kvsim.engines import make_engine
from kvsim.models.model import Model
from kvsim.specs import parse_method

MISTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
}  # fmt: skip
LLAMA4 = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 4096, "intermediate_size_mlp": 4096,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "num_local_experts": 4, "attention_chunk_size": 2048, "max_position_embeddings": 32768,
}  # fmt: skip
DEEPSEEK = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 32768,
}  # fmt: skip
MODELS = {
    "mistral-7b-v0.1": ("MistralConfig", MISTRAL, (8, 16384)),
    "llama-4, 8 layers": ("Llama4TextConfig", LLAMA4, (4, 4096)),
    "deepseek-v2-lite, 8 experts": ("DeepseekV3Config", DEEPSEEK, (8, 8192)),
}
out, method = Path(sys.argv[1]), parse_method(sys.argv[2], {}, "bfloat16")
seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 3600.0
start = time.perf_counter()
rows: list[dict[str, Any]] = []


def write(**row):
    rows.append(row)
    out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}))
    print(json.dumps(row), flush=True)


def build(name, options):
    config = getattr(transformers, name)(**options, dtype="bfloat16", eos_token_id=None)
    with torch.device("cuda"):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(model, what, size, make, text):
    if time.perf_counter() - start > seconds:
        return
    ids = torch.randint(3, 32000, size, generator=torch.Generator().manual_seed(1)).cuda()
    try:
        cache = make()
        times, tokens = Clock("cuda")(model, ids, LONG, cache)
    except Exception as error:
        write(model=what, cache=text, size=size, error=f"{type(error).__name__}: {error}"[:300])
        return
    row = {"model": what, "cache": text, "size": size, "prefill_seconds": times[0]}
    row["ms_a_step"] = 1e3 * (times[LONG - 1] - times[SHORT - 1]) / (LONG - SHORT)
    row["slowest_ms"] = 1e3 * max(after - before for before, after in pairwise(times))
    if isinstance(cache, kvruntime.Cache):
        held = size[1] + LONG - 1
        said = make_engine("kvruntime").parts(Model.from_config(model.config.to_dict()), cache.method, size[0], held)
        row |= {"nbytes": cache.nbytes, "kvsim_nbytes": sum(said.values()), "steps": getattr(cache, "steps", "planned")}
        row |= {"provided": cache.num_provided, "step_nbytes": cache.step_nbytes}
    else:
        row["nbytes"] = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    write(**row, tokens=tokens[:, size[1] :].sum(1).tolist())


def planned(model):
    EvictLayer.prefers_steps = property(lambda self: False)
    return kvruntime.make_cache(model, method, compiled=False)


def ways(model, what, size):
    steps = EvictLayer.__dict__.get("prefers_steps") if hasattr(model.config, "sliding_window") else None
    measure(model, what, size, lambda: kvruntime.make_cache(model, method), "graph")
    measure(model, what, size, lambda: DynamicCache(config=model.config), "DynamicCache")
    if steps is not None:
        measure(model, what, size, lambda: planned(model), "append, attend")
        EvictLayer.prefers_steps = steps
    measure(model, what, size, lambda: kvruntime.make_cache(model, method, compiled=False), "planned")


for what, (name, options, size) in MODELS.items():
    if sys.argv[4:] and not any(what.startswith(word) for word in sys.argv[4:]):
        continue
    model = build(name, options)
    write(model=what, method=method.name, built=time.perf_counter() - start)
    warm = torch.randint(3, 32000, (8, 64)).cuda()
    model.generate(warm, max_new_tokens=8, do_sample=False, **argument(kvruntime.make_cache(model, method)))
    ways(model, what, size)
    del model
    torch.cuda.empty_cache()
