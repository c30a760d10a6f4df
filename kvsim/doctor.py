"""Reconciles an engine's boot log with prediction: each line that gives a figure, what was predicted, and why not.

Lines are read as vLLM prints them (v1/worker/gpu_worker.py, v1/core/kv_cache_utils.py, releases 0.6 to 0.32) and as
llama.cpp does (src/llama-kv-cache.cpp, llama-context.cpp).  A figure is predicted from what the log says before it: the
pool's tokens from the memory that was logged, not from the memory that was predicted, so that an error stands where it
arises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvsim.capacity import room
from kvsim.engines.llama_cpp import OVERHEAD_BAND as LLAMA_BAND
from kvsim.engines.llama_cpp import PAD, LlamaCpp
from kvsim.engines.states import served
from kvsim.engines.vllm import OVERHEAD_BAND, Pool, Vllm, server_defaults
from kvsim.hardware import Hardware
from kvsim.layout import LayerShape, Method, nbytes
from kvsim.methods import Full, Ggml, make_method
from kvsim.model import Model
from kvsim.parallel import Sharding, stages
from kvsim.quantization import KV_DTYPES, QUANTIZATIONS

GIB, MIB = 1 << 30, 1 << 20
CLOSE = 0.01
"""Errors within this share need no cause."""
GRAPHS_IN_BUDGET = (0, 21)
"""The release from which vLLM takes CUDA graphs out of the pool's memory."""
TOKENS_BY_REQUESTS = (0, 21)
"""The release from which "GPU KV cache size" counts whole requests, not blocks over groups (vllm#43308: ten times the
tokens for the same bytes of a model with windows)."""


@dataclass(frozen=True)
class Finding:
    """One figure of the log: line number, what it is, its unit, predicted (``None``: not predicted) and reported.

    ``cause`` says why they differ, or what the prediction rests on.
    """

    line: int
    what: str
    unit: str
    predicted: float | None
    reported: float
    cause: str = ""

    @property
    def error(self) -> float | None:
        """``reported / predicted - 1``."""
        return None if not self.predicted else self.reported / self.predicted - 1


@dataclass(frozen=True)
class Diagnosis:
    """What a log says: the engine, its version, the model's name, its settings, and every figure found."""

    engine: str
    version: str
    model: str
    settings: Mapping[str, str]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()


Found = tuple[int, "re.Match[str]"]


@dataclass(frozen=True)
class Log:
    """The lines of a log, and the patterns found in them."""

    lines: Sequence[str]
    text: str = field(repr=False, default="")

    @classmethod
    def of(cls, text: str) -> Log:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        return cls(plain.split("\n"), plain)

    def find(self, pattern: str) -> Found | None:
        """Line number and match of the first line that has ``pattern``."""
        return next(self.all(pattern), None)

    def all(self, pattern: str) -> Iterator[Found]:
        """Of every line that has it."""
        compiled = re.compile(pattern)
        for number, line in enumerate(self.lines, 1):
            match = compiled.search(line)
            if match is not None:
                yield number, match

    def value(self, *patterns: str) -> str | None:
        """The first group of the first pattern that is found."""
        for pattern in patterns:
            found = self.find(pattern)
            if found is not None:
                return found[1][1]
        return None


VLLM_SIGNS = (
    r"LLM engine \(v",
    r"KV cache size: [\d,]+ tokens",
    r"Available KV cache memory",
    r"Maximum concurrency for [\d,]+ tokens",
    r"model weights take [\d.]+\s*GiB",
    r"# (?:GPU|CUDA|cuda) blocks",
    r"GPU blocks: \d+",
)
LLAMA_SIGNS = (r"llama_kv_cache\w*: ", r"KV self size", r"KV buffer size =", r"llama_context: n_ctx ")


def engine_of(text: str) -> str | None:
    """``vllm`` or ``llama.cpp``, whichever log this is; ``None`` where it is neither."""
    log = Log.of(text)
    for name, signs in (("vllm", VLLM_SIGNS), ("llama.cpp", LLAMA_SIGNS)):
        if any(log.find(sign) for sign in signs):
            return name
    return None


def model_of(text: str) -> str | None:
    """The model's name as a vLLM log gives it."""
    return Log.of(text).value(
        r"with config: model='([^']+)'", r"'model': '([^']+)'", r"Starting to load model (\S+?)\.\.\."
    )


