"""Every recorded measurement beside what kvsim predicts for it today: one point each, from the records alone.

A *claim* is a kind of prediction: bytes, attention, whole steps.  Points are made from the files under
``validation/results``; what has no prediction is counted with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from kvsim.finite_json import read_json
from kvsim.hardware import Hardware, find_hardware
from kvsim.latency.constants import Constants
from kvsim.latency.profile import Profile, load_profile
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.steps import decode_step, prefill
from kvsim.layout import Method, tokens_alone
from kvsim.memory.capacity import max_batch
from kvsim.memory.estimate import cache_nbytes
from kvsim.methods import method_named
from kvsim.models.load import load_model
from kvsim.models.model import Model
from validation.claims import compare, phases, serving
from validation.claims.predict import measured_trace, predict, predicted_trace
from validation.claims.subjects import rebuild_method
from validation.latency.ways import COMPILED, ENGINE, GENERATE, NEW, SEEN, STATIC, prompt_way, served, ways
from validation.recorded import FOLDER
from validation.report.collection import Collection, Point
from validation.report.pace import DAY, paced
from validation.report.split import split

Row = dict[str, Any]

RESERVE = 2 << 30
"""Bytes that ``bench engine`` grants a step beside weights and cache, written here again: a pin."""
FILLED = 8192
"""Tokens that a benchmark fills a cache with at a time: a pin too."""


def collect(paths: Sequence[Path] | None = None, profiles: Sequence[Path] | None = None) -> Collection:
    """The points of these files (all records by default).

    Raises ``ValueError`` for a file that is no record.
    """
    found = Collection()
    every = sorted(FOLDER.rglob("*.json")) if paths is None else list(paths)
    known = [path for path in every if path.parent.name == "profiles"] if profiles is None else list(profiles)
    calibrated = {profile.device: profile for profile in map(load_profile, known)}
    for path in every:
        file = _file(path)
        if file is None:
            continue
        own = READERS.get(file["schema"].partition("/")[0])
        if own is None:
            raise ValueError(f"{path} is no record: its schema is {file['schema']!r}")
        own(file, path.name, found, calibrated)
    found.points += list(paced(found.points))
    return found


OTHERS = ("mutants.json",)
"""Records of tests, not of measurements."""


def _file(path: Path) -> dict[str, Any] | None:
    """A record; None for the files of other tools, which have reports of their own."""
    file = read_json(path, "record")
    own = path.parent.name in ("planners", "time", "profiles") or path.name in OTHERS
    return None if own or not isinstance(file, dict) else file


def _bytes(file: dict[str, Any], name: str, found: Collection, _: dict[str, Profile]) -> None:
    """Rows of ``validation memory``."""
    for row in file["rows"]:
        if row["predicted"] is None:
            found.leave(f"{row['kind']} ({row['device']})", "recorded, kvsim makes no statement about it")
            continue
        factors = {
            "model": row["model"],
            "method": row["method"]["name"],
            "card": row["device_name"],
            "tokens": f"{row['num_tokens']:,} tokens",
            "phase": row.get("phase", ""),
        }
        pairs = [(row["measured"], predict(row))]
        if "trace" in row:
            traces = zip(measured_trace(row), predicted_trace(row), strict=True)
            worst = max(traces, key=lambda both: abs(both[0][1] - both[1][1]))
            if worst[0][1] != worst[1][1]:
                pairs = [(worst[0][1], worst[1][1])]
        measured, predicted = pairs[0]
        factors["what"] = compare.claim(row)
        found.take([Point(_weighed(row), float(predicted or 0), float(measured), factors, name)])


def _weighed(row: Row) -> str:
    """The claim of a row of bytes: blocks are what an allocator makes of them, and depend on what was freed before."""
    if row.get("counter") == "allocated":
        return "blocks"
    if row["kind"] != "peak":
        return "bytes"
    return "peaks" if row["way"] == "generate" else "peaks of a layer"


def _limits(file: dict[str, Any], name: str, found: Collection, _: dict[str, Profile]) -> None:
    """Rows of ``validation reliability``: the figures of those that have any."""
    for row in file["rows"]:
        figures = [each for each in row.get("figures", ()) if each["model"] != "tiny"]
        if not figures:
            why = "of a model that was made for the run" if row.get("figures") else "a promise, without a figure"
            found.leave(f"{row['run']} ({row['device']})", why)
        found.take(FIGURES[row["run"]](each, row["device"], f"reliability/{name}") for each in figures)


def _phase(figure: Row, device: str, source: str) -> Point:
    """What the allocator held, or held at the most, in a phase."""
    factors = {
        "model": figure["model"],
        "method": figure.get("method", {}).get("name", ""),
        "card": device,
        "rows": f"{figure.get('batch_size', 1)} rows",
        "phase": figure["phase"],
        "what": figure["what"],
    }
    size = phases.predicted(figure, _model(figure["model"]))
    return Point("memory by phase", size, phases.own(figure), factors, source)


def _planned(figure: Row, device: str, source: str) -> Point:
    """The largest batch that kvsim says fits a card, which was allocated and stepped, where 3 % more was refused."""
    method = rebuild_method(figure["method"])
    factors = {
        "model": figure["model"],
        "method": method.name,
        "size": f"{figure['rows']} x {figure['num_tokens']:,}",
        "card": device,
    }
    reserve = figure.get("reserve", phases.FIRST_RESERVE)
    batch = phases.planned(_model(figure["model"]), device, method, figure["num_tokens"], reserve)
    return Point("largest batch", float(batch), float(figure["rows"]), factors, source)


def _bench(file: dict[str, Any], name: str, found: Collection, calibrated: dict[str, Profile]) -> None:
    """Rows of ``kvruntime bench``, whichever of its commands."""
    device = file["device"]["name"]
    try:
        card: Hardware | None = find_hardware(device)
    except LookupError:
        card = None
    for row in file["rows"]:
        kind = row["kind"]
        if kind in ("missing", "skipped", "ceiling"):
            continue
        if "failed" in row:
            found.leave(f"{kind} ({device})", "the measurement failed")
            continue
        read = KINDS.get(kind)
        if read is None:
            found.leave(f"{kind} ({device})", "recorded, kvsim makes no statement about it")
            continue
        if card is None and kind != "memory":
            found.leave(f"{kind} ({device})", "kvsim hardware has no such card")
            continue
        source = f"{file_kind(file, name)}/{name}"
        found.take(read(row, card, source, found, calibrated.get(device)))


def file_kind(file: dict[str, Any], name: str) -> str:
    """The folder of a record of ``kvruntime bench``."""
    kinds = {row["kind"] for row in file["rows"]}
    if kinds & {"attend", "sdpa"}:
        return "kernels"
    return "engine" if "step" in kinds else "generate" if "generate" in kinds else "bench"


def _factors(row: Row, card: Hardware | None, **more: str) -> dict[str, str]:
    size = f"{row['batch_size']} x {row['num_tokens']:,}" if "num_tokens" in row else ""
    return {
        "model": row["model"],
        "method": row["method"],
        "size": size,
        "rows": f"{row['batch_size']} rows",
        "card": card.id if card else "",
        **more,
    }


def _method(row: Row, found: Collection) -> Method | None:
    try:
        return method_named(row["method"])
    except LookupError:
        found.leave(f"{row['kind']} of {row['method']}", "kvsim makes no method from this name")
        return None


def _attention(row: Row, card: Hardware, source: str, found: Collection, _: Profile | None) -> Iterator[Point]:
    """A layer's decode attention by this project's kernels."""
    if row.get("ragged"):
        found.leave("attend, ragged rows", "kvsim takes rows of one length")
        return
    if row.get("kernel") == "portable":
        found.leave("attend, portable kernel", "3 to 12 times slower: kvsim says so and does not predict it")
        return
    method = method_named("fp16") if row["kind"] == "full" else _method(row, found)
    if method is None:
        return
    claim = "attention, coded tokens" if row["kind"] == "attend" and tokens_alone(method) else "attention"
    model = _model(row["model"])
    layer = replace(model.cache_layers[0], window=None, kind="")  # what is timed is attention over all tokens
    heads = (model.num_q_heads, layer.num_kv_heads, layer.key_dim)
    if heads != (row["num_q_heads"], row["num_kv_heads"], row["head_dim"]):
        found.leave(f"{row['kind']} of {row['model']}", "the shape timed is not the model's")
        return
    roofline = Roofline(model, card, Serving(engine="kvruntime"))
    seconds, beyond = roofline.layer_attention(method, layer, row["batch_size"], row["num_tokens"])
    median, low, high = row["seconds"]
    factors = _factors(row, card, type=row.get("dtype", ""))
    yield Point(claim, seconds + beyond, median, factors, source, {"kv": seconds}, (low, high))


def _step(row: Row, card: Hardware, source: str, found: Collection, profile: Profile | None) -> Iterator[Point]:
    """A decode step of the engine, without and with a profile of its card."""
    if row["package"] != "kvruntime":
        found.leave(f"step of {row['package']}", "another library's cache")
        return
    method = _method(row, found)
    if method is None:
        return
    yield from _timed("engine", ENGINE, method, row, tuple(row["seconds_per_step"]), card, source, profile)


CLAIM_OF = {
    GENERATE: "generate",
    COMPILED: "generate, compiled",
    SEEN: "stock generate",
    NEW: "stock generate, new lengths",
    STATIC: "stock generate, compiled",
}


def _generated(row: Row, card: Hardware, source: str, found: Collection, profile: Profile | None) -> Iterator[Point]:
    """Steps of stock ``generate()`` in each way that the row timed, and its prompt."""
    timed = ways(row)
    if not timed:
        found.leave(*_not_predicted(row))
        return
    method = method_named("bf16") if row["package"] == "transformers" else _method(row, found)
    if method is None:
        return
    for runtime, seconds in timed:
        yield from _timed(CLAIM_OF[runtime], runtime, method, row, seconds, card, source, profile)
    yield from _prefill(row, card, source, found, profile)


def _not_predicted(row: Row) -> tuple[str, str]:
    """What a row of ``generate`` timed that no runtime of kvsim's is, and why."""
    if row["package"] not in ("kvruntime", "transformers"):
        return f"generate of {row['package']}", "another library's cache"
    call = row.get("call", "greedy")
    if call != "greedy":
        return f"generate, {call} calls", "kvsim predicts greedy calls of rows of one length"
    return "generate, steps that the host plans", "kvsim predicts steps in graphs and compiled ones"


