"""What the commands do: settings by device, the checks that come before any work, tasks, tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.tasks import Interruption, Task, run
from kvruntime.bench.model.caches import Contender, ours, plain_attention, stock
from kvruntime.bench.model.peers import find_peers, package_version
from kvruntime.bench.model.report import tables
from kvruntime.bench.model.tasks import (
    Quality,
    Speed,
    check_methods,
    memory_tasks,
    quality_tasks,
    speed_tasks,
    subject,
    went_wrong,
)
from kvruntime.checkpoints.load import LoadedModel, Source, load, pick_device, resolve
from kvruntime.checkpoints.pull import pulled
from kvruntime.eval.text import load_text, token_windows
from kvsim.engines.kvruntime import MOST
from kvsim.install import install_hint
from kvsim.layout import Method
from kvsim.methods.defaults import COMPRESSED
from kvsim.specs import parse_dtype, parse_sizes

MOST_TEMPERATURE = 100.0
REAL = "smollm2-135m"
"""The real model that quality falls back on."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def bench(methods: list[Method], **given: Any) -> int:
    """``kvruntime bench``; its exit code."""
    parts = given["only"] or ("memory", "speed", "quality")
    contexts = parse_sizes(given["ctx"])
    if contexts[0] < 2:
        raise ValueError(f"ctx {contexts[0]}: allowed are 2 and above (one token to prefill, one to decode)")
    if contexts[-1] > MOST:
        raise ValueError(f"ctx {contexts[-1]}: allowed are 2 to {MOST:,}")
    _check(given)
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    cpu = device == "cpu"
    batches = tuple(parse_sizes(given["batch"] or ("1,4" if cpu else "1,8,64"), "batch"))
    if batches[-1] > MOST:
        raise ValueError(f"batch {batches[-1]}: allowed are 1 to {MOST:,}")
    results = _results(given, device, Path("kvruntime-bench.json"))
    where = {"seed": given["seed"], "offline": given["offline"], "say": say}
    source = resolve(given["model_name"], **where)
    contenders, missing = _contenders(methods, given["peers"])
    results.rows = [row for row in results.rows if row["kind"] not in ("missing", "skipped")] + missing
    tasks: list[Task] = []
    loaded: LoadedModel | None = None
    if "memory" in parts or "speed" in parts:
        loaded = _load(source, device, given, contenders)
        if "memory" in parts:
            tasks += memory_tasks(loaded, contenders, contexts, given["seed"])
        if "speed" in parts:
            tasks += speed_tasks(loaded, contenders, _speed(given, batches, cpu), given["seed"])
    if "quality" in parts:
        if loaded is None and source.real and not given["quality_model"]:
            loaded = _load(source, device, given, contenders)
        try:
            real = _real(source, loaded, given["quality_model"], where)
        except (OSError, LookupError) as error:
            if given["quality_model"]:
                raise
            results.rows.append({"kind": "skipped", "what": "quality", "reason": f"no real model: {error}"})
            say(f"quality is skipped: no real model: {error}")
        else:
            judged = loaded if loaded is not None and real == source else _load(real, device, given, contenders)
            batch = _or(given["quality_batch"], 4 if cpu else 32)
            tasks += quality_tasks(judged, contenders, _quality(judged, text, given, batch), given["seed"])
    return _finish(tasks, results)


def _speed(given: dict[str, Any], batches: tuple[int, ...], cpu: bool) -> Speed:
    """How speed is measured: what was asked for, else the device's own."""
    prompt, decode = _or(given["prompt_tokens"], 256 if cpu else 512), _or(given["decode_tokens"], 16 if cpu else 128)
    return Speed(batches, prompt, decode, given["warmup"], _or(given["repeats"], 3 if cpu else 5))


