"""What vLLM prints at a boot, release by release: a pattern or several a figure, and whose lines are read.

Of several patterns the first that a log has is read; each has the number in its first group and the unit in its second
where there is one.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from kvsim.analysis.doctor.log import GIB, NUMBER, QUANTITY, RANK, Log, gib, number

ENGINE = r"Initializing an? (?:(V\d) )?LLM engine"
START = r"API server version|non-default args|args: Namespace"
WEIGHTS = (
    rf"Model loading took {QUANTITY}",
    rf"Loading model weights took {QUANTITY}",
    rf"model weights take[ \t]+{QUANTITY}",
    rf"weights memory: {QUANTITY}",
    rf"Actual usage is {QUANTITY} for weight\b",
)
CONSUMED = (rf"Actual usage is {QUANTITY} for consumed memory",)
PEAK = (rf"peak_torch_memory[ \t]*[=:]?[ \t]*{QUANTITY}",)
ACTIVATION = (
    rf"{QUANTITY} for peak activation",
    rf"torch peak memory increase: {QUANTITY}",
    rf"PyTorch activation peak memory(?: takes)?[ \t]+{QUANTITY}",
)
NON_TORCH = (
    rf"{QUANTITY} for non-torch memory",
    rf"non-torch forward increase memory: {QUANTITY}",
    rf"non_torch_memory(?: takes|[ \t]*=)?[ \t]*{QUANTITY}",
)
GRAPHS = (
    rf"Graph capturing finished in .{{0,80}}?took {QUANTITY}",
    rf"{QUANTITY} for CUDAGraph memory",
    rf"CUDA graph pool memory: {QUANTITY} \(actual\)",
)
GRAPHS_PLANNED = (rf"Estimated CUDA graph memory: {QUANTITY}", rf"{QUANTITY} \(estimated\)")
NEEDED = (
    rf"max seq len \({NUMBER}\), \(?{QUANTITY} KV cache is needed, "
    rf"which is larger than the available(?: KV cache memory)? \({QUANTITY}"
)
RESERVED = rf"reserved {QUANTITY} (?:memory )?for KV Cache as specified by kv_cache_memory_bytes"
AVAILABLE = (
    RESERVED,
    rf"Available KV cache memory: {QUANTITY}",
    rf"Explicitly set \({NUMBER}/[\d.]+\) ([KMGT]iB) for KV cache",  # the CPU platform
    rf"reserved for KV Cache is {QUANTITY}",
    rf"kv_cache_size[ \t]*=[ \t]*{QUANTITY}",
    rf"available_kv_cache_memory[ \t=:]+{QUANTITY}",
    rf"larger than the available(?: KV cache memory)? \({QUANTITY}",
    rf"Current kv cache memory in use is {QUANTITY}",
)
SUGGESTED = rf"--kv-cache-memory={NUMBER}` \([\d.]+ GiB\) to fit into requested memory"
GRAPH_POOL = (
    rf"CUDA graph pool memory: {QUANTITY} \(actual\), {QUANTITY} \(estimated\), difference: .{{0,20}}\({NUMBER}%\)"
)
SPARE = 150 << 20
"""Bytes of the cache's memory that the ``--kv-cache-memory`` which vLLM suggests leaves free."""
PRINTED = 0.0051
"""GiB that a figure of two decimals is off by at the most."""
NOT_CACHE = rf"Total non KV cache memory: {QUANTITY}"
MEMORY = (
    rf"total_memory[ \t]*=[ \t]*{QUANTITY}",
    rf"total_gpu_memory[ \t=(:]+{QUANTITY}",
    rf"Free memory on device[^(]{{0,40}}\({NUMBER} ?/ ?{QUANTITY}",
    rf"total capacity of {QUANTITY}",
    rf"{QUANTITY} total capacity",
)
UTILIZATION = (
    rf"[Dd]esired GPU memory utilization is \({NUMBER}",
    rf"less than desired GPU memory utilization \({NUMBER}",
    rf"'gpu_memory_utilization': {NUMBER}",
    rf"current --gpu-memory-utilization={NUMBER}",
    rf"gpu_memory_utilization[ \t=(:]+{NUMBER}",
)
BLOCKS = rf"(?:# )?(?:GPU|CUDA|cuda|gpu) blocks: {NUMBER}"
CPU_BLOCKS = rf"# CPU blocks: {NUMBER}"
TOKENS = rf"KV cache size: {NUMBER} tokens"
CONCURRENCY = rf"Maximum concurrency for {NUMBER} tokens per request: {NUMBER}x"
OVERRIDE = rf"Overriding num_gpu_blocks={NUMBER} with num_gpu_blocks_override={NUMBER}"
LONGEST = rf"estimated maximum model length is {NUMBER}"
STORED = (
    rf"max seq len \({NUMBER}\) is larger than the maximum number of tokens that can be stored in (?:the )?KV cache "
    rf"\({NUMBER}"
)
NO_BLOCKS = r"No available memory for the cache blocks"
NOT_FREE = (
    rf"Free memory on device[^(]{{0,40}}\({NUMBER} ?/ ?{NUMBER} ?GiB\) on startup is less than desired GPU memory "
    rf"utilization \({NUMBER}, {QUANTITY}"
)
OUT_OF_MEMORY = r"(?:CUDA|HIP) out of memory"
SIGNS = (
    r"LLM engine \(v",
    ENGINE,
    TOKENS,
    r"Available KV cache memory",
    r"Maximum concurrency for [\d,]+ tokens",
    r"model weights take [\d.]+",
    BLOCKS,
    r"GPU blocks: \d+",
    r"KV cache is needed, which is larger",
    r"max seq len \([\d,]+\) is larger than the maximum number of tokens",
    NO_BLOCKS,
    r"GPU memory utilization",
    r"vLLM API server version",
)