def _timed(
    claim: str,
    runtime: str,
    method: Method,
    row: Row,
    seconds: tuple[float, float, float],
    card: Hardware,
    source: str,
    profile: Profile | None,
) -> Iterator[Point]:
    load = (_model(row["model"]), method, card, row["batch_size"], row["num_tokens"])
    median, low, high = seconds
    own = f"{claim}, calibrated{another_day(profile, runtime, row)}"
    for name, fixed in ((claim, None), (own, constants_of(profile, runtime, card))):
        if name == claim or fixed is not None:
            step = decode_step(*load, Serving(engine=served(runtime), profile=fixed))
            run = row.get("code") or ""
            yield Point(name, step.seconds.value, median, _factors(row, card), source, step.parts, (low, high), run)


def another_day(profile: Profile | None, runtime: str, row: Row) -> str:
    """What is said of a row whose runtime the host takes part in, and which another run than the profile's measured:
    hosts differ, and one differs by the day."""
    same = profile is None or runtime == ENGINE or (row.get("code") or "") in profile.codes.get(runtime, ())
    return "" if same else DAY


def constants_of(profile: Profile | None, runtime: str, card: Hardware) -> Constants | None:
    """What a profile says of a runtime; None where it has no part for it."""
    return profile.constants(card) if profile is not None and runtime in profile.parts else None