def perplexity(methods: list[Method], **given: Any) -> int:
    """``kvruntime perplexity``; its exit code."""
    _check(given)
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    results = _results(given, device, Path("kvruntime-perplexity.json"))
    contenders, missing = _contenders(methods, given["peers"])
    results.rows = [row for row in results.rows if row["kind"] != "missing"] + missing
    loaded = _load(_resolve(given), device, given, contenders)
    batch = _or(given["batch"], 4 if device == "cpu" else 32)
    return _finish(quality_tasks(loaded, contenders, _quality(loaded, text, given, batch), given["seed"]), results)


def axes(method: Method, **given: Any) -> int:
    """``kvruntime axes``; its exit code."""
    from kvruntime.bench.model.quality import measure_quality
    from kvruntime.eval.axes import LADDER, Axes, GroupQuantizer, simulated_cache

    if not isinstance(method, GroupQuantizer):
        raise ValueError(f"method {method.name}: the study of axes takes {COMPRESSED} only")
    _check(given)
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    results = _results(given, device, Path("kvruntime-axes.json"))
    loaded = _load(_resolve(given), device, given, [])
    quality = _quality(loaded, text, given, _or(given["batch"], 4 if device == "cpu" else 32))
    num_windows, window = quality.windows.shape

    def task(rung: str, pair: tuple[str, str] | None) -> Task:
        def build(model: Any, max_seq_len: int) -> Any:
            return simulated_cache(model.config, method, Axes(*pair)) if pair else stock().build(model, max_seq_len)

        contender = Contender(method.name, build, package="kvruntime, simulated", around=plain_attention)
        key = {"kind": "axes", **subject(loaded, contender, given["seed"]), "axes": rung, "text": quality.text}
        key |= {"text_sha256": quality.sha256, "window": window, "num_windows": num_windows}
        key |= {"chunk": quality.chunk, "batch_size": quality.batch}

        def measure(tick: Any) -> Row:
            return measure_quality(
                loaded, contender, quality.windows, chunk=quality.chunk, batch=quality.batch, tick=tick
            )

        return Task(key, measure)

    simulated_cache(loaded.model.config, method, Axes("channel", "token"))  # refuses what cannot be studied
    return _finish([task(rung, pair) for rung, pair in LADDER.items()], results)


def generate(method: Method, **given: Any) -> int:
    """``kvruntime generate``; its exit code."""
    from kvruntime.bench.model.generate import generate as run_generate

    _check(given)
    device = pick_device(given["device"])
    source = _resolve(given)
    if not source.real and source.config and source.config["model_type"] == "gpt2" and not given["offline"]:
        from kvruntime.checkpoints.pull import pull

        pull("gpt2-tokenizer", say)
    loaded = _load(source, device, given, [ours(method)])
    say(f"{source.name}, weights: {source.weights}, {loaded.dtype} on {device}, cache {method.name}")
    out = run_generate(
        loaded,
        ours(method),
        given["prompt"],
        max_new_tokens=given["max_new_tokens"],
        temperature=given["temperature"],
        seed=given["seed"],
    )
    say(
        f"{out.num_new} tokens in {out.seconds:.1f} s; the cache, made for {out.num_provided} tokens, weighed "
        f"{out.nbytes:,} B ({out.nbytes / 2**20:.2f} MiB) against fp16's {out.fp16_nbytes:,} B: "
        f"{out.fp16_nbytes / out.nbytes:.2f}x smaller"
    )
    return 0


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check(given: dict[str, Any]) -> None:
    """The options that are wrong whatever the machine or model."""
    if given["weights_dtype"] is not None:
        given["weights_dtype"] = parse_dtype(given["weights_dtype"])
    least = {"window": 2, "chunk": 1, "quality_batch": 1, "prompt_tokens": 1, "decode_tokens": 1, "repeats": 1}
    least |= {"warmup": 0, "max_tokens": 0, "max_new_tokens": 1, "batch": 1}
    for name, low in least.items():
        if isinstance(given.get(name), int) and not low <= given[name] <= MOST:
            raise ValueError(f"{name.replace('_', ' ')} {given[name]}: allowed are {low} to {MOST:,}")
    if "temperature" in given and not 0 <= given["temperature"] <= MOST_TEMPERATURE:
        raise ValueError(f"temperature {given['temperature']:g}: allowed are 0 (greedy) to {MOST_TEMPERATURE:g}")


