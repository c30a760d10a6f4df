"""Serving in vLLM, as recorded: rows from the logs of ``vllm-decode.py``, and what is held of them.

A ``pool`` is an engine that booted: blocks and tokens, and the memory that its log says they came from.  A ``load`` is
requests that came at once: seconds of the whole and of a step of decoding, of each time that it ran.  An ``agreement``
is a run whose steps were replayed in transformers.  Loads of one ``run`` ran on one card, one engine after another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kvsim.analysis.doctor import vllm_lines as lines
from kvsim.analysis.doctor.log import NUMBER, Log, gib, number
from kvsim.engines import Vllm
from kvsim.hardware import find_hardware
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import Step, decode_step
from kvsim.layout import Method
from kvsim.methods import make_method
from kvsim.models.load import load_model
from validation.claims.subjects import describe_method, rebuild_method
from validation.recorded import FOLDER

Row = dict[str, Any]
Load = tuple[int, int, int, bool]
"""Requests, tokens a prompt, new tokens, and whether the prompts were computed."""

SCHEMA = "validation.serving/1"
KEY = ("kind", "run", "method", "what", "requests", "prompt_tokens", "new_tokens", "prompts_computed")
MODEL = "llama-3-8b"
"""The shape that ``vllm-decode.py`` ran."""
BASE = "bf16"
FLOORS: dict[Load, float] = {
    (8, 8192, 64, True): 1.0,
    (32, 16384, 96, False): 1.3,
    (64, 32768, 160, False): 2.0,
}
"""How many times bf16's tokens a second a load has at least; of none is a step slower than bf16's."""
HELD = "kivi"
"""The method whose loads are held to that."""


def read_log(path: Path, about: Row) -> list[Row]:
    """The pool and the loads of a log of ``vllm-decode.py``, each with ``about`` and what the log says of itself.

    Raises ``ValueError`` for another file, one of several ranks, and where neither says device, versions, commit,
    command and run.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    told = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    heads, loads = [row for row in told if "blocks" in row], [row for row in told if "requests" in row]
    log = Log.of(text)
    size, tokens, requests = log.find(*lines.AVAILABLE), log.number(lines.TOKENS), log.find(lines.CONCURRENCY)
    if len(heads) != 1 or size is None or tokens is None or requests is None:
        raise ValueError(f"{path}: no log of vllm-decode.py with a pool, its size and its blocks")
    if heads[0].get("ranks", 1) != 1:
        raise ValueError(f"{path}: {heads[0]['ranks']} ranks, allowed is 1: what is held and predicted is of one card")
    known = about | {name: value for name, value in heads[0].items() if name != "blocks"}
    absent = [name for name in ("device_name", "versions", "commit", "command", "run") if name not in known]
    if absent:
        raise ValueError(f"{path}: neither the log nor --about says {', '.join(absent)}")
    base = known | {"model": MODEL, "weights": "dummy", "method": describe_method(_method(log))}
    given = log.number(rf"'kv_cache_memory_bytes': {NUMBER}")
    suggested = lines.suggested(log, gib(size[1]))
    nbytes = given or (None if suggested is None else suggested[1])
    pool: Row = {"kind": "pool", "num_gpu_blocks": heads[0]["blocks"], "num_tokens": int(tokens)}
    pool |= {"concurrency": number(requests[1][2]), "max_model_len": int(number(requests[1][1]))}
    pool |= {"memory_gib": gib(size[1]), "memory_nbytes": None if nbytes is None else int(nbytes)}
    pool |= {name: int(log.number(rf"'{name}': {NUMBER}") or 0) for name in STEP_LIMITS}
    return [base | pool, *(base | row for row in _repeated(loads))]


STEP_LIMITS = ("max_num_batched_tokens", "max_num_seqs")


def _method(log: Log) -> Method:
    given = lines.plugin(log)
    dtype = log.value(r"dtype=torch\.(\w+)") or "bfloat16"
    if given is None:
        stored = log.value(r"\bkv_cache_dtype=(\w+)")
        return make_method("bf16" if stored in (None, "auto") else str(stored))
    name, options = given
    return make_method(name, **options, **({"dtype": dtype} if name == HELD else {}))


