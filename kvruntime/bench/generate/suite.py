"""``kvruntime bench generate``: stock ``model.generate()``, greedy, with transformers' own caches and with ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvruntime.bench.engine.suite import Models, chosen, key_of, size_of
from kvruntime.bench.engine.suite import Subject as Shape
from kvruntime.bench.generate.calls import CONVERSATION, DRAFTED, GREEDY, UNDRAFTED, Clock, prompt
from kvruntime.bench.generate.report import STOCK, line, tables
from kvruntime.bench.generate.rounds import LONG, SHORT, Entrant, Group, Turns
from kvruntime.bench.harness.results import Results, Row, describe
from kvruntime.bench.harness.session import carry_out, task
from kvruntime.bench.harness.store import check_writable
from kvsim.engines.kvruntime import MOST
from kvsim.layout import Method

if TYPE_CHECKING:
    from pathlib import Path

    from kvruntime.bench.harness.tasks import Task
    from kvruntime.checkpoints.load import LoadedModel

__all__ = ["LONG", "SHORT", "Clock", "Subject", "contenders", "generate", "prompt"]

TURNS, TURN = 10, 32
"""Turns of a conversation, and tokens of each: as many are said as are answered."""
K = 1024
MOST_NEW = 4 * K
"""New tokens of a timed call, for which models have positions besides a prompt's."""


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
    "gemma-3-1b-it": Subject("gemma-3-1b-it", "bfloat16", ((1, 4 * K), (8, 4 * K))),
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
    """``cache(model, num_tokens)``: an empty one with room for so many tokens a row.  ``goes_on``: for many turns.

    ``around(model)`` holds while it is used.
    """

    name: str
    cache: Callable[[Any, int], Any]
    package: str = "kvruntime"
    runs: str = ""
    """How its steps run, where there are several ways."""
    goes_on: bool = True
    around: Callable[[Any], AbstractContextManager[None]] = lambda model: nullcontext()

    @property
    def is_guest(self) -> bool:
        """Whether it is another library's."""
        return self.package not in ("kvruntime", "transformers")


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Afterwards the model is what it was before ``make_cache``: what was compiled of it serves again."""
    from kvruntime import restore

    try:
        yield
    finally:
        restore(model)


def contenders(methods: Sequence[Method], compiled: bool, peers: bool, plain: bool = False) -> list[Contender]:
    """Transformers' own caches, then each method as it comes and, where asked for, compiled or with steps that the
    host plans; then transformers' caches with other libraries' quantization."""
    from kvruntime.bench.model.peers import find_peers

    out = [
        Contender(STOCK[0], _dynamic, "transformers"),
        Contender(STOCK[1], Static(), "transformers", "compiled", False),
    ]
    for method in methods:
        out.append(Contender(method.name, partial(_ours, method, None), around=restored))
        if compiled:
            out.append(Contender(method.name, CompiledCache(method), runs="compiled", goes_on=False, around=restored))
        if plain:
            cache = partial(_ours, method, False)
            out.append(Contender(method.name, cache, runs="plain", goes_on=False, around=restored))
    for one in find_peers()[0] if peers else ():
        if one.name not in STOCK:
            out.append(Contender(one.name, one.build, one.package, goes_on=False))
    return out


def _dynamic(model: Any, num_tokens: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def kind_of(one: Contender) -> str:
    """``dynamic`` or ``static``, transformers' own; ``peers``, with other libraries' quantization; or ``ours``."""
    return "peers" if one.is_guest else {STOCK[0]: "dynamic", STOCK[1]: "static"}.get(one.name, "ours")


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


class CompiledCache:
    """A cache of ours under a compiled step.  torch.compile compiles one function so many times and then runs it
    eagerly without a word to its caller: before another size it begins anew."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, model: Any, num_tokens: int) -> Any:
        return _ours(self.method, True, model, num_tokens)

    def free(self) -> None:
        """Before another size."""
        import torch

        torch.compiler.reset()


