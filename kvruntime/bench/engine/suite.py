"""``kvruntime bench engine``: whole decode steps over context and batch, ours, and other libraries' where they run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.session import carry_out, release, say, task
from kvruntime.bench.harness.store import check_writable
from kvruntime.bench.harness.tables import of_kernel
from kvruntime.checkpoints.load import shape_sha256
from kvsim.engines.kvruntime import MOST
from kvsim.layout import Method
from kvsim.methods import Full
from kvsim.specs import parse_size

if TYPE_CHECKING:
    from kvruntime.bench.harness.tasks import Task
    from kvruntime.bench.model.caches import Contender
    from kvruntime.checkpoints.load import LoadedModel

Clock = Callable[[Callable[[], Any], int], float]
"""``clock(step, count)``: seconds of one of ``count`` steps."""

WARM = 4
SMALLEST = 512
LARGEST_AT = 32768
SHORT_PROMPT, TURNS = 2048, 10
"""Up to so many tokens a prompt is timed so many times as often: it takes milliseconds, and the host is not steady."""
RESERVE = 2 << 30
"""Bytes that a step's activations, partial results and graphs are granted beside weights and cache."""


@dataclass(frozen=True)
class Subject:
    """A model's shape, and what is measured of it: contexts by batch size, and prompts whose prefill is timed.

    ``positions``: the config's ``max_position_embeddings`` raised to it, for contexts beyond those it was trained for.
    """

    model: str
    dtype: str
    contexts: dict[int, tuple[int, ...]]
    prompts: tuple[int, ...] = ()
    positions: int | None = None
    largest: bool = False
    peers: tuple[tuple[int, int, int], ...] = ()
    """``(batch size, context, decoded tokens)`` of other libraries' runs."""


