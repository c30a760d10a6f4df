"""``kvruntime bench generate``: stock ``model.generate()``, greedy, with transformers' own caches and with ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kvruntime.bench.engine.suite import Models, chosen, key_of, size_of
from kvruntime.bench.engine.suite import Subject as Shape
from kvruntime.bench.generate.report import FIRST_CALL, STOCK, line, tables
from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.session import carry_out, task
from kvruntime.bench.harness.tables import of_kernel
from kvsim.engines.kvruntime import MOST
from kvsim.layout import Method

if TYPE_CHECKING:
    from pathlib import Path

    from kvruntime.bench.harness.tasks import Task

SHORT, LONG = FIRST_CALL, 72
"""The new tokens between which steps are timed."""
TURNS, TURN = 10, 32
"""Turns of a conversation, and tokens of each: as many are said as are answered."""
K = 1024


@dataclass(frozen=True)
class Subject:
    """A model's shape with random weights, and the ``(batch size, prompt tokens)`` that are timed."""

    model: str
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    conversation: int | None = None
    """Tokens of the prompt that a conversation begins with."""

    @property
    def shape(self) -> Shape:
        return Shape(self.model, self.dtype, {}, positions=max(length for _, length in self.sizes) + 8 * K)


SUBJECTS = {
    "llama-3.2-1b": Subject(
        "llama-3.2-1b", "bfloat16", ((1, 4 * K), (8, 16 * K), (1, 512), (8, 512), (64, 512)), 2 * K
    ),
    "llama-3-8b": Subject("llama-3-8b", "bfloat16", ((1, 32 * K), (8, 16 * K), (64, 512)), conversation=8 * K),
    "gpt2": Subject("gpt2", "float16", ((1, 512), (8, 512), (64, 512))),
    "gemma-3-4b-it": Subject("gemma-3-4b-it", "bfloat16", ((1, 16 * K), (8, 8 * K))),
    "smollm2-135m": Subject("smollm2-135m", "bfloat16", ((1, 512), (8, 4 * K), (64, 512))),
    "gpt2-large": Subject("gpt2-large", "float16", ((1, 512), (16, 512))),
    "qwen3-0.6b": Subject("qwen3-0.6b", "bfloat16", ((1, 1 * K), (16, 2 * K))),
    "llama-2-7b": Subject("llama-2-7b", "bfloat16", ((1, 2 * K), (8, 2 * K))),
    "qwen3.5-27b": Subject("qwen3.5-27b", "bfloat16", ((1, 1 * K), (8, 1 * K))),
}
DEFAULT = ("llama-3.2-1b", "llama-3-8b")


@dataclass(frozen=True)
class Contender:
    """``cache(model, num_tokens)``: an empty one with room for so many tokens a row.  ``goes_on``: for many turns."""

    name: str
    cache: Callable[[Any, int], Any]
    package: str = "kvruntime"
    runs: str = ""
    """How its steps run, where there are several ways."""
    goes_on: bool = True


def contenders(methods: Sequence[Method], compiled: bool, peers: bool) -> list[Contender]:
    """Transformers' own caches, then each method as it comes and, where asked for, compiled; then other libraries'."""
    from kvruntime.bench.model.peers import find_peers

    out = [
        Contender(STOCK[0], _dynamic, "transformers"),
        Contender(STOCK[1], Static(), "transformers", "compiled", False),
    ]
    for method in methods:
        out.append(Contender(method.name, partial(_ours, method, None)))
        if compiled:
            out.append(Contender(method.name, partial(_ours, method, True), runs="compiled", goes_on=False))
    for one in find_peers()[0] if peers else ():
        if one.name not in STOCK:
            out.append(Contender(one.name, one.build, one.package, goes_on=False))
    return out