def _prefill(row: Row, card: Hardware, source: str, found: Collection, profile: Profile | None) -> Iterator[Point]:
    """The time to the first token: of a prompt that the card bounds, or the host that launches its kernels."""
    runtime, (median, low, high) = prompt_way(row)
    if runtime and _model(row["model"]).state_layers:
        found.parts_left["prompts of models with constant states", "their mixers run in PyTorch's operators"] += 1
    elif runtime:
        method = method_named("bf16") if row["package"] == "transformers" else _method(row, found)
        load = (_model(row["model"]), card, row["batch_size"], row["num_tokens"], Serving(engine=served(runtime)))
        step = prefill(*load, method=method)
        claim = "short prompts" if step.parts["overhead"] else "first token"
        yield Point(claim, step.seconds.value, median, _factors(row, card), source, step.parts, (low, high))


def _largest(row: Row, card: Hardware, source: str, found: Collection, profile: Profile | None) -> Iterator[Point]:
    """The largest batch that kvsim says fits, and the one that ran."""
    method = _method(row, found)
    if method is not None:
        model = _model(row["model"])
        room = row["free_nbytes"] - RESERVE
        layer = model.cache_layers[0]
        filling = 4 * FILLED * layer.num_kv_heads * (layer.key_dim + layer.value_dim)  # random tokens, two at 16 bits
        fits = max_batch(model, method, row["num_tokens"], room) or 0
        fits = max_batch(model, method, row["num_tokens"], room - fits * filling) or 0
        factors = _factors(row, card)
        yield Point("largest batch", float(fits), float(row["batch_size"]), factors, source)


