"""SGLang's boot log against prediction: weights, slots of the pool, its bytes, the windows' pool, states.

Its ``GB`` are GiB.  Slots come from ``avail mem`` before and after the weights and from ``mem_fraction_static``
(srt/model_executor, ``profile_max_num_token``); a log of several ranks is read by the first that printed a line.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.analysis.doctor.log import CLOSE, GIB, NUMBER, Diagnosis, Finding, Log, Reader, number
from kvsim.engines.sglang import INDEX_NBYTES, Sglang
from kvsim.hardware import Hardware
from kvsim.layout import Method
from kvsim.memory.sharding import Sharding, stages
from kvsim.methods import make_method
from kvsim.models.model import Model
from kvsim.models.weight_storage import weight_nbytes

BEGIN = rf"Load weight begin\. avail mem={NUMBER} GB"
END = rf"Load weight end\..*avail mem={NUMBER} GB, mem usage={NUMBER} GB"
SPLIT = rf"KV Cache is allocated\..*#tokens: {NUMBER}, K size: {NUMBER} GB, V size: {NUMBER} GB"
WHOLE = rf"KV Cache is allocated\..*#tokens: {NUMBER}, KV size: {NUMBER} GB"
WINDOWS = rf"full_layer_tokens={NUMBER}, swa_layer_tokens={NUMBER}"
STATES = rf"Mamba Cache is allocated\..*max_mamba_cache_size: {NUMBER}"
SIGNS = (r"KV Cache is allocated\.", r"Load weight end\..*avail mem=", r"server_args=ServerArgs\(", WINDOWS)
SETTINGS = ("mem_fraction_static", "page_size", "chunked_prefill_size", "tp_size", "dp_size", "swa_full_tokens_ratio")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8-e5m2"}
HALF_DIGIT = 0.006
"""GiB that a printed size may be off, to two digits."""


def model_name(log: Log) -> str | None:
    """The model's name as the log's arguments give it."""
    return log.value(r"model_path='([^']+)'", r"--model(?:-path)?[ =]([^\s']+)")


def diagnosis(log: Log, model: Model | None, hardware: Hardware | None = None, draft: Model | None = None) -> Diagnosis:
    """Reconciles the log.  Raises ``ValueError`` without a model, or for a log without a figure."""
    if model is None:
        raise ValueError("a SGLang boot log does not hold the model's shape: give --model")
    told = {name: value for name in SETTINGS if (value := log.value(rf"\b{name}={NUMBER}")) is not None}
    ranks = int(told.get("tp_size", "1"))
    (share,) = stages(model, Sharding(tensor_parallel_size=ranks))
    ratio = number(told.get("swa_full_tokens_ratio", "0.8"))
    engine = Sglang(page_size=int(told.get("page_size", "1")), swa_full_tokens_ratio=ratio)
    kind = log.value(r"[Kk][Vv] cache dtype: torch\.(\w+)", r"KV Cache is allocated\. dtype: torch\.(\w+)")
    method = make_method(DTYPES.get(kind or model.dtype or "bfloat16", "bf16"))
    findings = [
        *_weights(log, model, ranks),
        *_slots(log, share, engine, method, told),
        *_bytes(log, share, engine, method),
        *_windows(log, engine),
    ]
    if not findings:
        raise ValueError("no line of the log gives a figure that is predicted")
    version = log.value(r"sglang[ =:v]+(\d+\.\d+[\w.]*)") or ""
    notes = () if kind is not None else ("the log does not say the cache's type: taken as the model's",)
    return Diagnosis("sglang", version, model.name, told, tuple(sorted(findings, key=lambda each: each.line)), notes)


def _weights(log: Log, model: Model, ranks: int) -> Iterator[Finding]:
    found = log.find(END)
    if found is None or model.weights is None:
        return
    at, match = found
    reported, predicted = number(match[2]), weight_nbytes(model) / ranks / GIB
    why = f"{model.num_params:,} parameters over {ranks} card{'s' * (ranks > 1)}"
    cause = "" if abs(reported / predicted - 1) <= CLOSE else f"{why}; not explained: repacked or replicated weights"
    yield Finding(at, "weights", "GiB", predicted, reported, cause or why)


def _slots(log: Log, share: Model, engine: Sglang, method: Method, told: dict[str, str]) -> Iterator[Finding]:
    """Slots of the pool, from the memory that was logged."""
    found, before, after = log.find(SPLIT, WHOLE), log.find(BEGIN), log.find(END)
    if found is None:
        return
    at, reported = found[0], number(found[1][1])
    if before is None or after is None or "mem_fraction_static" not in told or log.find(WINDOWS, STATES):
        yield Finding(at, "slots", "tokens", None, reported, "memory or mem_fraction_static is not in the log alone")
        return
    free, left = number(before[1][1]), number(after[1][1])
    rest = left - free * (1 - number(told["mem_fraction_static"]))
    slots = int(rest * GIB // engine.slot_nbytes(share, method)) // engine.page_size * engine.page_size
    why = f"{rest:.2f} GiB of mem_fraction_static after the weights"
    off = HALF_DIGIT * 2 * GIB / engine.slot_nbytes(share, method)
    if abs(reported - slots) <= off:
        why += ", printed to two digits"
    elif reported < slots:
        why += "; fewer slots: a limit (max_total_tokens) or memory still held when it was measured"
    yield Finding(at, "slots", "tokens", float(slots), reported, why)


def _bytes(log: Log, share: Model, engine: Sglang, method: Method) -> Iterator[Finding]:
    """Bytes of the slots that were logged, the spare page with them."""
    found = log.find(SPLIT, WHOLE)
    if found is None or log.find(WINDOWS):
        return
    at, match = found
    reported = sum(number(size) for size in match.groups()[1:])
    slot = engine.slot_nbytes(share, method) - INDEX_NBYTES * len(share.index_layers)
    predicted = (number(match[1]) + engine.page_size) * slot / GIB
    close = abs(predicted - reported) <= max(2 * HALF_DIGIT, CLOSE * predicted)
    cause = f"{slot:,} B a slot" + ("" if close else "; another type of cache, or other layers than this model's")
    yield Finding(at, "cache", "GiB", predicted, reported, cause)


def _windows(log: Log, engine: Sglang) -> Iterator[Finding]:
    found = log.find(WINDOWS)
    if found is None:
        return
    at, match = found
    page = engine.page_size
    predicted = float(int(number(match[1]) * engine.swa_full_tokens_ratio) // page * page)
    cause = f"swa_full_tokens_ratio {engine.swa_full_tokens_ratio:g}"
    yield Finding(at, "slots of windows", "tokens", predicted, number(match[2]), cause)


READER = Reader("SGLang", SIGNS, diagnosis, model_name, needs_model=True)