def _repeated(loads: Sequence[Row]) -> list[Row]:
    """One row a load, with the seconds of each time that it ran; without those of steps, and nothing ``at_once``, where
    a time had no step of decoding alone."""
    out: dict[Load, Row] = {}
    for load in loads:
        key = load["requests"], load["prompt"], load["new"], load["real"]
        names = ("requests", "prompt_tokens", "new_tokens", "prompts_computed")
        empty = {"kind": "load", **dict(zip(names, key, strict=True)), "seconds": [], "step_seconds": []}
        row = out.setdefault(key, empty)
        row["at_once"] = load["at_once"]
        row["seconds"].append(round(load["seconds"], 4))
        row["step_seconds"].append(round(load["step_ms"] / 1e3, 7) if load["step_ms"] else None)
    for row in out.values():
        if None in row["step_seconds"]:
            row |= {"at_once": 0, "step_seconds": []}
    return list(out.values())


def rows_of(files: Sequence[Path] = ()) -> list[Row]:
    """The rows of ``files``, by default of all records, that are of serving."""
    out: list[Row] = []
    for path in files or sorted((FOLDER / "serving").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("schema") == SCHEMA:
            out += found["rows"]
    return out


def load_of(row: Row) -> Load:
    return row["requests"], row["prompt_tokens"], row["new_tokens"], row["prompts_computed"]


def steady(values: Sequence[float]) -> float:
    """The median, without the first of several: kernels that nothing had needed before are compiled in it."""
    return median(values[1:] or values)


def in_one_run(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Each load of a compressed cache beside bf16's of the same run."""
    loads = [row for row in rows if row["kind"] == "load"]
    for row in loads:
        for base in loads:
            same = base["run"] == row["run"] and load_of(base) == load_of(row)
            if same and base["method"]["name"] == BASE != row["method"]["name"]:
                yield row, base


def gain(row: Row, base: Row) -> float:
    """How many times ``base``'s tokens a second ``row`` has."""
    return steady(base["seconds"]) / steady(row["seconds"])


def broken(rows: Sequence[Row]) -> list[str]:
    """One line for each load that is below its floor, or has a slower step than bf16."""
    out = []
    for row, base in in_one_run(rows):
        if not row["method"]["name"].startswith(HELD):
            continue
        name = f"{row['run']}: {row['method']['name']}, {row['requests']} x {row['prompt_tokens']:,} tokens"
        floor, found = FLOORS.get(load_of(row), 0.0), gain(row, base)
        if found < floor:
            out.append(f"{name}: {found:.2f} times bf16's tokens a second, the least allowed is {floor:g}")
        if not (row["step_seconds"] and base["step_seconds"]):
            continue
        step, most = steady(row["step_seconds"]), steady(base["step_seconds"])
        if step > most:
            out.append(f"{name}: a step takes {1e3 * step:.2f} ms, in bf16 {1e3 * most:.2f}")
    return out


def kept(rows: Sequence[Row]) -> str:
    """One sentence over the recorded loads."""
    held = [row for row, _ in in_one_run(rows) if row["method"]["name"].startswith(HELD)]
    wrong = broken(rows)
    if wrong:
        return f"Serving FAILS in {len(wrong)} figures of {len(held)} loads: {'; '.join(wrong)}."
    return f"All {len(held)} loads served beside bf16 in one run have the tokens a second and the steps that are held."


def pools(row: Row) -> tuple[int, int]:
    """Blocks and tokens of a pool by today's kvsim, from the memory that its log says."""
    method, limits = rebuild_method(row["method"]), {name: row[name] for name in STEP_LIMITS}
    size = row["memory_nbytes"] or row["memory_gib"] * (1 << 30)
    pool = Vllm(**limits).pool(load_model(row["model"]), method, int(size), row["max_model_len"])
    return pool.num_gpu_blocks, pool.num_tokens


def step(row: Row) -> Step:
    """A step of decoding of a load by kvsim: of the requests that were under way, half of their new tokens made."""
    method, model, card = rebuild_method(row["method"]), load_model(row["model"]), find_hardware(row["device_name"])
    held = row["prompt_tokens"] + row["new_tokens"] // 2
    return decode_step(model, method, card, row["at_once"], held, Serving(engine=Vllm()))