def _memory(
    row: Row, card: Hardware | None, source: str, found: Collection, profile: Profile | None
) -> Iterator[Point]:
    """A cache that ``kvruntime bench`` weighed."""
    if row["package"] != "kvruntime":
        found.leave(f"memory of {row['package']}", "another library's cache")
        return
    method = _method(row, found)
    if method is not None:
        predicted = cache_nbytes(_model(row["model"]), method, row["batch_size"], row["num_tokens"])
        yield Point("bytes", float(predicted), float(row["nbytes"]), _factors(row, card, what="bench"), source)


@cache
def _model(name: str) -> Model:
    return load_model(name)


KINDS: dict[str, Callable[..., Iterator[Point]]] = {
    "attend": _attention,
    "full": _attention,
    "step": _step,
    "prefill": _prefill,
    "largest": _largest,
    "generate": _generated,
    "memory": _memory,
}


def _resident(figure: Row, device: str, source: str) -> Point:
    """What filled layers add to the process, as the operating system counts it."""
    factors = {
        "model": figure["model"],
        "method": figure["method"]["name"],
        "card": device,
        "tokens": f"{figure['num_tokens']:,} tokens",
    }
    return Point("resident memory", float(phases.resident_nbytes(figure)), float(figure["measured"]), factors, source)


FIGURES: dict[str, Callable[[Row, str, str], Point]] = {
    "memory by phase": _phase,
    "the largest batch": _planned,
    "resident memory": _resident,
}


LEFT_OF_VLLM = {
    "agreement": "replayed in transformers: nothing predicts rounding",
    "load": "without steps of decoding",
    "pool": "of a log that gives its memory to 0.01 GiB",
}


def _served(file: dict[str, Any], name: str, found: Collection, _: dict[str, Profile]) -> None:
    """Rows of serving: pools, and the steps of loads."""
    for row in file["rows"]:
        if row["kind"] == "agreement" or not row.get("at_once", row.get("memory_nbytes")):
            found.leave(f"{row['kind']} of vLLM", LEFT_OF_VLLM[row["kind"]])
            continue
        factors = {"model": row["model"], "method": row["method"]["name"], "card": row["device_name"]}
        if row["kind"] == "pool":
            factors["size"] = f"requests of {row['max_model_len']:,} tokens"
            found.take([Point("vLLM's pool", float(serving.pools(row)[1]), float(row["num_tokens"]), factors, name)])
        else:
            step, seconds = serving.step(row), row["step_seconds"]
            factors |= {"size": f"{row['at_once']} x {row['prompt_tokens']:,}", "rows": f"{row['at_once']} rows"}
            spread = (min(seconds), max(seconds))
            point = Point("vLLM", step.seconds.value, serving.steady(seconds), factors, name, step.parts, spread)
            found.take([point])


READERS: dict[str, Callable[[dict[str, Any], str, Collection, dict[str, Profile]], None]] = {
    "validation": _bytes,
    "validation.reliability": _limits,
    "validation.ranks": split,
    "validation.serving": _served,
    "kvruntime.bench": _bench,
}
