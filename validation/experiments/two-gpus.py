"""transformers' tensor parallelism on two GPUs under NCCL, with kvruntime's cache and Engine, beside one process.

    python two-gpus.py MODEL OUT kivi                                 # one process: writes OUT.one and OUT.one.pt
    torchrun --nproc-per-node 2 two-gpus.py MODEL OUT kivi            # at the same time: OUT.0 and OUT.1
    python two-gpus.py compare OUT                                    # prints what they say, a line of JSON each

MODEL: a folder of a Llama; then methods, the first for all, others for logits alone.  A rank says the bytes that its
cache takes and those that kvsim says; tokens of ``Engine``, whose decode step is one CUDA graph, the all-reduces in a
step's graph as the profiler counts them, and milliseconds a step; tokens of ``generate()``.  Set NCCL_NVLS_ENABLE=0
where NVLink multicast is to stay off.
"""

import faulthandler
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

LENGTHS, PROVIDED, NEW, ROOM = (300, 97, 33), 512, 48, 1024
path, out, *specs = sys.argv[1:]
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
who = str(rank) if size > 1 else "one"


def compare():
    """Ranks with each other and with one process."""
    seen = {each: json.loads(Path(f"{out}.{each}").read_text()) for each in ("one", "0", "1")}
    held = {each: torch.load(f"{out}.{each}.pt") for each in seen}
    for dtype, alone in seen["one"].items():
        rows = [seen[each].get(dtype, {}) for each in ("0", "1")]
        told = {"dtype": dtype, "layers": alone["layers"]}
        for key in ("bytes", "kvsim's", "step"):
            told[key] = {"one": alone.get(key), "0": rows[0].get(key), "1": rows[1].get(key)}
        for key in ("engine", "generate"):
            first, second, single = (each.get(key) for each in (*rows, alone))
            told[f"{key}: ranks equal, as one"] = [first == second, first == single]
            pairs = list(zip(single or [], first or [], strict=False))
            same = [next((i for i, (x, y) in enumerate(zip(*pair, strict=True)) if x != y), NEW) for pair in pairs]
            told[f"{key}: tokens before one differs"] = same
        for name, wanted in held["one"].items():
            if name[0] == dtype and name in held["0"] and name in held["1"]:
                apart = [round((held[each][name] - wanted).abs().max().item(), 6) for each in ("0", "1")]
                told[f"{name[1]}: logits apart, of"] = [*apart, round(wanted.abs().max().item(), 3)]
        told["failed"] = [failed for row in (alone, *rows) for failed in row.get("failed", [])]
        print(json.dumps(told), flush=True)


if path == "compare":
    compare()
    sys.exit()
faulthandler.dump_traceback_later(30, repeat=True)  # where a rank waits, if it does
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
    cache = kvruntime.make_cache(model, method, max_seq_len=PROVIDED) if method != "stock" else None
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


def cached(name, chosen):
    logits, cache = forwards(model, chosen)
    held[dtype, name] = logits.cpu()
    torch.save(held, f"{out}.{who}.pt")
    if name == specs[0]:
        split = [Sharding(tensor_parallel_size=size)] if size > 1 else []
        deployed = Deployment(load_model(f"{path}/config.json"), chosen, make_engine("kvruntime"), *split)
        row["bytes"], row["kvsim's"] = cache.nbytes, deployed.rank_nbytes(len(LENGTHS), PROVIDED)


def generated(method):
    cache = kvruntime.make_cache(model, method)
    made = model.generate(ids, max_new_tokens=NEW, do_sample=False, **argument(cache))[:, ids.shape[1] :]
    row["cache"], row["generate"] = type(cache).__name__, made.tolist()


def stepped(method):
    engine = kvruntime.Engine(model, method, batch_size=len(ids), max_seq_len=ROOM)
    row["engine"] = engine.generate(ids.tolist(), max_new_tokens=NEW)
    row["step"] = {"runs": engine.layers, "bytes": engine.nbytes} | counted(engine)


def attempt(part, *given):
    """A part that fails says why; what came before is on disk."""
    try:
        part(*given)
    except Exception as error:
        row.setdefault("failed", []).append(f"{who} {part.__name__}: {type(error).__name__}: {error}"[:400])
    row["seconds"] = round(time.perf_counter() - began, 1)
    Path(f"{out}.{who}").write_text(json.dumps(found))


began = time.perf_counter()
held: dict[tuple[str, str], torch.Tensor] = {}
ids = torch.randint(3, 128, (3, 160), generator=torch.Generator().manual_seed(2)).cuda()
with torch.no_grad():
    for dtype in ("float32", "bfloat16"):
        model = load(getattr(torch, dtype))
        methods = {spec: parse_method(spec, {}, dtype) for spec in specs}
        row = found[dtype] = {"model": type(model).__name__, "layers": model.config.num_hidden_layers}
        attempt(cached, specs[0], methods[specs[0]])
        attempt(stepped, methods[specs[0]])
        attempt(generated, methods[specs[0]])
        for name, chosen in (methods | {"stock": "stock"}).items():
            if name != specs[0]:
                attempt(cached, name, chosen)
if size > 1:
    dist.barrier()
    dist.destroy_process_group()
