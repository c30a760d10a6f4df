"""What the commands do: settings by device, the checks that come before any work, tasks, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvruntime.bench.given import (
    check_given,
    check_reads,
    check_window,
    contenders_given,
    finish,
    given_or,
    load_given,
    open_results,
    prompt_given,
    resolve_given,
    say,
    text_given,
)
from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tasks import Task
from kvruntime.bench.model.caches import Contender, ours, plain_attention, stock
from kvruntime.bench.model.report import figures, tables
from kvruntime.bench.model.tasks import Quality, Speed, memory_tasks, quality_tasks, speed_tasks, subject
from kvruntime.checkpoints.load import LoadedModel, Source, pick_device, rank_device, resolve
from kvruntime.checkpoints.pull import pulled
from kvruntime.eval.text import load_text, token_windows
from kvsim.engines.kvruntime import MOST
from kvsim.layout import Method
from kvsim.methods.defaults import COMPRESSED
from kvsim.specs import parse_sizes

REAL = "smollm2-135m"
"""The real model that quality falls back on."""
BENCH_TOKENS = 2048
"""Tokens of a text that ``kvruntime bench`` scores on a CPU."""


def bench(methods: list[Method], **given: Any) -> int:
    """``kvruntime bench``; its exit code."""
    parts = given["only"] or ("memory", "speed", "quality")
    contexts = parse_sizes(given["ctx"])
    if contexts[0] < 2:
        raise ValueError(f"ctx {contexts[0]}: allowed are 2 and above (one token to prefill, one to decode)")
    if contexts[-1] > MOST:
        raise ValueError(f"ctx {contexts[-1]}: allowed are 2 to {MOST:,}")
    check_given(given)
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    cpu = device == "cpu"
    if cpu:
        given["max_tokens"] = given_or(given["max_tokens"], BENCH_TOKENS)
    batches = tuple(parse_sizes(given["batch"] or ("1,4" if cpu else "1,8,64"), "batch"))
    if batches[-1] > MOST:
        raise ValueError(f"batch {batches[-1]}: allowed are 1 to {MOST:,}")
    results = open_results(given, device, Path("kvruntime-bench.json"))
    where = {"seed": given["seed"], "offline": given["offline"], "say": say}
    source = resolve(given["model_name"], **where)
    contenders, missing = contenders_given(methods, given["peers"])
    results.rows = [row for row in results.rows if row["kind"] not in ("missing", "skipped")] + missing
    tasks: list[Task] = []
    loaded: LoadedModel | None = None
    if "memory" in parts or "speed" in parts:
        loaded = load_given(source, device, given, contenders)
        if "memory" in parts:
            tasks += memory_tasks(loaded, contenders, contexts, given["seed"])
        if "speed" in parts:
            tasks += speed_tasks(loaded, contenders, _speed(given, batches, cpu), given["seed"])
    if "quality" in parts:
        if loaded is None and source.real and not given["quality_model"]:
            loaded = load_given(source, device, given, contenders)
        try:
            real = _real(source, loaded, given["quality_model"], where)
        except (OSError, LookupError) as error:
            if given["quality_model"]:
                raise
            results.rows.append({"kind": "skipped", "what": "quality", "reason": f"no real model: {error}"})
            say(f"quality is skipped: no real model: {error}")
        else:
            judged = loaded if loaded is not None and real == source else load_given(real, device, given, contenders)
            batch = given_or(given["quality_batch"], 4 if cpu else 32)
            tasks += quality_tasks(judged, contenders, _quality(judged, text, given, batch), given["seed"])
    code = finish(tasks, results, tables, figures)
    if code == 0 and given["plots"]:
        _draw(results.path)
    return code


def _draw(path: Path) -> None:
    """The pictures of a results file in a folder beside it; a line where they cannot be drawn."""
    from kvruntime.bench.harness.results import read
    from kvruntime.bench.plot import draw_all

    try:
        drawn = draw_all(read(path), path.with_name(f"{path.stem}-plots"), "png")
    except ValueError as error:
        say(f"no pictures: {error}")
    else:
        print(f"pictures: {drawn[-1]} and {len(drawn) - 1} more")


def _speed(given: dict[str, Any], batches: tuple[int, ...], cpu: bool) -> Speed:
    """How speed is measured: what was asked for, else the device's own."""
    prompt = given_or(given["prompt_tokens"], 256 if cpu else 512)
    decode = given_or(given["decode_tokens"], 16 if cpu else 128)
    return Speed(batches, prompt, decode, given["warmup"], given_or(given["repeats"], 3 if cpu else 5))