@dataclass(frozen=True)
class Draft:
    """The draft of speculative decoding: its method, and its model's name (empty where it is the target's own)."""

    method: str
    name: str


def one_boot(log: Log) -> tuple[Log, tuple[str, ...]]:
    """The lines of the last boot and of its first engine, and notes of what was left out."""
    notes = []
    replicas = sorted({place for _, line in log.lines if (place := _replica(line)) is not None})
    if len(replicas) > 1:
        log = Log([(at, line) for at, line in log.lines if _replica(line) in (None, replicas[0])])
        notes.append(f"{len(replicas)} engines (data parallel) in the log: the lines of DP{replicas[0]} are read")
    boots = [at for at, _ in log.all(ENGINE)]
    if len(boots) > 1:
        starts = [at for at, _ in log.all(START) if boots[-2] < at < boots[-1]]
        first = starts[0] if starts else boots[-1]
        log = log.between(first, float("inf"))
        notes.append(f"{len(boots)} boots in the log: the last one is read, from line {first:,}")
    return log, tuple(notes)


def _replica(line: str) -> int | None:
    """Which engine of several (data parallel) printed the line."""
    process = RANK.search(line)
    found = re.search(r"DP(\d+)", process[0]) if process else None
    return int(found[1]) if found else None


def suggested(log: Log, reported: float) -> tuple[int, float] | None:
    """The line where vLLM suggests a ``--kv-cache-memory``, and the bytes of the cache's memory (``reported``: in GiB)
    that follow: the suggestion, :data:`SPARE`, and what graphs took more than was planned for them, or less.

    None where the log does not say that they took the same, or both ways, or neither, give what was reported.
    """
    found, graphs = log.find(SUGGESTED), log.find(GRAPH_POOL)
    if found is None:
        return None
    size, apart = number(found[1][1]) + SPARE, 0.0
    if graphs is not None:
        apart = number(graphs[1][5]) / 100 * gib(graphs[1]) * GIB
    elif log.find(r"enforce_eager=True|'enforce_eager': True") is None:
        return None
    ways = {size - apart, size + apart}
    fits = [way for way in ways if abs(way / GIB - reported) <= PRINTED]
    return (found[0], fits[0]) if len(fits) == 1 else None


def model_name(log: Log) -> str | None:
    """The model as the engine's configuration names it, else the arguments, else the loader."""
    return log.value(
        r"with config: model=['\"]([^'\"]+)['\"]",
        r"'model_tag': '([^']+)'",
        r"'model': '([^']+)'",
        r"Starting to load model (\S+?)\.\.\.",
    )


def plugin(log: Log) -> tuple[str, dict[str, object]] | None:
    """The method that kvruntime's plugin was given (``--additional-config``), and its options."""
    told = log.value(r"[\"']?additional_config[\"']?[=:] ?\{[^{}]*['\"]kvruntime['\"]: (\{[^{}]*\})")
    if told is None:
        return None
    try:
        options = ast.literal_eval(told)
    except (SyntaxError, ValueError):
        return None
    name = options.pop("method", None)
    return (name, options) if isinstance(name, str) else None


def draft(log: Log) -> Draft | None:
    """What drafts the tokens, where that is a model."""
    told = log.value(r"speculative_config=SpeculativeConfig\(([^()]*)\)", r"'speculative_config': \{([^{}]*)\}")
    if told is None:
        return None
    method = re.search(r"method'?[=:] ?'([^']+)'", told)
    name = re.search(r"(?:draft_)?model'?[=:] ?'([^']+)'", told)
    kind = method[1] if method else "draft_model"
    if "ngram" in kind or "suffix" in kind or (name and name[1] == "[ngram]"):
        return None
    own = name is None or name[1] == model_name(log)
    return Draft(kind, "" if own or name is None else name[1])
