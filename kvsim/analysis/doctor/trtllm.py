"""TensorRT-LLM's boot log against prediction: blocks and tokens of the pool, and its bytes.

Blocks come from the ``available`` memory that is logged and ``free_gpu_memory_fraction``.  Sizes are GiB.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.analysis.doctor.log import CLOSE, GIB, NUMBER, Diagnosis, Finding, Found, Log, Reader, number
from kvsim.engines.trtllm import Trtllm
from kvsim.hardware import Hardware
from kvsim.memory.sharding import Sharding, stages
from kvsim.methods import make_method
from kvsim.models.model import Model

ALLOCATED = rf"\[MemUsageChange\] Allocated {NUMBER} GiB for max tokens in paged KV cache \({NUMBER}\)"
AVAILABLE = rf"calculating max tokens in paged kv cache: total: {NUMBER} GiB, available: {NUMBER} GiB"
BLOCKS = rf"Number of blocks in KV cache primary pool: {NUMBER}"
BLOCK = (rf"Number of tokens per block: {NUMBER}", rf"tokens per block={NUMBER}")
SIGNS = (ALLOCATED, AVAILABLE, BLOCKS, r"\[TensorRT-LLM\]\[INFO\]")
DTYPES = {"fp8": "fp8", "nvfp4": "nvfp4", "float16": "fp16", "bfloat16": "bf16", "half": "fp16"}
HALF_DIGIT = 0.006
"""GiB that a printed size may be off, to two digits."""


def model_name(log: Log) -> str | None:
    """The model's name as the log's arguments give it."""
    return log.value(r"\bmodel='([^']+)'", r"trtllm-serve(?: serve)? ([\w./-]+)")


def diagnosis(log: Log, model: Model | None, hardware: Hardware | None = None, draft: Model | None = None) -> Diagnosis:
    """Reconciles the log.  Raises ``ValueError`` without a model, or for a log without a figure."""
    if model is None:
        raise ValueError("a TensorRT-LLM boot log does not hold the model's shape: give --model")
    told = {
        name: value
        for name in ("free_gpu_memory_fraction", "tensor_parallel_size", "max_num_tokens")
        if (value := log.value(rf"\b{name}['\"]?[=: ]+{NUMBER}")) is not None
    }
    size = log.value(*BLOCK)
    fraction = number(told.get("free_gpu_memory_fraction", "0.9"))
    engine = Trtllm(int(number(size or "32")), fraction)
    (share,) = stages(model, Sharding(tensor_parallel_size=int(told.get("tensor_parallel_size", "1"))))
    kind = log.value(r"kv_cache_dtype['\"]?[=: ]+['\"]?(\w+)", r"kv_cache_quant_algo['\"]?[=: ]+['\"]?(\w+)")
    method = make_method(DTYPES.get((kind or "").lower(), DTYPES.get(model.dtype or "", "bf16")))
    groups = engine.groups(share, method)
    notes = [] if "free_gpu_memory_fraction" in told else ["free_gpu_memory_fraction is not in the log: taken as 0.9"]
    if kind is None:
        notes.append("the log does not say the cache's type: taken as the model's")
    if len(groups) > 1:
        raise ValueError("a TensorRT-LLM log of a model with windows has a pool for each: not reconciled")
    found = [*_blocks(log, groups[0].page_nbytes, fraction), *_bytes(log, groups[0].page_nbytes, engine)]
    if not found:
        raise ValueError("no line of the log gives a figure that is predicted")
    version = log.value(r"TensorRT-LLM version: ([\w.]+)") or ""
    found.sort(key=lambda each: each.line)
    return Diagnosis("trtllm", version, model.name, told, tuple(found), tuple(notes))


def _last(log: Log, pattern: str) -> Found | None:
    """The last line that has it: a trial run's pool comes before the one that serves."""
    return max(log.all(pattern), key=lambda found: found[0], default=None)


def _blocks(log: Log, page: int, fraction: float) -> Iterator[Finding]:
    """Blocks of the pool, from the memory that was logged."""
    found, memory = _last(log, BLOCKS), _last(log, AVAILABLE)
    if found is None:
        return
    at, reported = found[0], number(found[1][1])
    if memory is None:
        yield Finding(at, "blocks", "blocks", None, reported, "the available memory is not in the log")
        return
    available = number(memory[1][2])
    predicted = float(int(available * fraction * GIB // page))
    why = f"{fraction:.0%} of {available:g} GiB, {page:,} B a block"
    if abs(reported - predicted) > max(1.0, HALF_DIGIT * GIB / page + 1):
        why += "; a limit (max_tokens) or another type of cache or fraction"
    yield Finding(at, "blocks", "blocks", predicted, reported, why)


def _bytes(log: Log, page: int, engine: Trtllm) -> Iterator[Finding]:
    """Bytes of the tokens that were logged."""
    found = _last(log, ALLOCATED)
    if found is None:
        return
    at, match = found
    reported, tokens = number(match[1]), number(match[2])
    predicted = tokens / engine.tokens_per_block * page / GIB
    why = f"{tokens:,.0f} tokens in blocks of {engine.tokens_per_block}"
    if abs(predicted - reported) > max(2 * HALF_DIGIT, CLOSE * predicted):
        why += "; another type of cache, or other layers than this model's"
    yield Finding(at, "cache", "GiB", predicted, reported, why)


READER = Reader("TensorRT-LLM", SIGNS, diagnosis, model_name, needs_model=True)