def _ours(method: Method, compiled: bool | None, model: Any, num_tokens: int) -> Any:
    from kvruntime import make_cache

    return make_cache(model, method, compiled=compiled, max_seq_len=num_tokens if compiled else None)


def measure_conversation(
    clock: Clock,
    model: Any,
    one: Contender,
    num_tokens: int,
    seed: int,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Row:
    """Seconds of ``TURNS`` turns on one cache, the prompt's first one included, after a turn on another cache, in which
    kernels are compiled.  ``alone()`` holds while turns are timed.
    """
    import torch

    seconds: list[float] = []
    turn_seconds: list[float] = []
    for turns in (1, TURNS):
        with alone() if turns > 1 else nullcontext(), one.around(model):
            ids, cache, turn_seconds = prompt(model, 1, num_tokens, seed), one.cache(model, 0), []
            for turn in range(turns):
                taken, out = clock(model, ids, TURN, cache)
                turn_seconds.append(taken[-1])
                ids = torch.cat([out, prompt(model, 1, TURN, seed + turn)], 1)
        seconds.append(sum(turn_seconds))
    return {"seconds": seconds[1], "turns": TURNS, "tokens_a_turn": TURN, "turn_seconds": turn_seconds}


@dataclass(frozen=True)
class Schedule:
    """What is timed of every subject: kinds of calls, timed calls of each cache, with whom the device is shared, and
    new tokens of a call, where they are others than ``LONG``."""

    calls: Sequence[str] = (GREEDY,)
    repeats: int = 3
    turns: Turns | None = None
    num_new: int | None = None


def subject_tasks(
    models: Models, subject: Subject, parts: Sequence[Contender], clock: Clock, schedule: Schedule, results: Results
) -> list[Task]:
    """Every size with every contender, size by size, in turns; then the conversation.

    A row of a cache at a size:

    ``first_call_seconds``: ``SHORT`` tokens in a process that has not run this cache at this size, so compiling and
    capturing are in it; ``beside``: other processes ran first calls at the same time.  ``seconds_per_step``: from the
    token ``SHORT`` to the token ``LONG``, or ``new_tokens``, of one call, ``[median, min, max]`` of ``calls``, each of
    them; the first one of the dynamic cache has lengths that are new to the process, and ``new_length_seconds`` is its
    median step.
    ``middle_steps``: of each timed call the median step, which one pause of the host does not move; not of drafts.
    ``first_token_seconds``: of timed calls, likewise.
    ``peak_nbytes``: what PyTorch's allocator holds at the most with this cache alone, the weights included.
    ``calls_of_model``: the steps of a timed call, fewer than its tokens where they are drafted.  ``prompt``: what the
    tokens of a drafted call are, and of the undrafted one that is timed beside it.
    """
    from kvruntime.bench.model.peers import package_version

    turns = schedule.turns or Turns(None)
    keys: dict[int, Row] = {}

    def model() -> Any:
        return models.loaded(subject.shape).model

    def read() -> tuple[Any, Any]:
        loaded = models.loaded(subject.shape)
        return loaded.model, loaded.tokenizer

    beside = {"beside": True} if turns.file else {}

    def record(entrant: Entrant, row: Row) -> None:
        results.add(keys[id(entrant)], row | beside)

    def at(group: Group, entrant: Entrant) -> Row:
        return group.row(entrant) | beside

    def talk(one: Contender, num_tokens: int) -> Row:
        turns.together()  # no other process times while weights are loaded
        return measure_conversation(clock, model(), one, num_tokens, models.seed, turns.alone)

    out = []
    timed = [call for call in schedule.calls if call != CONVERSATION]
    if DRAFTED in timed:  # beside it the same without drafts
        timed.insert(timed.index(DRAFTED), UNDRAFTED)
    for size in subject.sizes if timed else ():
        group = Group(clock, read, turns, models.seed, record)
        for one in parts:
            for call in timed:
                if call in (DRAFTED, UNDRAFTED) and size[0] > 1:
                    continue  # transformers drafts for one row
                if call == DRAFTED and one.name == STOCK[1]:
                    continue  # a static cache's end comes within a draft
                entrant = Entrant(one, call, size, 1 if one.is_guest else schedule.repeats, schedule.num_new)
                of = {"runs": one.runs, "call": call, "batch_size": size[0], "num_tokens": size[1]}
                of |= {"repeats": entrant.repeats}
                if schedule.num_new is not None:
                    of["new_tokens"] = schedule.num_new
                if one.is_guest:
                    of["package_version"] = package_version(one.package)
                key = keys[id(entrant)] = key_of("generate", models, subject.shape, one.name, one.package, **of)
                if results.done(key):
                    continue
                group.entrants.append(entrant)
                work = partial(at, group, entrant)
                out.append(task(key, work, cost=size[0] * size[1] / 4096 + 4 + 40 * (one.runs == "compiled")))
    if subject.conversation and CONVERSATION in schedule.calls:
        for one in parts:
            if one.goes_on:
                of = {"runs": one.runs, "batch_size": 1, "num_tokens": subject.conversation}
                key = key_of("conversation", models, subject.shape, one.name, one.package, **of)
                out.append(task(key, partial(talk, one, subject.conversation), cost=20))
    return out


class PulledModels(Models):
    """A model that ``kvruntime pull`` fetched, with its real weights."""

    def __init__(self, device: str, seed: int, name: str) -> None:
        from kvruntime.checkpoints.load import resolve

        super().__init__(device, seed)
        self.source = resolve(name, offline=True)

    @property
    def weights(self) -> str:
        return self.source.weights

    def loaded(self, subject: Shape) -> LoadedModel:
        if self._loaded is None:
            from kvruntime.checkpoints.load import load

            self._loaded = (subject.model, load(self.source, self.device, subject.dtype))
        return self._loaded[1]


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
    if not SHORT < given["new_tokens"] <= MOST_NEW:
        raise ValueError(f"new tokens {given['new_tokens']}: allowed are {SHORT + 1} to {MOST_NEW:,}")
    sizes = tuple(map(size_of, given["sizes"]))
    methods = {name: chosen(given["specs"], SUBJECTS[name].dtype) for name in names}
    out: Path = given["out"] or Path("kvruntime-generate.json")
    check_writable(out)
    device = pick_device(given["device"])
    if not device.startswith("cuda"):
        raise ValueError(f"bench generate times CUDA graphs: it needs a CUDA device, not {device}")
    import torch

    torch.cuda.set_device(device)
    turns = Turns(given["lock"])
    header = describe(device, ["kvruntime", *sys.argv[1:]]) | {"seed": given["seed"]}
    results = Results(out, header, resume=given["resume"], anew=given["anew"])
    models, clock = Models(device, given["seed"]), Clock(device)
    num_new = None if given["new_tokens"] == LONG else given["new_tokens"]
    schedule = Schedule(given["calls"] or (GREEDY, CONVERSATION), given["repeats"], turns, num_new)
    tasks: list[Task] = []
    for name in dict.fromkeys(names):
        subject = SUBJECTS[name]
        if given["quick"]:
            subject = replace(subject, sizes=subject.sizes[:2], conversation=None)
        if sizes:
            talks = subject.conversation if CONVERSATION in given["calls"] else None
            subject = replace(subject, sizes=sizes, conversation=talks)
        ours = methods[name][1:] if given["specs"] else methods[name][-2:]
        found = contenders(ours, given["compiled"], given["peers"], given["plain"])
        parts = [one for one in found if not given["caches"] or kind_of(one) in given["caches"]]
        loads = PulledModels(device, given["seed"], name) if given["pulled"] else models
        tasks += subject_tasks(loads, subject, parts, clock, schedule, results)
    if given["peers"]:
        from kvruntime.bench.model.peers import find_peers

        results.rows += [dict(row) for row in find_peers()[1] if row not in results.rows]
    try:
        return carry_out(tasks, results, line, tables)
    finally:
        turns.close()
