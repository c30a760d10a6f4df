"""transformers' tensor parallelism on several GPUs under NCCL, with kvruntime's cache and Engine, beside one process.

    python several-gpus.py make MODEL                                 # a random Llama of 3 layers and 8 kv heads
    python several-gpus.py run MODEL OUT kivi                         # one process: writes OUT.one and OUT.one.pt
    torchrun --nproc-per-node N several-gpus.py run MODEL OUT kivi    # at the same time: OUT.0 to OUT.N-1
    python several-gpus.py compare OUT                                # prints what they say, a line of JSON each

MODEL: a folder of a Llama; then methods, the first for all, others for logits alone.  A rank says the bytes that its
cache takes and those that kvsim says; tokens of ``Engine``, whose decode step is one CUDA graph, the all-reduces in a
step's graph as the profiler counts them, and milliseconds a step; tokens of ``generate()``.  What a rank does is in
``OUT.RANK.txt`` before it does it, so that the last line says where one waits.  Without GPUs the ranks run over gloo.
Set NCCL_NVLS_ENABLE=0 where NVLink multicast is to stay off.
"""

import gc
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kvruntime
from kvruntime.hf.cache import argument
from kvsim.engines import make_engine
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.models.load import load_model
from kvsim.specs import parse_method

LENGTHS, PROVIDED, NEW, ROOM = (300, 97, 33), 512, 48, 1024
SECONDS = 40
"""A rank waits no longer for another, neither in an all-reduce nor between two parts."""
SHAPE = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8}
SHAPE |= {"head_dim": 128, "vocab_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 2048}
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
who = str(rank) if size > 1 else "one"
device = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
)
began = time.perf_counter()


def make(path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.08)).save_pretrained(path)


def compare(out):
    """Ranks with each other and with one process."""
    names = ["one", *sorted(path.suffix[1:] for path in Path(out).parent.glob(f"{Path(out).name}.[0-9]"))]
    seen = {each: json.loads(Path(f"{out}.{each}").read_text()) for each in names}
    held = {each: torch.load(f"{out}.{each}.pt") for each in seen}
    for dtype, alone in seen["one"].items():
        rows = {each: seen[each].get(dtype, {}) for each in names[1:]}
        told = {"dtype": dtype, "layers": alone["layers"]}
        for key in ("bytes", "kvsim's", "step"):
            told[key] = {"one": alone.get(key)} | {each: row.get(key) for each, row in rows.items()}
        for key in ("engine", "generate"):
            single, *several = (row.get(key) for row in (alone, *rows.values()))
            first = several[0]
            told[f"{key}: ranks equal, as one"] = [all(each == first for each in several), first == single]
            pairs = list(zip(single or [], first or [], strict=False))
            same = [next((i for i, (x, y) in enumerate(zip(*pair, strict=True)) if x != y), NEW) for pair in pairs]
            told[f"{key}: tokens before one differs"] = same
        for name, wanted in held["one"].items():
            if name[0] == dtype and all(name in held[each] for each in rows):
                apart = [round((held[each][name] - wanted).abs().max().item(), 6) for each in rows]
                told[f"{name[1]}: logits apart, of"] = [*apart, round(wanted.abs().max().item(), 3)]
        told["failed"] = [failed for row in (alone, *rows.values()) for failed in row.get("failed", [])]
        print(json.dumps(told), flush=True)


