"""Tasks (needles, RULER's kinds, LAMBADA, GSM8K, LongBench) answered through each cache: a row a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
LEAD = "lead"
"""The kind of rows that hold what a part is judged by: the answers of transformers' own uncompressed cache."""
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


@dataclass
class Call:
    """Parts of one task that every contender answers in one call: a batch need not be of one part.

    ``given``: of a contender's name and a part's, what the call gave for it, until its row takes it.
    """

    parts: list[Part]
    given: dict[tuple[str, str], Row] = field(default_factory=dict)


def together(parts: Sequence[Part], batch: int) -> list[Call]:
    """``parts`` in calls of at most ``batch`` examples: generated answers of one length to prompts of one length go
    together.  A call is always of the same parts, wherever a run went on."""
    out: list[Call] = []
    room: dict[tuple[object, ...], Call] = {}
    for part in parts:
        like = (part.about.get("length"), part.max_new_tokens, part.stop, part.chat)
        found = room.get(like)
        alone = part.continues or part.follows or "length" not in part.about
        if alone or found is None or sum(len(one.examples) for one in (*found.parts, part)) > batch:
            found = Call([])
            out.append(found)
            if not alone:
                room[like] = found
        found.parts.append(part)
    return out


def answer_tasks(
    loaded: LoadedModel,
    contenders: Sequence[Contender],
    name: str,
    asked: TaskRequest,
    batch: int,
    chat: bool,
    held: Sequence[Row] = (),
) -> list[Task]:
    """One a part and contender, all contenders of a call's parts after one another.

    Of a part whose right answer is the uncompressed cache's, that answer comes first: a row of its own, which those of
    ``held`` are taken for.
    """
    chat = chat and bool(getattr(loaded.tokenizer, "chat_template", None))
    led: dict[str, list[list[int]]] = {}

    def key_of(kind: str, part: Part, contender: Contender) -> Row:
        key = {"kind": kind, **subject(loaded, contender, asked.seed), "task": name, "part": part.name, **part.about}
        key |= {"examples_sha256": part.sha256, "num_examples": len(part.examples), "batch_size": batch}
        return {**key, "max_new_tokens": part.max_new_tokens, "chat": chat and part.chat}

    def work_of(part: Part) -> float:
        steps = -(-len(part.examples) // batch) * (part.max_new_tokens or 4)
        return steps * 20 + sum(len(example.prompt) for example in part.examples) / 4

    def lead_task(part: Part) -> Task:
        key = key_of(LEAD, part, stock())
        for row in held:
            if "failed" not in row and all(row.get(word) == value for word, value in key.items()):
                led[part.sha256] = [[int(token) for token in line.split()] for line in row["tokens"]]
        measure = partial(measure_lead, loaded, part, batch, chat and part.chat, led)
        return Task(key, measure, cost=4 * work_of(part), guest=True)

    def task(group: Call, part: Part, contender: Contender) -> Task:
        answer = partial(answer_call, loaded, contender, group, batch, chat and part.chat, led)
        measure = partial(measure_answers, contender.name, part.name, group, answer)
        cost = work_of(part) * (1 if contender.name in BASE else 2)
        return Task(key_of(KIND, part, contender), measure, cost=cost, guest=contender.package != "kvruntime")

    tasks = []
    for group in together(TASKS[name].parts(asked), batch):
        tasks += [lead_task(part) for part in group.parts if part.follows]
        tasks += [task(group, part, contender) for contender in contenders for part in group.parts]
    return tasks


def measure_answers(contender: str, part: str, group: Call, answer: Callable[[Tick], None], tick: Tick) -> Row:
    """The row's figures: ``score`` (mean of ``scores``), what was answered, tokens of a prompt, bits, seconds.

    Where ``group`` does not hold them yet, ``answer`` answers it whole.
    """
    if (contender, part) not in group.given:
        answer(tick)
    row = group.given.pop((contender, part))
    return {"score": sum(row["scores"]) / len(row["scores"]), **row}


def answer_call(
    loaded: LoadedModel,
    contender: Contender,
    group: Call,
    batch: int,
    chat: bool,
    led: dict[str, list[list[int]]],
    tick: Tick,
) -> None:
    """One call for all parts of ``group``, whose figures go into ``group.given``; each has its share of the seconds.

    ``led``: what transformers' own uncompressed cache answered to a part, by its digest.
    """
    part = group.parts[0]  # what follows or continues is alone
    start = perf_counter()
    longest = 0
    if part.follows and part.sha256 not in led:
        measure_lead(loaded, part, batch, chat, led)

    def build(num_tokens: int) -> Any:
        nonlocal longest
        longest = max(longest, num_tokens)
        return contender.build(loaded.model, num_tokens)

    with contender.around(loaded.model):
        who = Answerer(loaded.model, loaded.tokenizer, build, batch)
        if part.follows:
            rows = [_followed(who, part, led[part.sha256], chat, tick)]
        else:
            rows = [_continued(who, part, tick)] if part.continues else _generated(who, group.parts, chat, tick)
    release()
    bits: Row = {}
    if contender.method is not None:
        shapes = layer_shapes(loaded.model)
        held = held_bits(contender.method, shapes, longest)
        bits = {"bits": packed_bits(contender.method, shapes), "held_bits": held}
    seconds, answered = perf_counter() - start, sum(len(row["scores"]) for row in rows)
    for one, row in zip(group.parts, rows, strict=True):
        share = seconds * len(row["scores"]) / answered
        group.given[contender.name, one.name] = {**row, **bits, "seconds": share}


def _generated(who: Answerer, parts: Sequence[Part], chat: bool, tick: Tick) -> list[Row]:
    """A row a part; all are answered alike, in as few batches as hold them."""
    prompts = [[who.encode(example.prompt, chat) for example in part.examples] for part in parts]
    answers = iter(who.generate([one for own in prompts for one in own], parts[0].max_new_tokens, parts[0].stop, tick))
    rows = []
    for part, own in zip(parts, prompts, strict=True):
        given = [next(answers) for _ in part.examples]
        scores = [part.score(answer, example) for answer, example in zip(given, part.examples, strict=True)]
        rows.append({"scores": scores, "prompt_tokens": _mean(own), "answers": [answer[:KEPT] for answer in given]})
    return rows


def _continued(who: Answerer, part: Part, tick: Tick) -> Row:
    pairs = [_pair(who, example) for example in part.examples]
    found = who.continuations(pairs, tick)
    texts = [example.answers[0] if greedy else "" for (_, greedy), example in zip(found, part.examples, strict=True)]
    scores = [part.score(text, example) for text, example in zip(texts, part.examples, strict=True)]
    return {"scores": scores, "prompt_tokens": _mean([c for c, _ in pairs]), "target_nll": [-nll for nll, _ in found]}


def measure_lead(
    loaded: LoadedModel,
    part: Part,
    batch: int,
    chat: bool,
    led: dict[str, list[list[int]]],
    tick: Tick = lambda _: None,
) -> Row:
    """The part's answers under transformers' own uncompressed cache: ``tokens``, ids with spaces between, a line an
    example.  They go into ``led`` too."""
    start = perf_counter()
    plain = stock()
    with plain.around(loaded.model):
        who = Answerer(loaded.model, loaded.tokenizer, partial(plain.build, loaded.model), batch)
        prompts = [who.encode(example.prompt, chat) for example in part.examples]
        led[part.sha256] = who.answer(prompts, part.max_new_tokens, tick=tick)
    release()
    lines = [" ".join(map(str, row)) for row in led[part.sha256]]
    return {"tokens": lines, "seconds": perf_counter() - start}


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
