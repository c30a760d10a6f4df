"""This process's place among the ranks that torchrun started, and the file of their rows."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kvruntime.bench.harness.store import Row, Store, rows_as_lines
from validation.recorded import FOLDER, circumstances, slug

SCHEMA = "validation.ranks/1"
KEY = ("kind", "ranks", "way", "what", "nbytes", "model", "num_layers", "method", "batch_size", "num_tokens", "device")
SECONDS = 90
"""Without an answer of another rank."""
START = "start 2 or more, `torchrun --nproc-per-node 2 -m validation ...`"


@dataclass(frozen=True)
class Group:
    """Ranks of one host, one device each."""

    rank: int
    ranks: int
    device: torch.device

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Element by element, of the ranks' figures the largest."""
        told = torch.tensor(list(seconds), dtype=torch.float64, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return list(told.tolist())

    def equal(self, tensor: torch.Tensor) -> bool:
        """Whether every rank has the same numbers."""
        low, high = tensor.clone(), tensor.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        return bool(torch.equal(low, high))

    def wait(self) -> None:
        """Until every rank is here and its device idle."""
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def join() -> Group:
    """Joins the ranks that torchrun started: NCCL where there is a GPU for each, gloo on CPUs.

    Raises ``ValueError`` without torchrun's variables, or where a host has fewer GPUs than ranks.
    """
    told = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    if told["WORLD_SIZE"] in ("", "1"):
        raise ValueError(f"1 process: {START}")
    if not all(value.isdecimal() for value in told.values()) or int(told["WORLD_SIZE"]) < 2:
        said = ", ".join(f"{name}={value[:20]}" for name, value in told.items())
        raise ValueError(f"{said}: allowed are the numbers that torchrun sets: {START}")
    ranks, rank, local = map(int, told.values())
    there = torch.cuda.device_count()
    if 0 < there < ranks:
        raise ValueError(f"{ranks} ranks: allowed are up to {there}, the GPUs here")
    device = torch.device("cuda", local) if there else torch.device("cpu")
    if there:
        torch.cuda.set_device(device)
    own = {"backend": "nccl", "device_id": device} if there else {"backend": "gloo"}
    dist.init_process_group(**own, timeout=timedelta(seconds=SECONDS))
    return Group(rank, ranks, device)


class Rows:
    """The rows of a run; the first rank prints them, and writes them to ``out`` as they come."""

    def __init__(self, group: Group, out: Path | None, command: str) -> None:
        self.group = group
        facts = circumstances(str(group.device), command)
        self.facts = facts | {"device": facts.pop("device_name"), "ranks": group.ranks}
        if group.device.type == "cuda":
            self.facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            self.facts |= {name: os.environ[name] for name in sorted(os.environ) if name.startswith("NCCL_")}
        self.store = Store(out if group.rank == 0 else None, SCHEMA, "kind")

    def add(self, row: Row) -> None:
        taken = row | self.facts
        self.store.put([taken], lambda one, other: all(one.get(name) == other.get(name) for name in KEY))
        if self.group.rank == 0:
            self.store.write(rows_as_lines(SCHEMA, self.store.rows))
            print(shown(row), flush=True)


def shown(row: Row) -> str:
    """A row in one line."""

    def word(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(word, value)) + "]"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(word(value) for value in row.values())


def default_path(device: torch.device) -> Path:
    """Where the rows of a device are recorded."""
    name = slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    return FOLDER / "ranks" / f"{name}.json"


def chosen_path(group: Group, record: bool, out: Path | None) -> Path | None:
    """``out``, with ``record`` the device's own file, else none."""
    return out or (default_path(group.device) if record else None)


def leave() -> None:
    """The end of a run; not reached where a rank failed, which ends the others.

    NCCL's communicator waits until the last CUDA graph that holds one of its all-reduces is gone (2.26 and above).
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def say(group: Group, line: Any) -> None:
    if group.rank == 0:
        print(line, flush=True)
