"""Decode steps of vLLM 0.26: kvruntime's plugin, bf16 or fp8, a shape with dummy weights such as Llama-3-8B's.

    export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_USE_V2_MODEL_RUNNER=0
    python vllm-decode.py MODEL '{"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"}' [WORKLOADS]
    torchrun --nproc-per-node N vllm-decode.py MODEL ...      # split over N GPUs by tensor parallelism

MODEL: a folder with config.json; then the engine's arguments, those of docs/serving.md for the plugin; then JSON in
place of ``WORKLOADS``.  Prints a JSON line a workload (requests, tokens a prompt, new tokens).  A step of more than 64
tokens, a prompt's chunk, runs no model, so that prompts cost nothing and pages hold zeros; only steps of decoding are
timed, from one call of the model to the next.  ``real`` workloads run everything.  Of several ranks the first prints.
"""

import json
import os
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import transformers
import triton
import vllm
from vllm import LLM, SamplingParams
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

WORKLOADS = [(8, 8192, 64, False), (32, 16384, 96, False), (64, 32768, 160, False)]
WORKLOADS += [(1, 8192, 2, True), (1, 8192, 2, True), (1, 32768, 2, True)]
DECODING = 64
"""Tokens of a step of decoding at most."""

calls: list[tuple[float, int, bool]] = []
"""Of the model: when, rows, and whether all of them decode."""
skipping = False
stock = GPUModelRunner._model_forward


def forward(self, input_ids=None, *args, **kwargs):
    tokens = input_ids.shape[0]
    calls.append((time.perf_counter(), self.input_batch.num_reqs, tokens <= DECODING))
    if skipping and tokens > DECODING:
        return torch.zeros(tokens, self.model_config.get_hidden_size(), dtype=self.dtype, device=input_ids.device)
    return stock(self, input_ids, *args, **kwargs)


GPUModelRunner._model_forward = forward
given = {
    "load_format": "dummy",
    "dtype": "bfloat16",
    "max_model_len": 32768 + 512,
    "max_num_batched_tokens": 16384,
    "max_num_seqs": 64,
    "gpu_memory_utilization": 0.9,
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [8, 32, 64]},
}
ranks = int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    given |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher"}


def say(told):
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(told), flush=True)


llm = LLM(model=sys.argv[1], **given | json.loads(sys.argv[2]))
generator = torch.Generator().manual_seed(1)
told: dict[str, Any] = {"device_name": torch.cuda.get_device_name(), "command": " ".join(["python", *sys.argv])}
told["versions"] = {each.__name__: each.__version__ for each in (vllm, torch, triton, transformers)}
told["ranks"], told["blocks"] = ranks, llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
say(told)
for count, length, new, real in json.loads(sys.argv[3]) if len(sys.argv) > 3 else WORKLOADS:
    skipping = not real
    calls.clear()
    sampled = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    prompts = [torch.randint(3, 120000, (length,), generator=generator).tolist() for _ in range(count)]
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampled, use_tqdm=False)
    wall = time.perf_counter() - start
    steps = [(b[0] - a[0], a[1]) for a, b in pairwise(calls) if a[2] and b[2] and a[1] == b[1]]
    most = max((rows for _, rows in steps), default=0)
    load: dict[str, float | None] = {"requests": count, "prompt": length, "new": new, "real": real, "seconds": wall}
    load |= {"at_once": most, "step_ms": 1e3 * median(x for x, rows in steps if rows == most) if most else None}
    say(load)