def diagnose(text: str, model: Model | None, hardware: Hardware | None = None) -> Diagnosis:
    """Reconciles a boot log.

    ``model``: predicted against; needed for vLLM (see :func:`model_of`), for llama.cpp its own metadata serve where
    it is ``None``.  ``hardware``: the card, where the log does not say its memory.  Raises ``ValueError`` for a text
    that has no line of an engine's boot log, or a vLLM log without a model.
    """
    engine = engine_of(text)
    if engine == "vllm":
        if model is None:
            raise ValueError("the log does not name its model: give --model")
        return _Vllm(Log.of(text), model, hardware).diagnosis()
    if engine == "llama.cpp":
        return _llama(Log.of(text), model)
    raise ValueError("no line of a vLLM or llama.cpp boot log in it")


class _Vllm:
    """A vLLM log, its settings read, its figures predicted one after another."""

    def __init__(self, log: Log, model: Model, hardware: Hardware | None) -> None:
        self.log, self.model, self.hardware = log, model, hardware
        self.version = log.value(r"LLM engine \(v?([^)]+)\)", r"version (\d+\.\d+\.\d+)") or ""
        numbers = re.findall(r"\d+", self.version)
        self.release = (int(numbers[0]), int(numbers[1])) if len(numbers) > 1 else None
        self.settings: dict[str, str] = {}
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        memory = self._number(r"total_memory=([\d.]+)GiB", r"total_gpu_memory[ =(]+([\d.]+)\s*GiB")
        self.memory = memory * GIB if memory else float(hardware.memory_nbytes or 0) if hardware else 0.0
        given = self._number(r"'gpu_memory_utilization': ([\d.]+)", r"gpu_memory_utilization[ =(]+([\d.]+)")
        self.utilization = given or (0.92 if self.release and self.release >= (0, 21) else 0.9)
        self.sharding = Sharding(
            int(self._setting("tensor_parallel_size", "1")),
            int(self._setting("pipeline_parallel_size", "1")),
            decode_context_parallel_size=int(self._setting("decode_context_parallel_size", "1")),
        )
        kv = self._setting("kv_cache_dtype", "auto")
        dtype = self._setting("dtype", "torch.float16").removeprefix("torch.")
        self.method: Method = make_method(KV_DTYPES.get(dtype if kv == "auto" else kv, "fp16"))
        self.quantization = self._setting("quantization", "None")
        defaults = server_defaults(int(self.memory), hardware.id if hardware else "")
        batched = self._number(r"max_num_batched_tokens(?:=|': | to )(\d+)")
        seqs = self._number(r"max_num_seqs(?:=|': | to )(\d+)")
        block = self._number(r"'block_size': (\d+)", r"[ (]block_size=(\d+)")
        self.engine = Vllm(
            block_size=int(block or 16),
            gpu_memory_utilization=self.utilization,
            max_num_batched_tokens=int(batched or defaults["max_num_batched_tokens"]),
            max_num_seqs=int(seqs or defaults["max_num_seqs"]),
            disable_hybrid_kv_cache_manager=log.find("Hybrid KV cache manager is disabled") is not None,
            tensor_parallel_size=self.sharding.tensor_parallel_size,
        )
        self.stage = stages(model, self.sharding)[0] if self.sharding != Sharding() else model

    def _setting(self, name: str, default: str) -> str:
        value = self.log.value(rf"[ ,(]{name}=([^,\s)]+)", rf"'{name}': '?([^,'}}]+)'?") or default
        self.settings[name] = value.strip("'")
        return self.settings[name]

    def _number(self, *patterns: str) -> float | None:
        value = self.log.value(*patterns)
        return float(value.replace(",", "")) if value is not None else None

    def diagnosis(self) -> Diagnosis:
        weights = self._weights()
        activation = self._overhead("activation", "peak activations", ACTIVATION)
        non_torch = self._overhead("non_torch", "not PyTorch's", NON_TORCH)
        graphs = self._overhead("cuda_graphs", "CUDA graphs", GRAPHS)
        available = self._available(weights, activation, non_torch, graphs)
        self._layout()
        if available is not None:
            self._pool(available)
        if not self.findings:
            raise ValueError("the log has lines of vLLM, but none with a figure that can be reconciled")
        self.findings.sort(key=lambda finding: finding.line)
        name = model_of(self.log.text) or self.model.name
        return Diagnosis("vllm", self.version, name, self.settings, tuple(self.findings), tuple(self.notes))

    def _add(self, found: Found, what: str, unit: str, predicted: float | None, reported: float, cause: str) -> None:
        self.findings.append(Finding(found[0], what, unit, predicted, reported, cause))

    def _weights(self) -> float | None:
        """GiB of a rank's weights: predicted, and reported where the log has them."""
        predicted = self._predicted_weights()
        found = self.log.find(WEIGHTS)
        if found is None:
            return predicted
        reported = float(next(group for group in found[1].groups() if group))
        cause = ""
        if predicted and abs(reported / predicted - 1) > CLOSE:
            more = reported > predicted
            cause = (
                "more than the language model's weights: vision or draft weights, padding, or layers kept in 16 bits"
                if more
                else "fewer bits a weight than taken: a quantized checkpoint, or experts elsewhere"
            )
        self._add(found, "weights", "GiB", predicted, reported, cause or self._weight_note)
        return reported

    _weight_note = ""

    def _predicted_weights(self) -> float | None:
        card = replace(self.hardware or _UNKNOWN_CARD, memory_nbytes=1 << 60)
        bits = QUANTIZATIONS.get(self.quantization)
        wide = 32 if self.settings["dtype"] == "torch.float32" else 16
        if self.quantization not in ("None", "") and bits is None:
            bits = self.model.weight_bits
            self._weight_note = f"quantization {self.quantization}: bits as the config says"
            if bits is None or bits >= 16:
                self._weight_note = f"quantization {self.quantization}: its bits a weight are not known, give none"
                return None
        try:
            space = room(self.model, card, bits or wide, 0.0, quantized=bits is not None, sharding=self.sharding)
        except ValueError as error:
            self.notes.append(str(error))
            return None
        return space.weight_nbytes / GIB

    def _overhead(self, name: str, what: str, pattern: str) -> float:
        """GiB: reported, else estimated."""
        estimate = self.engine.overhead(self.stage, self.hardware or _UNKNOWN_CARD)[name] / GIB
        found = self.log.find(pattern)
        if found is None:
            return estimate
        reported = float(next(group for group in found[1].groups() if group))
        low, high = (factor * estimate for factor in OVERHEAD_BAND[name])
        inside = "within" if low <= reported <= high else "outside"
        self._add(found, what, "GiB", estimate, reported, f"an estimate: {inside} its band {low:.2f}-{high:.2f}")
        return reported

    def _available(self, weights: float | None, activation: float, non_torch: float, graphs: float) -> float | None:
        """GiB for the cache: as logged, else as predicted from the lines before."""
        predicted = None
        if self.memory and weights is not None:
            counted = graphs if self.release and self.release >= GRAPHS_IN_BUDGET else 0.0
            predicted = self.memory / GIB * self.utilization - weights - activation - non_torch - counted
        found = self.log.find(AVAILABLE)
        if found is None:
            return predicted
        reported = float(next(group for group in found[1].groups() if group))
        share = f"{self.utilization:g} of {self.memory / GIB:.2f} GiB, less what is above" if self.memory else ""
        cause = share or "the log does not say the card's memory: give --gpu"
        ranks = {match[1].group(0) for match in self.log.all(AVAILABLE)}
        if len(ranks) > 1:
            cause += "; ranks differ, the first is taken"
        self._add(found, "KV cache memory", "GiB", predicted, reported, cause)
        return reported

    def _layout(self) -> None:
        """Block size and padding layers that vLLM says it chose."""
        groups = self.engine.groups(self.stage, self.method)
        found = self.log.find(r"Setting attention block size to (\d+) tokens")
        if found is not None:
            size = max(group.block_size for group in groups)
            why = "a page of keys and values holds a layer's state"
            self._add(found, "block size", "tokens", size, float(found[1][1]), why)
        found = self.log.find(r"Add (\d+) padding layers")
        if found is not None:
            held = len(self.stage.cache_layers) + len(self.stage.state_layers)
            padding = sum(group.num_layers for group in groups) - held
            why = f"{len(groups)} groups of {groups[0].num_layers} layers"
            self._add(found, "padding layers", "layers", padding, float(found[1][1]), why)

    def _pool(self, available: float) -> None:
        """Blocks, tokens and concurrency from the memory of the cache."""
        asked = self.log.find(CONCURRENCY)
        length = int(asked[1][1].replace(",", "")) if asked else int(self._number(r"max_seq_len=(\d+)") or 8192)

        def figures(engine: Vllm, model: Model, method: Method) -> Pool:
            tokens = self.sharding.rank_tokens(length)
            return engine.pool(model, method, int(available * GIB), tokens)

        pool = figures(self.engine, self.stage, self.method)
        ranks = self.sharding.context_ranks
        logged = self._number(TOKENS)

        def tokens(pool: Pool) -> float:
            ways = (pool.num_tokens_before * ranks, pool.num_tokens * ranks)
            if self.release is None and logged is not None:  # an unknown release: whichever it is nearer to
                return min(ways, key=lambda way: abs(way - logged))
            return ways[self.release is not None and self.release >= TOKENS_BY_REQUESTS]

        readings: tuple[tuple[str, str, str, Callable[[Pool], float]], ...] = (
            (BLOCKS, "GPU blocks", "blocks", lambda pool: pool.num_gpu_blocks),
            (TOKENS, "KV cache size", "tokens", tokens),
            (CONCURRENCY, f"concurrency at {length:,} tokens", "requests", lambda pool: pool.concurrency),
        )
        for pattern, what, unit, read in readings:
            found = self.log.find(pattern)
            if found is None:
                continue
            reported = float(found[1].groups()[-1].replace(",", ""))
            predicted = read(pool)
            cause = "from the memory above, which is printed to 0.01 GiB"
            if abs(reported / predicted - 1) > CLOSE:
                cause = self._why(reported, lambda e, m, k, read=read: read(figures(e, m, k)))  # type: ignore[misc]
            self._add(found, what, unit, predicted, reported, cause)

    def _why(self, reported: float, read: Callable[[Vllm, Model, Method], float]) -> str:
        """The one change of settings that explains a figure, or that none was found."""
        changed = replace(self.engine, disable_hybrid_kv_cache_manager=not self.engine.disable_hybrid_kv_cache_manager)
        trials: list[tuple[str, Vllm, Model, Method]] = [
            ("without the hybrid cache manager (windows as full attention)", changed, self.stage, self.method),
            ("with asynchronous scheduling", replace(self.engine, concurrent_batches=2), self.stage, self.method),
            ("with two blocks a state", replace(self.engine, state_blocks=2), self.stage, self.method),
        ]
        names = ("fp8", "fp16", "fp32", "int8", "int4", "nvfp4")
        trials += [(f"with a {name} cache", self.engine, self.stage, make_method(name)) for name in names]
        for what, engine, model, method in trials:
            try:
                predicted = read(engine, model, method)
            except ValueError:
                continue
            if predicted and abs(reported / predicted - 1) <= CLOSE / 2:
                return f"fits {what}"
        if len(self.stage.cache_layers) < len(self.model.layers):
            return "other ranks may have less memory: the pool is the smallest rank's"
        return "not explained: the log's model or settings may not be those predicted"