def perplexity(methods: list[Method], **given: Any) -> int:
    """``kvruntime perplexity``; its exit code."""
    check_given(given)
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    results, contenders, loaded = text_given(methods, device, given, Path("kvruntime-perplexity.json"))
    batch = given_or(given["batch"], 4 if device == "cpu" else 32)
    tasks = quality_tasks(loaded, contenders, _quality(loaded, text, given, batch), given["seed"])
    return finish(tasks, results, tables)


def axes(method: Method, **given: Any) -> int:
    """``kvruntime axes``; its exit code."""
    from kvruntime.bench.model.quality import measure_quality
    from kvruntime.eval.axes import LADDER, Axes, GroupQuantizer, simulated_cache

    if not isinstance(method, GroupQuantizer):
        raise ValueError(f"method {method.name}: the study of axes takes {COMPRESSED} only")
    check_given(given)
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    results = open_results(given, device, Path("kvruntime-axes.json"))
    loaded = load_given(resolve_given(given), device, given, [])
    quality = _quality(loaded, text, given, given_or(given["batch"], 4 if device == "cpu" else 32))
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
    return finish([task(rung, pair) for rung, pair in LADDER.items()], results, tables)


def generate(method: Method, other: Method | None = None, **given: Any) -> int:
    """``kvruntime generate``; its exit code.  ``other``: a second method for the same prompt."""
    from kvruntime.bench.model import generate_report
    from kvruntime.bench.model.generate import generate as run_generate

    check_given(given)
    methods = [method] if other is None else [method, other]
    if other == method:
        raise ValueError(f"compare {method.name}: it is what it would be compared with")
    prompt = prompt_given(given["prompt"], given["prompt_file"])
    device = pick_device(given["device"])
    source = resolve_given(given)
    ranks = given["tensor_parallel_size"]
    rank, device = rank_device(ranks, source, device)
    if not source.real and source.config and source.config["model_type"] == "gpt2" and not given["offline"]:
        from kvruntime.checkpoints.pull import pull

        pull("gpt2-tokenizer", say)
    loaded = load_given(source, device, given, [ours(each) for each in methods], ranks)
    names = [each.name for each in methods]
    tell = say if rank == 0 else _nothing
    where = f"{ranks} ranks, first {device}" if ranks > 1 else device
    tell(f"{source.name}, weights: {source.weights}, {loaded.dtype} on {where}, cache {' and '.join(names)}")
    quiet: dict[str, Any] = {"write": _nothing} if rank or given["as_json"] or other is not None else {}
    chosen = {name: given[name] for name in ("max_new_tokens", "temperature", "seed")}
    outs = [run_generate(loaded, ours(each), prompt, **chosen, **quiet) for each in methods]
    if rank:
        return 0
    if given["as_json"]:
        about = {"schema": "kvruntime.generate/1", "model": source.name, "weights": source.weights}
        about |= {"dtype": loaded.dtype, "device": device, "prompt": prompt, **chosen}
        rows = [generate_report.as_row(name, out) for name, out in zip(names, outs, strict=True)]
        print(json.dumps(about | {"rows": rows}, indent=2))
    elif other is None:
        say(generate_report.summary(outs[0]))
    else:
        print(generate_report.comparison(names, outs))
    return 0


def _nothing(text: str) -> None:
    """What ranks but the first say."""


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


def _quality(loaded: LoadedModel, text: Any, given: dict[str, Any], batch: int) -> Quality:
    check_reads(loaded)
    cpu = loaded.device.type == "cpu"
    most = given_or(given["max_tokens"], 4096 if cpu else 32768) or None
    windows = token_windows(loaded.tokenizer, text, given["window"], most)
    check_window(windows.shape[1], loaded.max_positions)
    chunk = min(given_or(given["chunk"], 16 if cpu else 1), windows.shape[1])
    return Quality(text.name, text.sha256, windows, chunk, min(batch, len(windows)))