class Run:
    """What this rank does and finds."""

    def __init__(self, path, out, *specs):
        self.path, self.out, self.specs = path, out, specs
        self.found: dict[str, dict[str, Any]] = {}
        self.held: dict[tuple[str, str], torch.Tensor] = {}
        self.ids = torch.randint(3, 128, (3, 160), generator=torch.Generator().manual_seed(2)).to(device)
        Path(f"{out}.{who}.txt").unlink(missing_ok=True)

    def say(self, line):
        with Path(f"{self.out}.{who}.txt").open("a") as log:
            log.write(f"{time.perf_counter() - began:.1f} s: {line}\n")

    def parts(self, agree):
        for dtype in ("float32", "bfloat16"):
            self.say(f"{dtype}: loads")
            self.model, self.dtype = self.load(getattr(torch, dtype)), dtype
            methods = {spec: parse_method(spec, {}, dtype) for spec in self.specs}
            first = methods[self.specs[0]]
            self.row = {"model": type(self.model).__name__, "layers": self.model.config.num_hidden_layers}
            self.found[dtype] = self.row
            wanted = [(self.cached, self.specs[0], first), (self.stepped, first), (self.generated, first)]
            others = {name: chosen for name, chosen in methods.items() if name != self.specs[0]} | {"stock": "stock"}
            for part, *given in [*wanted, *((self.cached, *each) for each in others.items())]:
                self.attempt(part, *given)
                self.say(f"{dtype}: waits for the other ranks")
                agree()

    def attempt(self, part, *given):
        """A part that fails says why; what came before is on disk."""
        self.say(f"{self.dtype}: {part.__name__} {given[0] if isinstance(given[0], str) else ''}")
        try:
            part(*given)
        except Exception as error:
            failed = f"{who} {part.__name__}: {type(error).__name__}: {error}"[:400]
            self.row.setdefault("failed", []).append(failed)
            self.say(failed)
        self.row["seconds"] = round(time.perf_counter() - began, 1)
        Path(f"{self.out}.{who}").write_text(json.dumps(self.found))

    def load(self, dtype):
        given = {"dtype": dtype, "local_files_only": True}
        if size == 1:
            return AutoModelForCausalLM.from_pretrained(self.path, **given).eval().to(device)
        from transformers.distributed import DistributedConfig

        return AutoModelForCausalLM.from_pretrained(
            self.path, distributed_config=DistributedConfig(tp_size=size), **given
        ).eval()

    def cached(self, name, chosen):
        logits, cache = forwards(self.model, chosen)
        self.held[self.dtype, name] = logits.cpu()
        torch.save(self.held, f"{self.out}.{who}.pt")
        if name == self.specs[0]:
            split = [Sharding(tensor_parallel_size=size)] if size > 1 else []
            deployed = Deployment(load_model(f"{self.path}/config.json"), chosen, make_engine("kvruntime"), *split)
            self.row["bytes"] = cache.nbytes
            self.row["kvsim's"] = deployed.rank_nbytes(len(LENGTHS), PROVIDED)

    def generated(self, method):
        cache = kvruntime.make_cache(self.model, method)
        made = self.model.generate(self.ids, max_new_tokens=NEW, do_sample=False, **argument(cache))
        self.row["cache"], self.row["generate"] = type(cache).__name__, made[:, self.ids.shape[1] :].tolist()
        self.row["steps"] = getattr(cache, "steps", None)

    def stepped(self, method):
        engine = kvruntime.Engine(self.model, method, batch_size=len(self.ids), max_seq_len=ROOM)
        self.say("the engine's prompts, then its steps")
        self.row["engine"] = engine.generate(self.ids.tolist(), max_new_tokens=NEW)
        self.row["step"] = {"runs": engine.layers, "bytes": engine.nbytes}
        if device.type == "cuda":
            self.say("counts the all-reduces of a step")
            self.row["step"] |= counted(engine)


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
        made = model(**{name: x.to(device) for name, x in inputs.items()}, use_cache=True, **given)
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


def run(*given):
    if size == 1:
        with torch.no_grad():
            Run(*given).parts(lambda: None)
        return
    cuda = device.type == "cuda"
    limit = timedelta(seconds=SECONDS)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=limit, **({"device_id": device} if cuda else {}))
    hosts = dist.new_group(backend="gloo", timeout=limit)  # a rank alone ends here, and torchrun ends the others
    mine = Run(*given)
    with torch.no_grad():
        mine.parts(lambda: dist.all_reduce(torch.zeros(1), group=hosts))
    mine.model = None
    gc.collect()  # a CUDA graph that holds all-reduces would keep NCCL from ending
    mine.say("ends its process group")
    dist.destroy_process_group()
    mine.say("ended")


if __name__ == "__main__":
    {"make": make, "run": run, "compare": compare}[sys.argv[1]](*sys.argv[2:])