K = 1024
LLAMA = (1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
SUBJECTS = {
    "gpt2": Subject(
        "gpt2", "float16", {1: (128, 512, 1024), 64: (1024,)}, prompts=(960,), peers=((1, 512, 64), (64, 1024, 64))
    ),
    "llama-3-8b": Subject(
        "llama-3-8b",
        "bfloat16",
        {1: LLAMA, 8: (32 * K,), 64: (4 * K,)},
        prompts=(8 * K,),
        positions=128 * K,
        largest=True,
        peers=((1, 8 * K, 16),),
    ),
    "gpt2-large": Subject("gpt2-large", "float16", {1: (512, 1024), 64: (1024,)}),
    "llama-3.2-1b": Subject("llama-3.2-1b", "bfloat16", {1: (2 * K, 32 * K), 8: (8 * K,), 64: (2 * K,)}),
    "gpt2-medium": Subject("gpt2-medium", "float16", {1: (512, 1024), 16: (1024,)}, prompts=(960,)),
    "gpt2-xl": Subject("gpt2-xl", "float16", {1: (512, 1024), 32: (1024,)}, prompts=(960,)),
    "llama-2-7b": Subject(
        "llama-2-7b", "bfloat16", {1: (1 * K, 4 * K, 16 * K), 4: (4 * K,), 16: (2 * K,)}, (4 * K,), positions=16 * K
    ),
}
DEFAULT = ("gpt2", "llama-3-8b")
QUICK: dict[str, dict[int, tuple[int, ...]]] = {
    "gpt2": {1: (512,), 64: (1024,)},
    "llama-3-8b": {1: (2 * K, 32 * K)},
    "gpt2-large": {1: (512,)},
    "llama-3.2-1b": {1: (2 * K,)},
    "gpt2-medium": {1: (512,)},
    "gpt2-xl": {1: (512,)},
    "llama-2-7b": {1: (1 * K,)},
}


def methods_of(dtype: str) -> tuple[Method, ...]:
    """The uncompressed engine and the layouts beside it, exact tokens in the model's type."""
    from kvruntime.methods import LAYERS

    own = [room.measures.ENGINE if room.measures else room.benched for room in LAYERS.values() if room.benched]
    return (Full(dtype), *(with_dtype(method, dtype) for layouts in own for method in layouts))


def with_dtype(method: Method, dtype: str) -> Method:
    """The method with exact tokens in ``dtype``, where it has any."""
    return replace(method, dtype=dtype) if hasattr(method, "dtype") else method  # type: ignore[type-var]


class Models:
    """The model last asked for and the engine last built on it; one of each fits the device at a time."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device, self.seed = device, seed
        self._loaded: tuple[str, LoadedModel] | None = None
        self._engine: tuple[Any, Any] | None = None
        self._broken: dict[Any, str] = {}

    def config(self, subject: Subject) -> dict[str, Any]:
        from kvsim.models.load import load_config

        config = load_config(subject.model)[1]
        config = dict(config.get("text_config", config))
        if subject.positions is not None:
            name = "max_position_embeddings" if "max_position_embeddings" in config else "n_positions"
            config[name] = max(subject.positions, config[name])
        return config

    def loaded(self, subject: Subject) -> LoadedModel:
        """The model with random weights, made on the device in its own type."""
        if self._loaded is None or self._loaded[0] != subject.model:
            from kvruntime.checkpoints.load import Source, load

            self._engine = self._loaded = None
            release()
            say(f"loading {subject.model}, weights: random (seed {self.seed}), {subject.dtype}")
            source = Source(subject.model, self.weights, config=self.config(subject), seed=self.seed)
            self._loaded = (subject.model, load(source, self.device, subject.dtype))
        return self._loaded[1]

    @property
    def weights(self) -> str:
        return f"random (seed {self.seed})"

    def engine(self, subject: Subject, method: Method, batch_size: int, max_seq_len: int) -> Any:
        """The engine; one that could not be built is not tried again."""
        key = (subject.model, method, batch_size, max_seq_len)
        if key in self._broken:
            raise RuntimeError(f"as before: {self._broken[key]}")
        if self._engine is None or self._engine[0] != key:
            import torch

            from kvruntime.engine import Engine

            loaded = self.loaded(subject)
            self._engine = None
            release()
            try:
                built = Engine(loaded.model, method, batch_size=batch_size, max_seq_len=max_seq_len)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._broken[key] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                raise
            self._engine = (key, built)
        return self._engine[1]

    def free(self) -> None:
        """Drop the engine."""
        self._engine = None
        release()


def cuda_clock(step: Callable[[], Any], count: int) -> float:
    """Events around ``count`` steps that the device runs back to back."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def wall_clock(step: Callable[[], Any], count: int) -> float:
    start = perf_counter()
    for _ in range(count):
        step()
    return (perf_counter() - start) / count


def num_steps(context: int) -> int:
    """Timed steps up to a context: 64, a whole turn of the residual, where that is a small part of it."""
    return max(4, min(64, context // 8))


def measure_steps(engine: Any, clock: Clock, context: int, repeats: int, vocab_size: int) -> Row:
    """Seconds a step of the last ``num_steps(context)`` tokens before ``context``, flushes included.

    ``[median, min, max]`` of ``repeats`` fillings with random keys and values.
    """
    steps = num_steps(context)
    runs = []
    for repeat in range(repeats):
        engine.fill(context - steps - WARM, seed=repeat)
        engine.tokens.random_(0, vocab_size)
        for _ in range(WARM):
            engine.step()
        runs.append(clock(engine.step, steps))
    said = {"layers": engine.layers, **of_kernel(engine.cache)}
    return {"steps": steps, "nbytes": engine.nbytes, **said, **figures(runs, engine.batch_size)}


def figures(runs: Sequence[float], batch_size: int) -> Row:
    """Seconds a step and tokens a second of all rows, each ``[median, min, max]``."""
    from statistics import median

    seconds = [median(runs), min(runs), max(runs)]
    speed = [batch_size / seconds[0], batch_size / seconds[2], batch_size / seconds[1]]
    return {"seconds_per_step": seconds, "tokens_per_second": speed, "runs": list(runs)}


def measure_prefill(
    engines: Sequence[Any], clock: Clock, context: int, repeats: int, vocab_size: int, seed: int
) -> Row:
    """Seconds until the first token of a random prompt of ``context`` tokens is known: ``[median, min, max]``.

    ``engines``: the one measured and, where it is another, the uncompressed one (``base_seconds``).  They take turns:
    a short prompt is the host's work, and a host is now faster, now slower.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (engines[0].batch_size, context), generator=generator)
    runs: list[list[float]] = [[] for _ in engines]
    for turn in range(1 + repeats):
        for engine, own in zip(engines, runs, strict=True):
            seconds = clock(lambda engine=engine: engine.prefill(ids), 1)  # type: ignore[misc]
            if turn:
                own.append(seconds)
    names = ("seconds", "base_seconds")
    return {name: figures(own, 1)["seconds_per_step"] for name, own in zip(names, runs, strict=False)}


def measure_largest(models: Models, subject: Subject, method: Method, clock: Clock, num_tokens: int, free: int) -> Row:
    """The largest batch of ``num_tokens`` tokens: kvsim's answer for ``free`` bytes, then that batch for real.

    ``predicted_batch``: what fits beside ``RESERVE``.  Measured is the largest that also leaves room for the random
    keys and values of filling it; where memory ends before, a few less.
    """
    import torch

    from kvruntime.engine.loop import FILL_TOKENS
    from kvsim.memory.capacity import max_batch
    from kvsim.models.model import Model

    shape = Model.from_config(models.config(subject))
    predicted = max_batch(shape, method, num_tokens, free - RESERVE) or 0
    layer = shape.cache_layers[0]
    filling = 4 * FILL_TOKENS * layer.num_kv_heads * (layer.key_dim + layer.value_dim)  # two pieces, of 2 bytes each
    fits = max_batch(shape, method, num_tokens, free - RESERVE - predicted * filling) or 0
    row: Row = {"predicted_batch": predicted, "free_nbytes": free, "tried": []}
    for share in (1.0, 0.95, 0.9):
        batch_size = max(1, int(fits * share))
        try:
            engine = models.engine(subject, method, batch_size, num_tokens)
            row |= measure_steps(engine, clock, num_tokens, 1, shape.vocab_size or 2)
            return row | {"batch_size": batch_size}
        except torch.OutOfMemoryError:
            row["tried"].append(batch_size)
        models.free()  # after the error's own hold on the tensors has ended
    raise ValueError(f"predicted {predicted}, and out of memory with {row['tried']}")


def key_of(kind: str, models: Models, subject: Subject, method: str, package: str = "kvruntime", **rest: Any) -> Row:
    about = {"kind": kind, "model": subject.model, "weights": models.weights, "dtype": subject.dtype}
    about["model_sha256"] = shape_sha256(models.config(subject))
    return about | {"method": method, "package": package, "seed": models.seed, **rest}


def subject_tasks(
    models: Models, subject: Subject, methods: Sequence[Method], clock: Clock, repeats: int, free: Callable[[], int]
) -> list[Task]:
    """Steps at every context, batch by batch and method by method, and prefill; then the largest batch.

    ``free()``: bytes of device memory that nothing holds.
    """

    def steps(method: Method, batch_size: int, longest: int, context: int) -> Row:
        engine = models.engine(subject, method, batch_size, longest)
        return measure_steps(engine, clock, context, repeats, models.loaded(subject).vocab_size)

    def prefill(method: Method, longest: int, prompt: int) -> Row:
        engines = [models.engine(subject, method, 1, longest)]
        if method != methods[0]:
            engines.append(models.engine(subject, methods[0], 1, longest))
        turns = repeats * TURNS if prompt <= SHORT_PROMPT else repeats
        return measure_prefill(engines, clock, prompt, turns, models.loaded(subject).vocab_size, models.seed)

    def largest(method: Method) -> Row:
        models.engine(subject, methods[0], 1, SMALLEST)  # what a decoder keeps beside the model is not free
        release()
        there = free()
        models.free()
        return measure_largest(models, subject, method, clock, LARGEST_AT, there)

    out: list[Task] = []
    for batch_size, contexts in subject.contexts.items():
        prompts = subject.prompts if batch_size == 1 else ()
        longest = max(*contexts, *prompts, 1)
        for method in methods:
            for context in contexts:
                of: Row = {"batch_size": batch_size, "max_seq_len": longest, "repeats": repeats}
                key = key_of("step", models, subject, method.name, num_tokens=context, **of)
                work = partial(steps, method, batch_size, longest, context)
                out.append(task(key, work, cost=batch_size * context / 8192 + 4))
            for prompt in prompts:
                of = {"batch_size": 1, "max_seq_len": longest, "repeats": repeats}
                key = key_of("prefill", models, subject, method.name, num_tokens=prompt, **of)
                out.append(task(key, partial(prefill, method, longest, prompt), cost=4))
    for method in (methods[0], *methods[1:][-2:]) if subject.largest else ():
        key = key_of("largest", models, subject, method.name, num_tokens=LARGEST_AT)
        out.append(task(key, partial(largest, method), cost=60))
    return out


def peer_tasks(models: Models, subject: Subject) -> tuple[list[Task], list[Row]]:
    """Other libraries' caches under transformers' own forward, and rows for those that are not installed."""
    from kvruntime.bench.model.peers import find_peers, package_version

    def measure(contender: Contender, batch_size: int, context: int, decoded: int) -> Row:
        from kvruntime.bench.model.speed import measure_speed

        models.free()
        run = partial(measure_speed, models.loaded(subject), contender, batch_size)
        found = run(prompt_tokens=context - decoded, decode_tokens=decoded, warmup=1, repeats=2, seed=models.seed)
        said = {name: found[name] for name in ("kernel",) if name in found}
        return {
            "steps": decoded,
            **figures([seconds / decoded for seconds in found["decode_runs"]], batch_size),
            **said,
        }

    there, missing = find_peers()
    out = []
    for batch_size, context, decoded in subject.peers:
        for contender in there:
            size = {"batch_size": batch_size, "num_tokens": context}
            of = {"package_version": package_version(contender.package)}
            key = key_of("step", models, subject, contender.name, contender.package, **size, **of)
            out.append(task(key, partial(measure, contender, batch_size, context, decoded), cost=30))
    return out, [dict(row) for row in missing]


def chosen(specs: Sequence[str], dtype: str) -> tuple[Method, ...]:
    """The uncompressed engine first, then the methods named, exact tokens in ``dtype``."""
    from kvruntime.specs import chosen_methods

    if not specs:
        return methods_of(dtype)
    named: Iterable[Any] = chosen_methods(specs, None, {}, baseline=False)
    return tuple(dict.fromkeys((Full(dtype), *(with_dtype(method, dtype) for method in named))))


def engine(**given: Any) -> int:
    """``kvruntime bench engine``; its exit code.

    Raises ``ValueError`` on a machine without CUDA or for a bad option, ``LookupError`` for an unknown model.
    """
    from kvruntime.bench.engine.report import line, tables
    from kvruntime.checkpoints.load import pick_device

    names = given["models"] or DEFAULT
    for name in names:
        if name not in SUBJECTS:
            raise LookupError(f"unknown model {name!r}: allowed are {', '.join(SUBJECTS)}")
    subjects = [SUBJECTS[name] for name in dict.fromkeys(names)]
    if given["quick"]:
        subjects = [replace(one, contexts=QUICK[one.model], prompts=(), largest=False) for one in subjects]
    if given["sizes"]:
        subjects = [replace(one, contexts=contexts_of(given["sizes"]), prompts=(), largest=False) for one in subjects]
    if not 1 <= given["repeats"] <= MOST:
        raise ValueError(f"repeats {given['repeats']}: allowed are 1 to {MOST:,}")
    methods = {one.model: chosen(given["specs"], one.dtype) for one in subjects}
    out = given["out"] or Path("kvruntime-engine.json")
    check_writable(out)
    device = pick_device(given["device"])
    if not device.startswith("cuda"):
        raise ValueError(f"bench engine times CUDA graphs: it needs a CUDA device, not {device}")
    import torch

    torch.cuda.set_device(device)
    header = describe(device, ["kvruntime", *sys.argv[1:]]) | {"seed": given["seed"]}
    results = Results(out, header, resume=given["resume"], anew=given["anew"])
    results.rows = [row for row in results.rows if row["kind"] != "missing"]
    models = Models(device, given["seed"])
    tasks: list[Task] = []
    for one in subjects:
        tasks += subject_tasks(models, one, methods[one.model], cuda_clock, given["repeats"], free_memory)
    if given["peers"]:
        for one in subjects:
            found, missing = peer_tasks(models, one)
            tasks += found
            results.rows += [row for row in missing if row not in results.rows]
    if given["compile_ahead"]:
        ahead(subjects, methods, device)
    return carry_out(tasks, results, line, tables)


def contexts_of(specs: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """``("1x2k", "8x32k", "1x4k")`` as contexts by batch size.  Raises ``ValueError`` for another spelling."""
    out: dict[int, tuple[int, ...]] = {}
    for batch_size, tokens in map(size_of, specs):
        out[batch_size] = tuple(sorted({*out.get(batch_size, ()), tokens}))
    return out


def size_of(spec: str) -> tuple[int, int]:
    """``8x32k`` as batch size and tokens.  Raises ``ValueError`` for another spelling."""
    batch, found, tokens = spec.partition("x")
    if not found or not batch.isdecimal() or not 1 <= int(batch) <= MOST:
        raise ValueError(f"size {spec!r}: expected BATCHxTOKENS, such as 8x32k")
    return int(batch), parse_size(tokens, "size")


def free_memory() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


def ahead(subjects: Sequence[Subject], methods: dict[str, tuple[Method, ...]], device: str) -> None:
    """The attention and storing kernels of every engine, compiled in several processes."""
    from kvruntime.bench.kernels.attention import Shape
    from kvruntime.bench.kernels.precompile import Case, compile_ahead
    from kvruntime.methods import room_of
    from kvsim.models.load import load_model

    cases = []
    for one in subjects:
        model = load_model(one.model)
        layer = model.cache_layers[0]
        for batch_size, contexts in one.contexts.items():
            heads = (model.num_q_heads, layer.num_kv_heads, layer.key_dim)
            shape = Shape(one.model, *heads, batch_size, max((*contexts, *one.prompts)))
            cases += [Case(shape, method, steps=True) for method in methods[one.model] if room_of(method).benched]
    compile_ahead(cases, device, say)
