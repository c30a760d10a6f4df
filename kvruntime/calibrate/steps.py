"""Whole decode steps of two small shapes under every runtime that is calibrated: what its constants are fitted to.

The shapes are Llama's with few layers.  One has layers of 436 MB, whose weights and cache are streams; the other's are
so narrow that what a layer costs besides shows.  Weights and cache are random: neither changes how long a step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch

from kvruntime.bench.engine.suite import (
    RESERVE,
    cuda_clock,
    measure_steps,
    methods_of,
    wall_clock,
)
from kvruntime.bench.generate import suite as generate
from kvruntime.bench.harness.session import release
from kvruntime.checkpoints.load import Source, load
from kvruntime.engine import Engine
from kvsim.latency.profile import PARTS
from kvsim.layout import Method
from kvsim.memory.estimate import cache_nbytes
from kvsim.methods import Full
from kvsim.models.model import Model

ENGINE, GENERATE, COMPILED = "kvruntime", "kvruntime:generate", "kvruntime:compiled"
STOCK, NEW = "transformers", "transformers:new"
"""The runtimes, by the names of their constants of time."""
K = 1024


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    layers: int
    vocab: int

    def config(self, positions: int) -> dict[str, Any]:
        """The config.json of such a model."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "max_position_embeddings": positions,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }


Size = tuple[int, int]
"""Batch size, and the context up to which steps are timed."""


