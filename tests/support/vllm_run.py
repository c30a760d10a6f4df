"""vLLM with kvruntime's plugin in a process of its own: ``python vllm_run.py OUT JSON`` writes what came to ``OUT``.

JSON has ``lengths`` of prompts, ``new`` tokens each, ``rounds``, and the ``engine``'s arguments.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["KVRUNTIME_VLLM_CPU"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm import LLM, SamplingParams

import kvruntime.vllm


def main(out: str, told: str) -> None:
    asked = json.loads(told)
    if asked["engine"].get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    kvruntime.vllm.register()  # an installed package's entry point does so in every process
    try:
        llm = LLM(skip_tokenizer_init=True, disable_log_stats=True, enforce_eager=True, seed=0, **asked["engine"])
    except Exception as error:
        Path(out).write_text(json.dumps({"error": str(error)}))
        return
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in asked["lengths"]]
    sampled = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, logprobs=1, detokenize=False)
    for _ in range(asked.get("rounds", 1)):
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampled, use_tqdm=False)
    rows = []
    for prompt, result in zip(prompts, results, strict=True):
        tokens = list(result.outputs[0].token_ids)
        known = [each[token].logprob for each, token in zip(result.outputs[0].logprobs, tokens, strict=True)]
        rows.append({"prompt": prompt, "tokens": tokens, "logprobs": known, "cached": result.num_cached_tokens})
    config = llm.llm_engine.vllm_config
    blocks = config.cache_config.num_gpu_blocks
    Path(out).write_text(
        json.dumps({"rows": rows, "blocks": blocks, "max_model_len": config.model_config.max_model_len})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
