"""The tab *one deployment*: what fits these cards, how fast a token is, and what the cache weighs there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsim.analysis.breakeven import BreakEven, Runner, by_context, by_money
from kvsim.analysis.plan import NoRoomError, site
from kvsim.memory.estimate import Estimate, estimate
from kvsim.memory.sharding import Sharding, stages
from kvsim.output import chart
from kvsim.output.page.question import Question
from kvsim.output.page.table import Figure, amount, answers, beside, facts, listed, section, table
from kvsim.output.schema import envelope
from kvsim.specs import left_out, milliseconds, parse_serving

CURVE_POINTS = 22
FEWER_BITS = (8, 4)
"""Weights that are offered where 16 bits have no room."""
MEMORY_ENDS = "where memory ends"


@dataclass
class Answer:
    """Everything that the tab shows, before it is HTML.  ``notes``: methods left out, and why."""

    question: Question
    runners: list[Runner]
    estimates: list[Estimate]
    speed: list[BreakEven]
    money: list[BreakEven]
    contexts: list[int]
    notes: list[str] = field(default_factory=list)

    @property
    def shown(self) -> list[str]:
        return [runner.method.name for runner in self.runners]


def answer(question: Question, check: Callable[[], None] = lambda: None) -> Answer:
    """Weighs and times every method; ``check`` is called before each, and may raise what ends the work.

    Raises ``NoRoomError`` where the weights do not fit, ``ValueError`` where no method can be.
    """
    model, engine = question.model, parse_serving(question.engine, question.card, question.num_cards)
    share = model
    if question.num_cards > 1:
        (share,) = stages(model, Sharding(tensor_parallel_size=question.num_cards))
    runners, estimates = [], []
    reasons: dict[str, str] = {}
    for method in question.methods:
        check()
        try:
            runner = Runner(
                model, method, question.card, question.num_cards, question.weight_bits, question.reserve, engine
            )
            estimates.append(estimate(share, method, question.batch_size, question.num_tokens, engine))
            runners.append(runner)
        except NoRoomError as error:
            raise NoRoomError(f"{model.name} on {question.place}: {error}{would_do(question)}") from None
        except ValueError as error:
            reasons[method.name] = str(error)
    notes = left_out(reasons)
    if not runners:
        raise ValueError(f"{model.name} on {question.place}: {'; '.join(notes)}")
    notes += beyond(question)
    base = runners[0]
    return Answer(
        question,
        runners,
        estimates,
        [by_context(runner, base, question.batch_size) for runner in runners[1:]],
        [by_money(runner, base) for runner in runners[1:]],
        contexts(question, runners),
        notes,
    )


def beyond(question: Question) -> list[str]:
    """A note where the context is longer than the model's positions."""
    most = question.model.max_positions
    if most and question.num_tokens > most:
        return [f"a context of {question.num_tokens:,} is beyond the model's {most:,} positions"]
    return []


def would_do(question: Question) -> str:
    """What has room: ``; cards=8 have room``, else ``; weight_bits=4 have room``, or nothing where neither does."""
    most = max(8, question.card.host_cards)
    counts = [count for power in range(1, 8) if (count := question.num_cards << power) <= most]
    for count in counts:
        if _has_room(question, count, question.weight_bits):
            return f"; cards={count} have room"
    for bits in FEWER_BITS:
        if bits < (question.weight_bits or 16) and _has_room(question, question.num_cards, bits):
            return f"; weight_bits={bits} have room"
    for bits in FEWER_BITS:
        for count in counts:
            if bits < (question.weight_bits or 16) and _has_room(question, count, bits):
                return f"; cards={count} with weight_bits={bits} have room"
    return ""


def _has_room(question: Question, count: int, bits: float | None) -> bool:
    try:
        engine = parse_serving(question.engine, question.card, count)
        site(question.model, question.card, count, bits, question.reserve, engine)
    except ValueError:
        return False
    return True


def contexts(question: Question, runners: Sequence[Runner]) -> list[int]:
    """Points of the curves: from 256 tokens to what the roomiest method fits, evenly in the logarithm."""
    last = max(max(runner.max_context(1) for runner in runners), 512)
    last = min(last, max(8 * (question.model.max_positions or 1 << 17), 2 * question.num_tokens))
    ratio = (last / 256) ** (1 / (CURVE_POINTS - 1))
    return sorted({round(256 * ratio**step) for step in range(CURVE_POINTS)} | {question.num_tokens})


