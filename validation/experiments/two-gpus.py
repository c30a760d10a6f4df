"""transformers' tensor parallelism on two GPUs under NCCL, with kvruntime's cache and Engine, beside one process.

    python two-gpus.py MODEL OUT kivi kivi:nbits=8                              # one process: writes OUT.one
    torchrun --nproc-per-node 2 two-gpus.py MODEL OUT kivi kivi:nbits=8         # after it: writes OUT.0 and OUT.1

MODEL: a folder of a Llama.  A rank says the bytes that its cache takes and those that kvsim says; how far logits are
from one process's; tokens of ``generate()`` and of ``Engine``, whose decode step is one CUDA graph; the all-reduces in
a step's graph, as the profiler counts them; and milliseconds a step.  Set NCCL_NVLS_ENABLE=0 where NVLink multicast is
to stay off.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import kvruntime
from kvruntime.hf.cache import argument
from kvsim.engines import make_engine
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.models.load import load_model
from kvsim.specs import parse_method

LENGTHS, NEW, ROOM = (300, 97, 33), 48, 1024
path, out, *specs = sys.argv[1:]
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.cuda.set_device(rank)
found: dict[str, dict[str, Any]] = {}
if size > 1:
    dist.init_process_group("nccl", timeout=timedelta(seconds=60))


def load(dtype):
    given = {"dtype": dtype, "local_files_only": True}
    if size == 1:
        return AutoModelForCausalLM.from_pretrained(path, **given).eval().to("cuda")
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(tp_size=size), **given
    ).eval()


def forwards(model, method):
    """Logits after left-padded prompts, 20 single tokens and 5 at once; and the cache."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    cache = kvruntime.make_cache(model, method) if method != "stock" else None
    given = argument(cache) if cache is not None else {}
    rows, positions = [], (mask.cumsum(-1) - 1).clamp(min=0)
    for count in (0, *[1] * 20, 5):
        if count:
            ids = torch.randint(3, 128, (len(LENGTHS), count), generator=generator)
            mask = torch.cat([mask, mask.new_ones(len(LENGTHS), count)], 1)
            positions = positions[:, -1:] + torch.arange(1, count + 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        made = model(**{name: x.cuda() for name, x in inputs.items()}, use_cache=True, **given)
        if cache is None:
            name = "past_key_values" if "past_key_values" in made else "cache"
            given = {name: made[name]}
        rows.append(made.logits[:, -1].float())
    return torch.stack(rows), cache


def counted(engine):
    """All-reduces and milliseconds of a step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(4):
            engine.step()
        torch.cuda.synchronize()
    reduces = sum(event.count for event in seen.key_averages() if "AllReduce" in event.key)
    seconds = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"all_reduces": reduces / 4, "step_ms": round(1e3 * median(seconds), 3)}


def cached(model, name, method, row):
    logits, cache = forwards(model, method)
    held[dtype, name] = logits.cpu()
    if size > 1:
        one = wanted[dtype, name]
        apart = (held[dtype, name] - one).abs().max().item()
        row[f"{name}: logits apart, of"] = [round(apart, 6), round(one.abs().max().item(), 3)]
    if name == specs[0]:
        split = [Sharding(tensor_parallel_size=size)] if size > 1 else []
        deployed = Deployment(load_model(f"{path}/config.json"), method, make_engine("kvruntime"), *split)
        row["bytes"], row["kvsim's"] = cache.nbytes, deployed.rank_nbytes(len(LENGTHS), max(LENGTHS) + 25)


def generated(model, method, row, **more):
    cache = kvruntime.make_cache(model, method, **more)
    start = time.perf_counter()
    made = model.generate(ids, max_new_tokens=NEW, do_sample=False, **argument(cache))[:, ids.shape[1] :].tolist()
    row["cache"], row["generate"], row["seconds"] = type(cache).__name__, made, round(time.perf_counter() - start, 2)


def stepped(model, method, lean, row):
    engine = kvruntime.Engine(model, method, batch_size=len(ids), max_seq_len=ROOM, lean=lean)
    row[f"engine, lean {lean}"] = {"runs": engine.layers, "bytes": engine.nbytes}
    row[f"engine, lean {lean}"]["tokens"] = engine.generate(ids.tolist(), max_new_tokens=NEW)
    row[f"engine, lean {lean}"] |= counted(engine)


def attempt(part, *given, row, **more):
    """A part that fails says why; what came before is on disk."""
    try:
        part(*given, row=row, **more)
    except Exception as error:
        row[f"{part.__name__} {given[1:]} {more}"] = f"{type(error).__name__}: {error}"[:500]
    Path(f"{out}.{rank if size > 1 else 'one'}").write_text(json.dumps(found))


wanted = torch.load(f"{out}.pt") if size > 1 else {}
held: dict[tuple[str, str], torch.Tensor] = {}
ids = torch.randint(3, 128, (3, 120), generator=torch.Generator().manual_seed(2)).cuda()
with torch.no_grad():
    for dtype in ("float32", "bfloat16"):
        model = load(getattr(torch, dtype))
        methods = {spec: parse_method(spec, {}, dtype) for spec in specs}
        method = methods[specs[0]]
        row = found[dtype] = {"model": type(model).__name__, "layers": model.config.num_hidden_layers}
        for name, chosen in (methods | {"stock": "stock"}).items():
            attempt(cached, model, name, chosen, row=row)
        attempt(stepped, model, method, False, row=row)
        attempt(stepped, model, method, True, row=row)
        attempt(generated, model, method, row=row)
if size == 1:
    torch.save(held, f"{out}.pt")
else:
    dist.barrier()
    dist.destroy_process_group()
