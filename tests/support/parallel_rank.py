"""One of two ranks of transformers' tensor and pipeline parallelism, with kvruntime's cache, beside one process.

``python parallel_rank.py MODEL OUT``, with ``RANK`` and ``WORLD_SIZE`` as torchrun sets them: what the rank saw goes to
``OUT.RANK`` as JSON.  The model is in float64 and exact tokens in float32, so that only the order of sums differs.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import kvruntime
from kvruntime.hf.cache import argument

LENGTHS = (70, 41, 9)
NEW = 6
OPTIONS = {"nbits": 2, "group_size": 32, "residual_length": 32}
SECONDS = 60


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts and their mask."""
    longest = max(LENGTHS)
    ids = torch.randint(3, 128, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]
    return ids * mask, mask.long()


def forward(model: Any) -> tuple[torch.Tensor, Any]:
    """Logits after the prompts, single tokens, and several at once; and the cache."""
    ids, mask = inputs()
    cache = kvruntime.make_cache(model, "kivi", dtype="float32", **OPTIONS)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    generator = torch.Generator().manual_seed(5)
    out = []
    for count in (0, 1, 1, 1, 3):
        if count:
            ids = torch.randint(3, 128, (len(LENGTHS), count), generator=generator)
            mask = torch.cat([mask, mask.new_ones(len(LENGTHS), count)], 1)
            positions = positions[:, -1:] + torch.arange(1, count + 1)
        given = {"attention_mask": mask, "position_ids": positions, **argument(cache), "use_cache": True}
        out.append(model(ids, **given).logits[:, -1])
    return torch.stack(out), cache


def tokens(model: Any, compiled: bool = False, **more: Any) -> list[list[int]]:
    ids, mask = inputs()
    size = {"compiled": True, "max_seq_len": 128} if compiled else {}
    cache = kvruntime.make_cache(model, "kivi", dtype="float32", **OPTIONS, **size)
    given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **argument(cache), **more}
    found: list[list[int]] = model.generate(ids, **given)[:, ids.shape[1] :].tolist()
    return found


def engine(model: Any) -> dict[str, Any]:
    """What ``Engine`` holds before its first prompt, and its tokens; or why it refuses."""
    ids, _ = inputs()
    try:
        made = kvruntime.Engine(model, "kivi", batch_size=len(LENGTHS), max_seq_len=128, dtype="float32", **OPTIONS)
    except ValueError as error:
        return {"error": str(error)}
    rows = [row[-length:].tolist() for row, length in zip(ids, LENGTHS, strict=True)]
    nbytes = made.nbytes
    return {"nbytes": nbytes, "tokens": made.generate(rows, max_new_tokens=NEW), "after": made.nbytes}


def seen(model: Any, wanted: torch.Tensor | None) -> dict[str, Any]:
    with torch.no_grad():
        logits, cache = forward(model)
        found = {"nbytes": cache.nbytes, "greedy": tokens(model), "beams": tokens(model, num_beams=2)}
        found["compiled"] = tokens(model, compiled=True)
    found["engine"] = engine(model)
    return found | {"apart": 0.0 if wanted is None else (logits - wanted).abs().max().item()}


def command(path: str, *more: str) -> str:
    """What ``kvruntime generate`` prints."""
    from kvruntime.cli import run

    out = StringIO()
    asked = ["generate", "ab", "--model", path, "--max-new-tokens", "5", "--device", "cpu", "--weights-dtype", "fp32"]
    with redirect_stdout(out):
        assert run([*asked, "--offline", *more]) == 0
    return out.getvalue()


def measured(rank: int, size: int) -> list[dict[str, Any]]:
    """Rows of ``python -m validation all-reduce`` and ``tensor-parallel``, of few bytes and a shape that is tiny."""
    from runtime_tiny import SIZES
    from transformers import LlamaConfig

    from kvsim.methods import Full, Kivi
    from validation.ranks.all_reduce import curve
    from validation.ranks.group import Group
    from validation.ranks.model import split_model
    from validation.ranks.steps import WAYS, Load

    group = Group(rank, size, torch.device("cpu"))
    model = split_model(LlamaConfig(**SIZES), group, torch.float32)
    load = Load(group, model, 2, 60)
    methods = [Full("float32"), Kivi(dtype="float32", residual_length=32)]
    return [*curve(group, (2048, 65536)), *(row for way in WAYS for row in load.rows(way, methods))]


def main(path: str, out: str) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    load = {"dtype": torch.float64, "local_files_only": True}
    one = AutoModelForCausalLM.from_pretrained(path, **load).eval()
    with torch.no_grad():
        wanted, _ = forward(one)
    results = {"one": seen(one, None)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    for kind in ("tp", "pp"):
        config = DistributedConfig(**{f"{kind}_size": size})
        if kind == "tp":  # a command starts with torchrun's variables as it is given them
            results["command"] = [command(path), command(path, "--tensor-parallel-size", str(size))]
        results[kind] = seen(
            AutoModelForCausalLM.from_pretrained(path, distributed_config=config, **load).eval(), wanted
        )
    results["ranks"] = measured(rank, size)
    Path(f"{out}.{rank}").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