WEIGHTS = r"Model loading took ([\d.]+) Gi?B|Loading model weights took ([\d.]+) Gi?B|model weights take ([\d.]+)\s*GiB"
ACTIVATION = r"torch peak memory increase: ([\d.]+)GiB|PyTorch activation peak memory takes ([\d.]+)\s*GiB"
NON_TORCH = r"non-torch forward increase memory: ([\d.]+)GiB|non_torch_memory(?: takes |=)([\d.]+)\s*GiB; PyTorch"
GRAPHS = r"Graph capturing finished in .*?took ([\d.]+) GiB"
AVAILABLE = r"Available KV cache memory: ([\d.]+) GiB|reserved for KV Cache is ([\d.]+)\s*GiB|kv_cache_size=([\d.]+)GiB"
BLOCKS = r"(?:# )?(?:GPU|CUDA|cuda) blocks: ([\d,]+)"
TOKENS = r"KV cache size: ([\d,]+) tokens"
CONCURRENCY = r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x"

_UNKNOWN_CARD = Hardware("card", "", "", None, "not known", None, None, None, None, None, None, "")

LLAMA_TOTAL = re.compile(
    r"size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers, +(\d+)(?:/ ?(\d+))? seqs\)"
    r"(?:, K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB)?"
)
LLAMA_SELF = re.compile(r"KV self size += +([\d.]+) MiB, K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB")