@dataclass(frozen=True)
class Subject:
    """A shape, and the sizes that are timed of it: uncompressed, packed, and under ``generate()``."""

    shape: Shape
    plain: tuple[Size, ...]
    packed: tuple[Size, ...]
    generated: tuple[Size, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of device: ``positions`` of the models, in which type, how often; ``layouts``: how
    many of the packed ones (None: all that the methods' rooms name)."""

    dtype: str
    positions: int
    subjects: dict[str, Subject]
    repeats: int = 3
    tokens: tuple[int, int] = (generate.SHORT, 40)
    """New tokens of ``generate()`` between which steps are timed."""
    layouts: int | None = None

    @property
    def packed(self) -> tuple[Method, ...]:
        """The layouts that are timed beside the uncompressed cache."""
        return methods_of(self.dtype)[1:][: self.layouts]


CUDA = Plan(
    "bfloat16",
    64 * K,
    {
        "wide": Subject(
            Shape(4096, 14336, 32, 8, 8, 32 * K),
            ((1, K), (1, 12 * K), (1, 48 * K), (4, 3 * K), (16, 4 * K), (64, K)),
            ((1, K), (1, 12 * K), (1, 48 * K), (16, 8 * K)),
            ((1, 512), (16, K)),
        ),
        "narrow": Subject(
            Shape(1024, 4096, 16, 4, 16, 32 * K),
            ((1, K), (1, 12 * K), (16, 2 * K), (64, K)),
            ((1, 4 * K), (16, 4 * K)),
            ((1, 512), (16, K)),
        ),
    },
)
CPU = Plan(
    "float32",
    256,
    {
        "wide": Subject(Shape(256, 512, 4, 2, 2, K), ((1, 64), (2, 64)), ((1, 64),), ((1, 64),)),
        "narrow": Subject(Shape(64, 128, 2, 1, 3, 256), ((1, 64),), ((1, 64),), ((1, 64),)),
    },
    repeats=1,
    tokens=(3, 11),
    layouts=1,
)
"""On a CPU the reference runs, some steps of it: enough to say what it is."""


class Step(NamedTuple):
    """``seconds``, the median, of a step of ``batch_size`` rows up to ``num_tokens`` tokens under ``runtime``."""

    runtime: str
    shape: str
    model: Model
    method: Method
    batch_size: int
    num_tokens: int
    seconds: float
    low: float
    high: float

    @property
    def row(self) -> dict[str, Any]:
        """As a profile records it."""
        return {
            "shape": self.shape,
            "method": self.method.name,
            "batch_size": self.batch_size,
            "num_tokens": self.num_tokens,
            "value": self.seconds,
            "low": self.low,
            "high": self.high,
        }


def steps(
    plan: Plan, device: torch.device, say: Callable[[str], None], wanted: Collection[str] = PARTS
) -> Iterator[Step | tuple[str, str]]:
    """Every step of the plan under the runtimes ``wanted``, or ``(runtime, reason)`` for what was not measured; one
    model lies on the device at a time, and nothing after the last."""
    for name, subject in plan.subjects.items():
        config = subject.shape.config(plan.positions)
        model = Model.from_config(config)
        weights = 2 * sum(getattr(model.weights, part) for part in ("dense", "head", "embedding"))
        if (there := free(device)) < weights + RESERVE:
            for runtime in wanted:
                yield runtime, f"{name}: {there >> 20:,} MiB are free, its weights take {weights >> 20:,}"
            continue
        source = Source(f"calibration-{name}", "random (seed 0)", config=config)
        loaded = load(source, str(device), plan.dtype, say)
        try:
            if ENGINE in wanted:
                yield from of_engine(plan, name, subject, model, loaded.model, device)
            yield from of_generate(plan, name, subject, model, loaded.model, device, wanted)
        finally:
            del loaded
            if device.type == "cuda":
                torch.compiler.reset()  # what was compiled holds the weights
            release()


def of_engine(
    plan: Plan, name: str, subject: Subject, model: Model, loaded: Any, device: torch.device
) -> Iterator[Step | tuple[str, str]]:
    """Steps of :class:`kvruntime.engine.Engine`, flushes included."""
    clock = cuda_clock if device.type == "cuda" else wall_clock
    plain = Full(plan.dtype)
    for method in (plain, *plan.packed):
        sizes = subject.plain if method == plain else subject.packed
        for batch_size in dict.fromkeys(batch for batch, _ in sizes):
            contexts = [context for batch, context in sizes if batch == batch_size]
            needed = 2 * cache_nbytes(model, method, batch_size, max(contexts)) + RESERVE // 2
            if (there := free(device)) < needed:
                yield ENGINE, f"{name}, {method.name}, batch {batch_size}: {there >> 20:,} MiB free of {needed >> 20:,}"
                continue
            engine = Engine(loaded, method, batch_size=batch_size, max_seq_len=max(contexts))
            for context in contexts:
                found = measure_steps(engine, clock, context, plan.repeats, subject.shape.vocab)["seconds_per_step"]
                yield Step(ENGINE, name, model, method, batch_size, context, *found)
            del engine
            release()


def of_generate(
    plan: Plan, name: str, subject: Subject, model: Model, loaded: Any, device: torch.device, wanted: Collection[str]
) -> Iterator[Step | tuple[str, str]]:
    """Steps of stock ``generate()``: with a packed cache as it comes, with transformers' own, and with the packed one
    compiled.  A second call of transformers' own has only lengths that the first has had."""
    cuda, packed = device.type == "cuda", plan.packed[-1]
    dynamic, _, ours, *compiled = generate.contenders((packed,), compiled=cuda, peers=False)
    found = [(GENERATE, ours, packed), (STOCK, dynamic, Full(plan.dtype))]
    found += [(COMPILED, each, packed) for each in compiled]
    found = [each for each in found if each[0] in wanted]
    for runtime, contender, method in found:
        try:
            for size in subject.generated:
                yield from _calls(plan, name, model, loaded, runtime, contender, method, size, device)
        except Exception as error:
            if runtime != COMPILED:
                raise
            said = (str(error).strip().splitlines() or [""])[0]
            yield COMPILED, f"{name}: {type(error).__name__}: {said}"  # it needs compilers that not every machine has
        release()
    if not compiled and COMPILED in wanted:
        yield COMPILED, f"{name}: generate() compiles on CUDA alone, not on {device.type}"


def _calls(
    plan: Plan,
    name: str,
    model: Model,
    loaded: Any,
    runtime: str,
    contender: generate.Contender,
    method: Method,
    size: Size,
    device: torch.device,
) -> Iterator[Step]:
    """The steps of one size: the median of calls, the first of transformers' own apart.  Of a call it is the mean, in
    which packing is; of transformers' own the median step, which a pause of the host does not move."""
    clock, (batch_size, context), (short, long) = generate.Clock(str(device)), size, plan.tokens
    ids = generate.prompt(loaded, batch_size, context - long, 0)
    about = name, model, method, batch_size, context - long + (long + short) // 2
    taken = []
    for turn in range(1 + plan.repeats):
        with contender.around(loaded):
            # the first compiles and captures; of transformers' own it has only new lengths
            new = long if turn or runtime == STOCK else short
            times, _ = clock(loaded, ids, new, contender.cache(loaded, context))
        each = sorted(after - before for before, after in pairwise(times[short - 1 :]))
        if turn:
            taken.append(median(each) if runtime == STOCK else sum(each) / len(each))
        elif runtime == STOCK:
            yield Step(NEW, *about, median(each), each[0], each[-1])
    yield Step(runtime, *about, median(taken), min(taken), max(taken))


def free(device: torch.device) -> int:
    """Bytes of the device that nothing holds; of a CPU's memory as much as is never asked for here."""
    if device.type != "cuda":
        return 1 << 50
    release()
    return torch.cuda.mem_get_info(device)[0]
