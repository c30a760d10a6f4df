"""Boot logs of llama.cpp: src/llama-model.cpp, llama-context.cpp, llama-kv-cache.cpp.

A log may hold several models (a target and its draft): each has its own lines of metadata, and the caches after them
are its own.  A cache that names the layers of another model than the last one read is that one's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from kvsim.analysis.doctor.log import CLOSE, MIB, NUMBER, Diagnosis, Finding, Log, Reader, number
from kvsim.engines.llama_cpp import OVERHEAD_BAND, PAD, LlamaCpp
from kvsim.engines.states import served
from kvsim.hardware import Hardware
from kvsim.layout import LayerShape, Method, nbytes
from kvsim.methods import Full, Ggml
from kvsim.methods.ggml import PLAIN, TYPES
from kvsim.models.model import Model

SHAPE = ("n_layer", "n_head_kv", "n_embd_head_k", "n_embd_head_v", "n_embd_k_gqa", "n_embd_v_gqa", "n_swa")
CONTEXT = ("n_ctx", "n_ctx_seq", "n_seq_max", "n_ubatch", "flash_attn", "kv_unified")
SIGNS = (
    r"llama_kv_cache\w*: ",
    r"KV self size",
    r"KV buffer size =",
    r"(?:llama_context|llama_new_context_with_model|llama_init_from_model): n_ctx ",
    r"failed to allocate buffer for kv cache",
    r"(?:print_info|print_meta): n_layer ",
)
META = re.compile(rf"(?:print_info|llm_load_print_meta|print_meta): ({'|'.join(SHAPE)}) += (\d+)\b")
RUN = re.compile(
    rf"(?:llama_context|llama_new_context_with_model|llama_init_from_model): ({'|'.join(CONTEXT)}) += (\w+)"
)
NAME = re.compile(r"general\.name +(?:str )? *= (.+)")
FILE = re.compile(r"loaded meta data with .* from (\S+)|loading (?:draft )?model '([^']+)'")
TOTAL = re.compile(
    rf"size = +{NUMBER} MiB \( *(\d+) cells, +(\d+) layers, +(\d+)(?:/ ?(\d+))? seqs\)"
    rf"(?:, K \((\w+)\): +{NUMBER} MiB, V \((\w+)\): +{NUMBER} MiB)?"
)
SELF = re.compile(rf"KV self size += +{NUMBER} MiB, K \((\w+)\): +{NUMBER} MiB, V \((\w+)\): +{NUMBER} MiB")
CELLS = re.compile(r"creating +(non-SWA|SWA) KV cache, size = (\d+) cells")
FAILED = re.compile(rf"failed to allocate (\w+) buffer of size {NUMBER}|allocating {NUMBER} MiB on device")
_UNKNOWN_CARD = Hardware("card", "", "", None, "not known", None, None, None, None, None, None, "")


@dataclass
class _Section:
    """The lines of one model: its metadata, its contexts' settings, and how it is named."""

    meta: dict[str, str] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    name: str = ""
    file: str = ""
    lines: list[tuple[int, str]] = field(default_factory=list)
    model: Model | None = None

    @property
    def log(self) -> Log:
        return Log(self.lines)

    @property
    def title(self) -> str:
        return self.name or self.file or (f"{self.meta['n_layer']} layers" if "n_layer" in self.meta else "a model")

    @property
    def told(self) -> dict[str, str]:
        return {**self.meta, **self.run}


