"""vLLM with kvruntime's plugin in a process of its own: ``python vllm_run.py OUT JSON`` writes what came to ``OUT``.

JSON has ``lengths`` of prompts, ``new`` tokens each, ``rounds``, ``period`` (prompts that repeat so many tokens),
``sleeps`` (give the memory back between rounds), and the ``engine``'s arguments.  A row has its ``lives``: for each
round the steps ``[before, tokens]`` that the scheduler gave it, of which ``tokens`` begin at ``before``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["KVRUNTIME_VLLM_CPU"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm import LLM, SamplingParams

import kvruntime.vllm

Steps = list[tuple[int, list[int]]]


def watched(llm: Any, prompts: list[list[int]]) -> list[Steps]:
    """The steps that each prompt's request is given from now on; nothing where the engine is in another process."""
    found: list[Steps] = [[] for _ in prompts]
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return found
    scheduler = core.scheduler
    stock = type(scheduler).schedule

    def schedule(*args: Any, **more: Any) -> Any:
        out = stock(scheduler, *args, **more)
        for name, count in out.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            drafts = list(out.scheduled_spec_decode_tokens.get(name, []))
            before = request.num_computed_tokens - count
            known = list(request.all_token_ids[before : before + count - len(drafts)])
            known += [-1] * (count - len(drafts) - len(known))  # sampled by a step that is still under way
            found[prompts.index(list(request.prompt_token_ids))].append((before, known + drafts))
        return out

    scheduler.schedule = schedule
    return found


def main(out: str, told: str) -> None:
    asked = json.loads(told)
    if asked["engine"].get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    kvruntime.vllm.register()  # an installed package's entry point does so in every process
    try:
        given = {"enforce_eager": True, "seed": 0, **asked["engine"]}
        llm = LLM(skip_tokenizer_init=True, disable_log_stats=True, **given)
    except Exception as error:
        Path(out).write_text(json.dumps({"error": str(error)}))
        return
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for length in asked["lengths"]:
        period = min(asked.get("period") or length, length)
        some = torch.randint(3, 128, (period,), generator=generator).tolist()
        prompts.append((some * (length // period + 1))[:length])
    sampled = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, logprobs=1, detokenize=False)
    lives: list[list[Steps]] = [[] for _ in prompts]
    for turn in range(asked.get("rounds", 1)):
        if turn and asked.get("sleeps"):
            llm.sleep(level=1)
            llm.wake_up()
        steps = watched(llm, prompts)
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampled, use_tqdm=False)
        for each, life in zip(lives, steps, strict=True):
            each.append(life)
    rows = []
    for prompt, result, life in zip(prompts, results, lives, strict=True):
        tokens = list(result.outputs[0].token_ids)
        known = [each[token].logprob for each, token in zip(result.outputs[0].logprobs, tokens, strict=True)]
        row = {"prompt": prompt, "tokens": tokens, "logprobs": known, "cached": result.num_cached_tokens}
        rows.append(row | {"lives": life})
    config = llm.llm_engine.vllm_config
    blocks = config.cache_config.num_gpu_blocks
    Path(out).write_text(
        json.dumps({"rows": rows, "blocks": blocks, "max_model_len": config.model_config.max_model_len})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