def _dynamic(model: Any, num_tokens: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def kind_of(one: Contender) -> str:
    """``dynamic`` or ``static``, transformers' own, or ``ours``, whoever else's."""
    return {STOCK[0]: "dynamic", STOCK[1]: "static"}.get(one.name, "ours")


class Static:
    """transformers' static cache: one object, emptied, because ``generate()`` compiles anew for another."""

    def __init__(self) -> None:
        self.held: Any = None
        self.of: tuple[int, int] = (0, 0)

    def __call__(self, model: Any, num_tokens: int) -> Any:
        from transformers import StaticCache

        if self.of != (id(model), num_tokens):
            self.held, self.of = None, (id(model), num_tokens)
            self.held = StaticCache(config=model.config, max_cache_len=num_tokens)
        self.held.reset()
        return self.held

    def free(self) -> None:
        """Before another size: what was compiled for this one holds its tensors."""
        import torch

        self.held, self.of = None, (0, 0)
        torch.compiler.reset()


def _ours(method: Method, compiled: bool | None, model: Any, num_tokens: int) -> Any:
    from kvruntime import make_cache

    return make_cache(model, method, compiled=compiled, max_seq_len=num_tokens if compiled else None)


class Times:
    """transformers' streamer protocol: when each token came."""

    def __init__(self) -> None:
        self.at: list[float] = []
        """The prompt, then every new token."""

    def put(self, tokens: Any) -> None:
        self.at.append(perf_counter())

    def end(self) -> None:
        """Nothing is left to be told."""


class Clock:
    """Runs ``generate()`` and tells when tokens came; ``device``: one that is to be waited for, if it is a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()

    def __call__(self, model: Any, ids: Any, num_new: int, cache: Any) -> tuple[list[float], Any]:
        """Seconds after which each of exactly ``num_new`` greedy tokens after ``ids`` was there, and all tokens."""
        import torch

        from kvruntime.hf.cache import argument

        model.generation_config.eos_token_id = None
        self.wait()
        start, times = perf_counter(), Times()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            streamer=times,
            **argument(cache),
        )
        self.wait()
        return [at - start for at in times.at[1:]], out


def prompt(model: Any, batch_size: int, num_tokens: int, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(1, vocab, (batch_size, num_tokens), generator=generator).to(model.device)


def measure(clock: Clock, model: Any, one: Contender, size: tuple[int, int], repeats: int, seed: int) -> Row:
    """Of one cache at one size: the first call, the time to the first token, a step, and memory.

    ``first_call_seconds``: ``SHORT`` tokens in a process that has not run this cache at this size, so compiling and
    capturing are in it.  ``seconds_per_step``: from the token ``SHORT`` to the token ``LONG`` of one call, ``[median,
    min, max]`` of the calls; ``calls``: each of them, the first of which has lengths that are new to the process.
    ``peak_nbytes``: what PyTorch's allocator held at the most, the weights included.
    """
    import torch

    kernel: Row = {}

    def run(num_new: int) -> list[float]:
        cache = one.cache(model, size[1] + LONG)
        times = clock(model, ids, num_new, cache)[0]
        kernel.update(of_kernel(cache))
        return times

    ids = prompt(model, *size, seed)
    first = run(SHORT)[-1]
    starts, steps = [], []
    cuda = clock.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        times = run(LONG)
        starts.append(times[0])
        steps.append((times[LONG - 1] - times[SHORT - 1]) / (LONG - SHORT))
    getattr(one.cache, "free", int)()
    row: Row = {
        "first_call_seconds": first,
        "first_token_seconds": [median(starts), min(starts), max(starts)],
        "seconds_per_step": [median(steps), min(steps), max(steps)],
        "calls": list(steps),
        "tokens_per_second": size[0] / median(steps),
        **kernel,
    }
    if cuda:
        row["peak_nbytes"] = torch.cuda.max_memory_allocated()
    return row


def measure_conversation(clock: Clock, model: Any, one: Contender, num_tokens: int, seed: int) -> Row:
    """Seconds of ``TURNS`` turns on one cache, the prompt's first one included, after a turn on another cache."""
    import torch

    seconds = []
    for turns in (1, TURNS):
        ids, cache, total = prompt(model, 1, num_tokens, seed), one.cache(model, 0), 0.0
        for turn in range(turns):
            taken, out = clock(model, ids, TURN, cache)
            total += taken[-1]
            ids = torch.cat([out, prompt(model, 1, TURN, seed + turn)], 1)
        seconds.append(total)
    return {"seconds": seconds[1], "turns": TURNS, "tokens_a_turn": TURN}


def subject_tasks(
    models: Models, subject: Subject, parts: Sequence[Contender], clock: Clock, repeats: int
) -> list[Task]:
    """Every size with every contender, size by size; then the conversation."""

    def at(one: Contender, size: tuple[int, int]) -> Row:
        return measure(clock, models.loaded(subject.shape).model, one, size, repeats, models.seed)

    def talk(one: Contender, num_tokens: int) -> Row:
        return measure_conversation(clock, models.loaded(subject.shape).model, one, num_tokens, models.seed)

    out = []
    for size in subject.sizes:
        for one in parts:
            of = {"runs": one.runs, "batch_size": size[0], "num_tokens": size[1], "repeats": repeats}
            key = key_of("generate", models, subject.shape, one.name, one.package, **of)
            out.append(task(key, partial(at, one, size), cost=size[0] * size[1] / 4096 + 4 + 40 * bool(one.runs)))
    if subject.conversation:
        for one in parts:
            if one.goes_on:
                of = {"runs": one.runs, "batch_size": 1, "num_tokens": subject.conversation}
                key = key_of("conversation", models, subject.shape, one.name, one.package, **of)
                out.append(task(key, partial(talk, one, subject.conversation), cost=20))
    return out


def generate(**given: Any) -> int:
    """``kvruntime bench generate``; its exit code.

    Raises ``ValueError`` on a machine without CUDA or for a bad option, ``LookupError`` for an unknown model.
    """
    from pathlib import Path

    from kvruntime.checkpoints.load import pick_device

    names = given["models"] or DEFAULT
    for name in names:
        if name not in SUBJECTS:
            raise LookupError(f"unknown model {name!r}: allowed are {', '.join(SUBJECTS)}")
    if not 1 <= given["repeats"] <= MOST:
        raise ValueError(f"repeats {given['repeats']}: allowed are 1 to {MOST:,}")
    device = pick_device(given["device"])
    if not device.startswith("cuda"):
        raise ValueError(f"bench generate times CUDA graphs: it needs a CUDA device, not {device}")
    import torch

    torch.cuda.set_device(device)
    out: Path = given["out"] or Path("kvruntime-generate.json")
    header = describe(device, ["kvruntime", *sys.argv[1:]]) | {"seed": given["seed"]}
    results = Results(out, header, resume=given["resume"], anew=given["anew"])
    models, clock = Models(device, given["seed"]), Clock(device)
    tasks: list[Task] = []
    for name in dict.fromkeys(names):
        subject = SUBJECTS[name]
        if given["quick"]:
            subject = replace(subject, sizes=subject.sizes[:2], conversation=None)
        if given["sizes"]:
            subject = replace(subject, sizes=tuple(map(size_of, given["sizes"])), conversation=None)
        methods = chosen(given["specs"], subject.dtype)
        methods = methods[1:] if given["specs"] else methods[-2:]
        found = contenders(methods, given["compiled"], given["peers"])
        parts = [one for one in found if not given["caches"] or kind_of(one) in given["caches"]]
        tasks += subject_tasks(models, subject, parts, clock, given["repeats"])
    return carry_out(tasks, results, line, tables)