def _results(given: dict[str, Any], device: str, default: Path) -> Results:
    header = describe(device, ["kvruntime", *sys.argv[1:]]) | {"seed": given["seed"]}
    return Results(given["out"] or default, header, resume=given["resume"], anew=given["anew"])


def _resolve(given: dict[str, Any]) -> Source:
    return resolve(given["model_name"], seed=given["seed"], offline=given["offline"], say=say)


def _load(source: Source, device: str, given: dict[str, Any], contenders: list[Contender]) -> LoadedModel:
    say(f"loading {source.name}, weights: {source.weights}")
    loaded = load(source, device, given["weights_dtype"], say)
    if contenders:
        check_methods(loaded, contenders)
    return loaded


def _real(source: Source, loaded: LoadedModel | None, asked: str | None, where: dict[str, Any]) -> Source:
    """The model that quality is measured on: the one asked for, the benchmark's own if it can be, else ``REAL``.

    Its own needs real weights and, once ``loaded``, a tokenizer.
    """
    if asked:
        real = resolve(asked, **where)
        if not real.real:
            raise ValueError(f"quality model {asked} has {real.weights} weights here: quality needs real ones")
        return real
    if source.real and (loaded is None or loaded.tokenizer is not None):
        return source
    if where["offline"] and pulled(REAL) is None:
        raise LookupError(f"--offline; `kvruntime pull {REAL}` once (93 MB), or --quality-model DIRECTORY")
    why = loaded.no_tokenizer if source.real and loaded else f"has {source.weights} weights"
    say(f"{source.name} {why}: quality is measured on {REAL} instead")
    return resolve(REAL, **where)


def _contenders(methods: list[Method], peers: bool) -> tuple[list[Contender], list[Row]]:
    contenders = [ours(method) for method in methods]
    missing: list[dict[str, str]] = []
    if peers:
        there, missing = find_peers()
        contenders += there
        for row in missing:
            say(f"{row['method']} is left out: {row['package']} is not installed: {install_hint('peers')}")
        for peer in there:
            say(f"{peer.name}: {peer.package} {package_version(peer.package)}")
    return contenders, list(missing)


def _quality(loaded: LoadedModel, text: Any, given: dict[str, Any], batch: int) -> Quality:
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.source.name} {loaded.no_tokenizer}: text cannot be scored")
    cpu = loaded.device.type == "cpu"
    most = _or(given["max_tokens"], 4096 if cpu else 32768) or None
    windows = token_windows(loaded.tokenizer, text, given["window"], most)
    limit = loaded.max_positions
    if limit is not None and windows.shape[1] > limit:
        raise ValueError(f"window {windows.shape[1]} exceeds the model's {limit} positions")
    chunk = min(_or(given["chunk"], 16 if cpu else 1), windows.shape[1])
    return Quality(text.name, text.sha256, windows, chunk, min(batch, len(windows)))


def _finish(tasks: list[Task], results: Results) -> int:
    """Measures, prints the tables; 1 where a measurement of our own failed otherwise than for want of memory."""
    try:
        rows = run(tasks, results)
    except Interruption as stop:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        again = " ".join(["kvruntime", *words, *([] if results.anew else ["--resume"])])
        say(f"interrupted: {stop.done} of {stop.total} measurements are in {results.path}; go on with: {again}")
        return 130
    rows += [row for row in results.rows if row["kind"] in ("missing", "skipped")]
    print(tables(rows))
    print(f"\nrecorded in {results.path}")
    return 1 if went_wrong(rows) else 0