def diagnosis(log: Log, model: Model | None, hardware: Hardware | None, drafted: Model | None) -> Diagnosis:
    """Cells of every cache, their bytes for keys and values, and the device's buffers, model by model.

    Raises ``ValueError`` where the log has no size of a cache.
    """
    sections = _sections(log)
    _choose(sections, model)
    notes: list[str] = []
    found = [(each, _section(each, sections)) for each in sections]
    held = [(each, own + _buffers(each, own) + _failures(each, notes)) for each, own in found]
    held = [(each, own) for each, own in held if own]
    if not held:
        raise ValueError("the log has lines of llama.cpp, but none with a size of its cache")
    findings = [finding for _, own in held for finding in own]
    name = held[0][0].name or (model.name if model else "")
    if len(held) > 1:
        findings = [replace(each, what=f"{each.what} ({section.title})") for section, own in held for each in own]
        name = ", ".join(section.title for section, _ in held)
        notes.append(f"{len(held)} models in the log, each by its own lines: {name}")
        if model is not None:
            taken = ", ".join(section.title for section in sections if section.model is not None)
            notes.append(f"{model.name} is taken for {taken}")
    findings.sort(key=lambda finding: finding.line)
    version = log.value(r"build: (\S+)") or ""
    return Diagnosis("llama.cpp", version, name, held[0][0].told, tuple(findings), tuple(notes))


def _sections(log: Log) -> list[_Section]:
    """One a model: a new one begins where a file is loaded or metadata are told that the last one has already."""
    out = [_Section()]
    for at, line in log.lines:
        meta, run, file, name = META.search(line), RUN.search(line), FILE.search(line), NAME.search(line)
        last = out[-1]
        renamed = name is not None and last.name not in ("", name[1].strip())
        if (meta is not None and meta[1] in last.meta) or (last.meta and (file is not None or renamed)):
            last = _Section()
            out.append(last)
        last.lines.append((at, line))
        if meta is not None:
            last.meta[meta[1]] = meta[2]
        if run is not None and (run[2].isdecimal() or run[1] in ("flash_attn", "kv_unified")):
            last.run.setdefault(run[1], run[2])
        if file is not None:
            last.file = (file[1] or file[2]).replace("\\", "/").rsplit("/", 1)[-1]
        if name is not None and not last.name:
            last.name = name[1].strip()
    for before, after in pairwise(out):
        if "n_ubatch" in before.run:
            after.run.setdefault("n_ubatch", before.run["n_ubatch"])
    return out


def _choose(sections: Sequence[_Section], model: Model | None) -> None:
    """Gives ``model`` to the sections whose layers and heads it has; to the first where no section has them."""
    if model is None:
        return
    layers = {len(model.cache_layers), sum(count for _, count in model.kinds)}
    widths = {str(layer.num_kv_heads * layer.key_dim) for layer in model.cache_layers}
    fits = [
        each
        for each in sections
        if int(each.meta.get("n_layer", "0")) in layers and each.meta.get("n_embd_k_gqa", "") in widths
    ]
    for section in fits or sections[:1]:
        section.model = model


def _owner(layers: int, section: _Section, sections: Sequence[_Section]) -> _Section:
    """The model of a cache of ``layers`` layers that stands among the lines of ``section``."""
    if section.meta.get("n_layer") == str(layers):
        return section
    others = [each for each in sections if each.meta.get("n_layer") == str(layers)]
    return others[0] if len(others) == 1 else section


def _section(section: _Section, sections: Sequence[_Section]) -> list[Finding]:
    findings: list[Finding] = []
    windows = iter([match[1] for _, match in section.log.all(CELLS.pattern)])
    for at, line in section.lines:
        if re.search(r"\bRS\b|recurrent", line):
            continue
        total, older, cells = TOTAL.search(line), SELF.search(line), CELLS.search(line)
        if total is not None:
            findings += _cache(at, total, _owner(int(total[3]), section, sections), next(windows, ""))
        elif older is not None:
            findings += _older_cache(at, older, section)
        if cells is not None:
            findings += _cells(at, cells[1], float(cells[2]), section)
    return findings