def _llama(log: Log, model: Model | None) -> Diagnosis:
    """A llama.cpp log: cells of every cache, and their bytes for keys and values."""
    meta: dict[str, str] = {}
    for name in ("n_layer", "n_head_kv", "n_embd_head_k", "n_embd_head_v", "n_embd_k_gqa", "n_embd_v_gqa", "n_swa"):
        value = log.value(rf"(?:print_info|llm_load_print_meta|print_meta): {name} += (\d+)\b")
        if value is not None:
            meta[name] = value
    for name in ("n_ctx", "n_ctx_seq", "n_seq_max", "n_ubatch", "flash_attn", "kv_unified"):
        value = log.value(rf"(?:llama_context|llama_new_context_with_model|llama_init_from_model): {name} += (\w+)")
        if value is not None:
            meta[name] = value
    findings: list[Finding] = []
    windows = iter([match[1] for _, match in log.all(r"creating +(non-SWA|SWA) KV cache")])
    for number, line in enumerate(log.lines, 1):
        if "RS" in line or "recurrent" in line:
            continue
        total, older = LLAMA_TOTAL.search(line), LLAMA_SELF.search(line)
        if total is not None:
            findings += _cache(number, total, model, meta, next(windows, ""))
        elif older is not None:
            findings += _older_cache(number, older, model, meta)
        cells = re.search(r"creating +(non-SWA|SWA) KV cache, size = (\d+) cells", line)
        if cells is not None:
            findings += _cells(number, cells[1], float(cells[2]), model, meta)
    findings += _buffers(log, findings, model, meta)
    if not findings:
        raise ValueError("the log has lines of llama.cpp, but none with a size of its cache")
    findings.sort(key=lambda finding: finding.line)
    name = log.value(r"general\.name +(?:str )? *= (.+)") or (model.name if model else "")
    return Diagnosis("llama.cpp", log.value(r"build: (\S+)") or "", name.strip(), meta, tuple(findings))