def as_json(found: Answer) -> dict[str, Any]:
    """``kvsim.page/1``: the tables as one object."""
    question = found.question
    speed = {row.method.name: row for row in found.speed}
    money = {row.method.name: row for row in found.money}
    rows = []
    for runner, one in zip(found.runners, found.estimates, strict=True):
        name, step = runner.method.name, runner.step(question.batch_size, question.num_tokens)
        best = runner.best_rate(question.num_tokens)
        rows.append(
            {
                "method": name,
                "nbytes": one.nbytes,
                "state_nbytes": one.state_nbytes,
                "index_nbytes": one.index_nbytes,
                "split": one.split,
                "read_nbytes": one.read_nbytes,
                "fits": one.total_nbytes <= runner.place.cache_nbytes,
                "max_batch": runner.max_batch(question.num_tokens),
                "max_ctx": runner.max_context(question.batch_size),
                "tpot_seconds": step.seconds._asdict(),
                "bound": step.bound,
                "tokens_per_second": runner.rate(question.batch_size, question.num_tokens),
                "best_tokens_per_second": best,
                "usd_per_mtok": question.dollars(best),
                "faster_from_ctx": speed[name].first if name in speed else None,
                "cheaper_from_ctx": money[name].first if name in money else None,
            }
        )
    return json_object(question, found.notes, rows, found.runners[0].place.cache_nbytes)


def json_object(
    question: Question, notes: list[str], rows: list[dict[str, Any]], cache_room_nbytes: int = 0
) -> dict[str, Any]:
    """``kvsim.page/1``: the question, what the reader should know, and a row a method."""
    inputs = {
        "model": question.model.name,
        "gpu": question.card.id,
        "cards": question.num_cards,
        "methods": [method.name for method in question.methods],
        "ctx": question.num_tokens,
        "batch": question.batch_size,
        "weight_bits": question.weight_bits,
        "engine": question.engine,
        "reserve": question.reserve,
    }
    return envelope("page", inputs, notes) | {"cache_room_nbytes": cache_room_nbytes, "rows": rows}


def body(found: Answer) -> str:
    """The tab's HTML."""
    return "".join(
        (
            _answers(found),
            _facts(found),
            section("What fits", _fits(found)),
            section("How fast a token is", _speed(found)),
            section("What the cache weighs", _bytes(found)),
        )
    )


def _answers(found: Answer) -> str:
    """Of every method what fits, how many, and how fast at what price."""
    question = found.question
    tokens, batch = question.num_tokens, question.batch_size
    blocks = []
    for runner, one in zip(found.runners, found.estimates, strict=True):
        most, fits = runner.max_batch(tokens), one.total_nbytes <= runner.place.cache_nbytes
        missing = "" if fits else f": {amount(one.total_nbytes - runner.place.cache_nbytes)} are missing"
        verdict = f"{'fits' if fits else 'does not fit'}: {batch:,} sequences of {tokens:,} tokens{missing}"
        dollars = question.dollars(runner.best_rate(tokens))
        rate = f"{runner.best_rate(tokens):,.0f}" if most else "-"
        figures = (
            Figure("yes" if fits else "no", verdict),
            Figure(f"{most:,}", "sequences at most"),
            Figure(f"{rate} tok/s", "with all of them" + (f", ${dollars:.3f} a million tokens" if dollars else "")),
        )
        blocks.append((runner.method.name, figures))
    return answers(blocks)


def _facts(found: Answer) -> str:
    question, model = found.question, found.question.model
    place = found.runners[0].place
    cards = f"{question.num_cards} × {question.card.id}" if question.num_cards > 1 else question.card.id
    return facts(
        (
            ("Model", model.name),
            ("Parameters", f"{model.num_params:,}" if model.num_params else "not known"),
            ("Card", cards),
            ("Weights", f"{place.weight_bits:g} bits each"),
            ("Room for the cache" + (" a card" if question.num_cards > 1 else ""), amount(place.cache_nbytes)),
            ("Context", f"{question.num_tokens:,} tokens"),
            ("Batch", f"{question.batch_size:,}"),
            ("Engine", question.engine),
        )
    ) + listed(found.notes)


def parts(one: Estimate) -> dict[str, float]:
    """Bytes by component."""
    out: dict[str, float] = {name: float(size) for name, size in one.split.items()}
    out["exact tokens"] = out.pop("residual", 0.0)
    return out | {"constant state": float(one.state_nbytes), "index keys": float(one.index_nbytes)}