def _buffers(section: _Section, found: Sequence[Finding]) -> list[Finding]:
    """The device's buffers: keys and values over all devices, states, and the graph's."""
    out = []
    log, model = section.log, section.model
    held = [(at, number(match[1])) for at, match in log.all(rf"KV buffer size = +{NUMBER} MiB")]
    if held:
        caches = [each.reported for each in found if each.unit == "MiB"]
        why = "the sum of the caches" if caches else "no cache is printed with its cells and types"
        out.append(Finding(held[-1][0], "KV buffers", "MiB", sum(caches) or None, sum(size for _, size in held), why))
    states = log.find(rf"recurrent: size = +{NUMBER} MiB \( *(\d+) cells")
    if states is not None:
        predicted = None
        if model is not None:
            each = [served(state, "float32", "float32").buffers(int(states[1][2])) for state in model.state_layers]
            predicted = sum(nbytes(buffers) for buffers in each) / MIB
        why = f"{states[1][2]} sequences, float32" if predicted else "the states' shape is not in the log: give --model"
        out.append(Finding(states[0], "states", "MiB", predicted, number(states[1][1]), why))
    graph = log.find(rf"(?:CUDA|ROCm|Vulkan|MTL|Metal|SYCL)\d* +compute buffer size = +{NUMBER} MiB")
    if graph is not None:
        predicted, why = None, "an estimate needs the model: give --model"
        if model is not None:
            engine = LlamaCpp(n_ubatch=int(section.run.get("n_ubatch", "512")))
            predicted = engine.overhead(model, _UNKNOWN_CARD)["compute"] / MIB
            low, high = (factor * predicted for factor in OVERHEAD_BAND["compute"])
            inside = "within" if low <= number(graph[1][1]) <= high else "outside"
            why = f"an estimate: {inside} its band {low:.0f}-{high:.0f}"
        out.append(Finding(graph[0], "compute buffer", "MiB", predicted, number(graph[1][1]), why))
    return out