def _buffers(log: Log, found: Sequence[Finding], model: Model | None, meta: Mapping[str, str]) -> list[Finding]:
    """The device's buffers: keys and values over all devices, states, and the graph's."""
    out = []
    held = [(number, float(match[1])) for number, match in log.all(r"KV buffer size = +([\d.]+) MiB")]
    if held:
        caches = [each.reported for each in found if each.unit == "MiB"]
        why = "the sum of the caches" if caches else "no cache is printed with its cells and types"
        out.append(Finding(held[-1][0], "KV buffers", "MiB", sum(caches) or None, sum(size for _, size in held), why))
    states = log.find(r"recurrent: size = +([\d.]+) MiB \( *(\d+) cells")
    if states is not None:
        predicted = None
        if model is not None:
            each = [served(state, "float32", "float32").buffers(int(states[1][2])) for state in model.state_layers]
            predicted = sum(nbytes(buffers) for buffers in each) / MIB
        why = f"{states[1][2]} sequences, float32" if predicted else "the states' shape is not in the log: give --model"
        out.append(Finding(states[0], "states", "MiB", predicted, float(states[1][1]), why))
    graph = log.find(r"(?:CUDA|ROCm|Vulkan|MTL|Metal)\d* +compute buffer size = +([\d.]+) MiB")
    if graph is not None:
        predicted, why = None, "an estimate needs the model: give --model"
        if model is not None:
            engine = LlamaCpp(n_ubatch=int(meta.get("n_ubatch", "512")))
            predicted = engine.overhead(model, _UNKNOWN_CARD)["compute"] / MIB
            low, high = (factor * predicted for factor in LLAMA_BAND["compute"])
            inside = "within" if low <= float(graph[1][1]) <= high else "outside"
            why = f"an estimate: {inside} its band {low:.0f}-{high:.0f}"
        out.append(Finding(graph[0], "compute buffer", "MiB", predicted, float(graph[1][1]), why))
    return out


