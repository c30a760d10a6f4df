"""Tasks (needles, RULER's kinds, LAMBADA, GSM8K, LongBench) answered through each cache: a row a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.session import release
from kvruntime.bench.harness.tables import BASE
from kvruntime.bench.harness.tasks import Task, Tick
from kvruntime.bench.model.caches import Contender, stock
from kvruntime.bench.model.memory import layer_shapes
from kvruntime.bench.model.tasks import subject
from kvruntime.checkpoints.load import LoadedModel
from kvruntime.eval.answers import Answerer
from kvruntime.eval.bits import held_bits, packed_bits
from kvruntime.eval.tasks import TASKS, Example, Part, TaskRequest

KIND = "answers"
LENGTHS = (1024, 2048, 4096)
"""Lengths of prompts unless said otherwise: those that fit the model."""
ROOM = 128
"""Positions that are left for an answer where lengths are chosen for a model."""
KEPT = 200
"""Characters of an answer that a row keeps."""


def asked_of(loaded: LoadedModel, given: Mapping[str, Any], haystack: str, data: Path | None) -> TaskRequest:
    """What the options ask of every task.  Raises ``ValueError`` for lengths beyond the model's positions."""
    limit = loaded.max_positions
    lengths = tuple(given["length"]) or tuple(n for n in LENGTHS if limit is None or n + ROOM <= limit)
    tokenizer = loaded.tokenizer
    for length in lengths:
        if limit is not None and length >= limit:
            raise ValueError(f"length {length}: allowed are 1 to {limit - 1}, below the model's {limit} positions")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def cut(text: str, most: int) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= most:
            return text
        return str(tokenizer.decode(ids[: most // 2])) + str(tokenizer.decode(ids[len(ids) - (most - most // 2) :]))

    template = _template_tokens(tokenizer, count) if not given["plain"] else 0
    return TaskRequest(
        count=lambda text: count(text) + template,
        lengths=lengths or (max(1, (limit or 0) - ROOM),),
        haystack=haystack,
        depths=given["depths"],
        examples=given["examples"],
        data=data,
        longest=None if limit is None else limit - template,
        cut=cut,
        seed=given["seed"],
    )


def answer_tasks(
    loaded: LoadedModel, contenders: Sequence[Contender], name: str, asked: TaskRequest, batch: int, chat: bool
) -> list[Task]:
    """One a part and contender, all contenders of a part after one another."""
    chat = chat and bool(getattr(loaded.tokenizer, "chat_template", None))
    led: dict[str, list[list[int]]] = {}

    def task(part: Part, contender: Contender) -> Task:
        key = {"kind": KIND, **subject(loaded, contender, asked.seed), "task": name, "part": part.name, **part.about}
        key |= {"examples_sha256": part.sha256, "num_examples": len(part.examples), "batch_size": batch}
        key |= {"max_new_tokens": part.max_new_tokens, "chat": chat and part.chat}
        steps = -(-len(part.examples) // batch) * (part.max_new_tokens or 4)
        work = steps * 20 + sum(len(example.prompt) for example in part.examples) / 4
        measure = partial(measure_answers, loaded, contender, part, batch, chat and part.chat, led)
        return Task(
            key, measure, cost=work * (1 if contender.name in BASE else 2), guest=contender.package != "kvruntime"
        )

    return [task(part, contender) for part in TASKS[name].parts(asked) for contender in contenders]


def measure_answers(
    loaded: LoadedModel,
    contender: Contender,
    part: Part,
    batch: int,
    chat: bool,
    led: dict[str, list[list[int]]],
    tick: Tick,
) -> Row:
    """The row's figures: ``score`` (mean of ``scores``), what was answered, tokens of a prompt, bits, seconds.

    ``led``: what transformers' own uncompressed cache answered to a part, by its digest, filled as it is asked for.
    """
    start = perf_counter()
    longest = 0
    if part.follows and part.sha256 not in led:
        led[part.sha256] = _lead(loaded, part, batch, chat)

    def build(num_tokens: int) -> Any:
        nonlocal longest
        longest = max(longest, num_tokens)
        return contender.build(loaded.model, num_tokens)

    with contender.around(loaded.model):
        who = Answerer(loaded.model, loaded.tokenizer, build, batch)
        if part.follows:
            row = _followed(who, part, led[part.sha256], chat, tick)
        else:
            row = _continued(who, part, tick) if part.continues else _generated(who, part, chat, tick)
    release()
    if contender.method is not None:
        shapes = layer_shapes(loaded.model)
        row |= {
            "bits": packed_bits(contender.method, shapes),
            "held_bits": held_bits(contender.method, shapes, longest),
        }
    return {"score": sum(row["scores"]) / len(row["scores"]), **row, "seconds": perf_counter() - start}


def _generated(who: Answerer, part: Part, chat: bool, tick: Tick) -> Row:
    prompts = [who.encode(example.prompt, chat) for example in part.examples]
    answers = who.generate(prompts, part.max_new_tokens, part.stop, tick)
    scores = [part.score(answer, example) for answer, example in zip(answers, part.examples, strict=True)]
    return {"scores": scores, "prompt_tokens": _mean(prompts), "answers": [answer[:KEPT] for answer in answers]}


def _continued(who: Answerer, part: Part, tick: Tick) -> Row:
    pairs = [_pair(who, example) for example in part.examples]
    found = who.continuations(pairs, tick)
    texts = [example.answers[0] if greedy else "" for (_, greedy), example in zip(found, part.examples, strict=True)]
    scores = [part.score(text, example) for text, example in zip(texts, part.examples, strict=True)]
    return {"scores": scores, "prompt_tokens": _mean([c for c, _ in pairs]), "target_nll": [-nll for nll, _ in found]}


def _lead(loaded: LoadedModel, part: Part, batch: int, chat: bool) -> list[list[int]]:
    """The part's answers under transformers' own uncompressed cache."""
    plain = stock()
    with plain.around(loaded.model):
        who = Answerer(loaded.model, loaded.tokenizer, partial(plain.build, loaded.model), batch)
        return who.answer([who.encode(example.prompt, chat) for example in part.examples], part.max_new_tokens)


def _followed(who: Answerer, part: Part, led: Sequence[list[int]], chat: bool, tick: Tick) -> Row:
    prompts = [who.encode(example.prompt, chat) for example in part.examples]
    found = who.answer(prompts, part.max_new_tokens, tick=tick)
    scores = [shared_start(own, theirs) / len(theirs) for own, theirs in zip(found, led, strict=True)]
    return {"scores": scores, "prompt_tokens": _mean(prompts)}


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens of ``other`` come before the first that ``one`` has not."""
    return next((i for i, (a, b) in enumerate(zip(other, one, strict=False)) if a != b), min(len(one), len(other)))


def _pair(who: Answerer, example: Example) -> tuple[list[int], list[int]]:
    """Context and continuation as the tokenizer splits the whole text, the continuation from the first token that
    differs from the context's own."""
    context = who.encode(example.prompt, False)
    whole = who.encode(example.prompt + example.answers[0], False)
    if whole[: len(context)] != context:
        context = whole[: next(i for i, (a, b) in enumerate(zip(whole, context, strict=False)) if a != b)]
    return context, whole[len(context) :]


def _mean(rows: Sequence[Sequence[int]]) -> float:
    return sum(map(len, rows)) / len(rows)


def _template_tokens(tokenizer: Any, count: Any) -> int:
    """Tokens that the chat template adds to a message; 0 without one."""
    if not getattr(tokenizer, "chat_template", None):
        return 0
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    return int(count(text) - count("x"))