def _failures(section: _Section, notes: list[str]) -> list[Finding]:
    """An allocation that failed, beside what the cache takes where it was the cache's."""
    log = section.log
    failed = next(((at, match) for at, line in section.lines if (match := FAILED.search(line))), None)
    if failed is None:
        return []
    at, match = failed
    size = number(match[3]) if match[3] else number(match[2]) / MIB
    cache = log.find(r"failed to allocate buffer for kv cache") is not None
    part = "the cache" if cache else "weights" if log.find(r"unable to allocate \w+ buffer") else "a buffer"
    notes.insert(0, f"the boot failed, line {at}: {size:,.2f} MiB for {part} could not be allocated")
    predicted, cause = None, f"memory for {part}"
    context, layers = section.run.get("n_ctx"), section.meta.get("n_layer")
    shape = _shape(section, int(layers), "") if layers is not None else None
    if (
        cache
        and context is not None
        and layers is not None
        and shape is not None
        and section.meta.get("n_swa", "0") == "0"
    ):
        kinds = log.find(r"type_k = '(\w+)', type_v = '(\w+)'")
        types = (kinds[1][1], kinds[1][2]) if kinds is not None else ("f16", "f16")
        cells = int(layers) * (-(-int(context) // PAD) * PAD)
        sizes = [_stream(shape, kind, cells, place) for place, kind in enumerate(types)]
        if all(each is not None for each in sizes):
            predicted = sum(each or 0.0 for each in sizes)
            cause = f"{layers} layers x n_ctx {context}, {types[0]} and {types[1]}, over all devices"
    return [Finding(at, "the allocation that failed", "MiB", predicted, size, cause)]


def _cells(at: int, kind: str, reported: float, section: _Section) -> list[Finding]:
    """Cells of the caches with and without a window."""
    told, model = section.told, section.model
    context = told.get("n_ctx_seq") or told.get("n_ctx")
    if context is None:
        return []
    predicted: float = -(-int(context) // PAD) * PAD
    why = f"n_ctx padded to {PAD}"
    if kind == "SWA":
        width = told.get("n_swa") or next(
            (str(x.window) for x in (model.cache_layers if model else ()) if x.window), None
        )
        if width is None:
            return [Finding(at, "cells with a window", "cells", None, reported, "n_swa is not known: give --model")]
        sequences = int(told.get("n_seq_max", "1")) if told.get("kv_unified") == "true" else 1
        wanted = min(int(predicted), int(width) * sequences + int(told.get("n_ubatch", "512")))
        predicted = -(-wanted // PAD) * PAD
        why = f"window {width} and n_ubatch {told.get('n_ubatch', '512')}, padded to {PAD}"
    label = "cells with a window" if kind == "SWA" else "cells"
    cause = why if predicted == reported else f"{why}; padded otherwise in this build"
    return [Finding(at, label, "cells", predicted, reported, cause)]


def _cache(at: int, match: re.Match[str], section: _Section, window: str) -> list[Finding]:
    """Keys and values of one cache, from its own cells, layers and types."""
    cells, layers = int(match[2]), int(match[3])
    streams = int(match[5] or match[4])
    if match[6] is None:
        return [Finding(at, "cache", "MiB", None, number(match[1]), "its types are not printed")]
    types, sizes = (match[6], match[8]), (number(match[7]), number(match[9]))
    shape = _shape(section, layers, window)
    where = {"SWA": " (window)", "non-SWA": " (full)"}.get(window, "")
    why = f"{layers} layers x {cells} cells x {streams} streams"
    return list(_streams(at, shape, types, sizes, layers * cells * streams, where, why))


def _older_cache(at: int, match: re.Match[str], section: _Section) -> list[Finding]:
    told, model = section.told, section.model
    layers = int(told["n_layer"]) if "n_layer" in told else len(model.cache_layers) if model else 0
    cells = int(told.get("n_ctx", "0"))
    shape = _shape(section, layers, "") if layers and cells else None
    why = f"{layers} layers x {cells} cells" if shape else "layers or n_ctx are not in the log: give --model"
    types, sizes = (match[2], match[4]), (number(match[3]), number(match[5]))
    return list(_streams(at, shape, types, sizes, layers * cells, "", why))


def _shape(section: _Section, layers: int, window: str) -> LayerShape | None:
    """The layer that a cache holds: of the model, else of the log's metadata."""
    meta: Mapping[str, str] = section.meta
    if section.model is not None:
        every = section.model.cache_layers
        own = [layer for layer in every if not window or (layer.window is not None) == (window == "SWA")]
        return own[0] if len(set(own)) == 1 and len(own) == layers else None
    if "n_embd_k_gqa" in meta:
        return LayerShape(1, int(meta["n_embd_k_gqa"]), int(meta.get("n_embd_v_gqa", "0")))
    if "n_head_kv" in meta and "n_embd_head_k" in meta:
        key = int(meta["n_embd_head_k"])
        return LayerShape(int(meta["n_head_kv"]), key, int(meta.get("n_embd_head_v", key)))
    return None


def _stream(shape: LayerShape, kind: str, tokens: int, place: int) -> float | None:
    """MiB of ``tokens`` keys (``place`` 0) or values (1) of type ``kind``; ``None`` for a type that is not known."""
    if kind not in TYPES and kind not in PLAIN:
        return None
    whole = replace(shape, window=None, kind="")
    method: Method = Full(PLAIN[kind]) if kind in PLAIN else Ggml(kind, kind)
    return nbytes([method.buffers(whole, 1, tokens)[place]]) / MIB


def _streams(
    at: int,
    shape: LayerShape | None,
    types: tuple[str, str],
    sizes: tuple[float, float],
    tokens: int,
    where: str,
    why: str,
) -> Iterator[Finding]:
    for place, (name, kind, reported) in enumerate(zip(("keys", "values"), types, sizes, strict=True)):
        predicted, cause = None, why
        if shape is not None:
            predicted = _stream(shape, kind, tokens, place)
            if predicted is None:
                cause = f"{why}; a type {kind} is not known here"
            elif abs(predicted - reported) > 0.006 and (not predicted or abs(reported / predicted - 1) > CLOSE):
                cause = f"{why}; the log's model has other heads or layers than the one predicted"
        elif "give" not in why:
            cause = f"{why}; the layers' shape is not in the log: give --model"
        yield Finding(at, f"{name}, {kind}{where}", "MiB", predicted, reported, cause)


READER = Reader("llama.cpp", SIGNS, diagnosis)