def _cells(number: int, kind: str, reported: float, model: Model | None, meta: Mapping[str, str]) -> list[Finding]:
    """Cells of the caches with and without a window."""
    context = meta.get("n_ctx_seq") or meta.get("n_ctx")
    if context is None:
        return []
    predicted: float = -(-int(context) // PAD) * PAD
    why = f"n_ctx padded to {PAD}"
    if kind == "SWA":
        width = meta.get("n_swa") or next(
            (str(x.window) for x in (model.cache_layers if model else ()) if x.window), None
        )
        if width is None:
            return [Finding(number, "cells with a window", "cells", None, reported, "n_swa is not known: give --model")]
        sequences = int(meta.get("n_seq_max", "1")) if meta.get("kv_unified") == "true" else 1
        wanted = min(int(predicted), int(width) * sequences + int(meta.get("n_ubatch", "512")))
        predicted = -(-wanted // PAD) * PAD
        why = f"window {width} and n_ubatch {meta.get('n_ubatch', '512')}, padded to {PAD}"
    label = "cells with a window" if kind == "SWA" else "cells"
    cause = why if predicted == reported else f"{why}; padded otherwise in this build"
    return [Finding(number, label, "cells", predicted, reported, cause)]


def _cache(
    number: int, match: re.Match[str], model: Model | None, meta: Mapping[str, str], window: str
) -> list[Finding]:
    """Keys and values of one cache, from its own cells, layers and types."""
    cells, layers = int(match[2]), int(match[3])
    streams = int(match[5] or match[4])
    if match[6] is None:
        return [Finding(number, "cache", "MiB", None, float(match[1]), "its types are not printed")]
    types, sizes = (match[6], match[8]), (float(match[7]), float(match[9]))
    shape = _shape(model, meta, layers, window)
    where = {"SWA": " (window)", "non-SWA": " (full)"}.get(window, "")
    why = f"{layers} layers x {cells} cells x {streams} streams"
    return _streams(number, shape, types, sizes, layers * cells * streams, where, why)


def _older_cache(number: int, match: re.Match[str], model: Model | None, meta: Mapping[str, str]) -> list[Finding]:
    layers = int(meta["n_layer"]) if "n_layer" in meta else len(model.cache_layers) if model else 0
    cells = int(meta.get("n_ctx", "0"))
    shape = _shape(model, meta, layers, "") if layers and cells else None
    why = f"{layers} layers x {cells} cells" if shape else "layers or n_ctx are not in the log: give --model"
    return _streams(number, shape, (match[2], match[4]), (float(match[3]), float(match[5])), layers * cells, "", why)


def _shape(model: Model | None, meta: Mapping[str, str], layers: int, window: str) -> LayerShape | None:
    """The layer that a cache holds: of the model, else of the log's metadata."""
    if model is not None:
        own = [layer for layer in model.cache_layers if not window or (layer.window is not None) == (window == "SWA")]
        return own[0] if len(set(own)) == 1 and len(own) == layers else None
    if "n_embd_k_gqa" in meta:
        return LayerShape(1, int(meta["n_embd_k_gqa"]), int(meta.get("n_embd_v_gqa", "0")))
    if "n_head_kv" in meta and "n_embd_head_k" in meta:
        key = int(meta["n_embd_head_k"])
        return LayerShape(int(meta["n_head_kv"]), key, int(meta.get("n_embd_head_v", key)))
    return None


def _streams(
    number: int,
    shape: LayerShape | None,
    types: tuple[str, str],
    sizes: tuple[float, float],
    tokens: int,
    where: str,
    why: str,
) -> list[Finding]:
    plain = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    out = []
    for place, (name, kind, reported) in enumerate(zip(("keys", "values"), types, sizes, strict=True)):
        predicted, cause = None, why
        if shape is not None:
            whole = replace(shape, window=None, kind="")
            method: Method = Full(plain[kind]) if kind in plain else Ggml(kind, kind)
            predicted = nbytes([method.buffers(whole, 1, tokens)[place]]) / MIB
            if abs(predicted - reported) > 0.006 and (not predicted or abs(reported / predicted - 1) > CLOSE):
                cause = f"{why}; the log's model has other heads or layers than the one predicted"
        elif "give" not in why:
            cause = f"{why}; the layers' shape is not in the log: give --model"
        out.append(Finding(number, f"{name}, {kind}{where}", "MiB", predicted, reported, cause))
    return out