def weights_chart(estimates: Sequence[Estimate], where: str) -> str:
    """Bytes by component: a chart, and its table."""
    rows = [(one.method.name, parts(one)) for one in estimates]
    kinds = [kind for kind in rows[0][1] if any(sizes.get(kind) for _, sizes in rows)]
    base = estimates[0].total_nbytes
    return chart.bars(
        "Bytes of the cache by component, a bar a method", f"Bytes by component{where}", rows, amount
    ) + table(
        f"Bytes of the cache{where}",
        ["method", *kinds, "total", "smaller", "read a step"],
        (
            (
                one.method.name,
                *(amount(sizes.get(kind, 0)) for kind in kinds),
                amount(one.total_nbytes),
                f"{base / one.total_nbytes:.2f}×" if one.total_nbytes else "-",
                amount(one.read_nbytes),
            )
            for one, (_, sizes) in zip(estimates, rows, strict=True)
        ),
    )


def _bytes(found: Answer) -> str:
    return weights_chart(found.estimates, " on each card" if found.question.num_cards > 1 else "")


def _fits(found: Answer) -> str:
    question = found.question
    tokens, batch = question.num_tokens, question.batch_size
    curves = [
        chart.Line(
            runner.method.name,
            colour,
            tuple((float(n), float(runner.max_batch(n))) for n in held(found.contexts, runner, 1)),
            end=memory_end(found.contexts, runner, 1),
        )
        for colour, runner in enumerate(found.runners)
    ]
    drawn = chart.lines(
        "Largest batch by context, a line a method",
        "tokens a sequence",
        "Largest batch (a cross: memory ends)",
        curves,
        here=tokens,
    )
    return beside(
        drawn,
        table(
            "What fits beside the weights",
            ["method", "fits", f"batch at {tokens:,} tokens", f"tokens at batch {batch:,}"],
            (
                (
                    runner.method.name,
                    "yes" if one.total_nbytes <= runner.place.cache_nbytes else "no",
                    f"{runner.max_batch(tokens):,}",
                    f"{runner.max_context(batch):,}",
                )
                for runner, one in zip(found.runners, found.estimates, strict=True)
            ),
        ),
    )


def held(points: Sequence[int], runner: Runner, batch: int) -> list[int]:
    """The contexts of a curve: those that fit, and the longest that does where it is shorter than the chart."""
    most = runner.max_context(batch)
    fitting = [n for n in points if n <= most]
    return [*fitting, most] if fitting and fitting[-1] < most < points[-1] else fitting


def memory_end(points: Sequence[int], runner: Runner, batch: int) -> str:
    """What the last of them is, where the chart goes on."""
    return MEMORY_ENDS if runner.max_context(batch) < points[-1] else ""


def _speed(found: Answer) -> str:
    question = found.question
    tokens, batch = question.num_tokens, question.batch_size

    def curve(runner: Runner, banded: bool) -> chart.Line:
        bands = [(float(n), runner.seconds(batch, n)) for n in held(found.contexts, runner, batch)]
        points = tuple((n, batch / band.value) for n, band in bands)
        return chart.Line(
            runner.method.name,
            found.runners.index(runner),
            points,
            tuple((n, batch / band.high, batch / band.low) for n, band in bands) if banded else (),
            end=memory_end(found.contexts, runner, batch),
        )

    def cells(runner: Runner) -> tuple[str, ...]:
        step, best = runner.step(batch, tokens), runner.best_rate(tokens)
        dollars = question.dollars(best)
        return (
            runner.method.name,
            milliseconds(step.seconds.value),
            f"{milliseconds(step.seconds.low)} to {milliseconds(step.seconds.high)}",
            step.bound,
            f"{runner.rate(batch, tokens):,.0f}",
            f"{best:,.0f}",
            f"{dollars:.3f}" if dollars else "-",
        )

    price = f"Money: {question.price.label}." if question.price else f"No price of {question.card.id} is listed."
    heads = ("method", "ms a token", "low to high", "bound by")
    drawn = chart.lines(
        "Tokens a second by context, with the first method's band",
        "tokens a sequence",
        f"Tokens a second at batch {batch:,} (shaded: low to high of {found.runners[0].method.name})",
        [curve(runner, runner is found.runners[0]) for runner in found.runners],
        here=tokens,
    )
    return beside(
        drawn,
        table(
            f"Decode at {tokens:,} tokens",
            [*heads, f"tok/s at batch {batch:,}", "tok/s, all that fits", "$/Mtok"],
            map(cells, found.runners),
            f"Predictions with the range that nine in ten measurements fell into. {price}",
        ),
    )
