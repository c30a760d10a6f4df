"""The tab *break-even*: from which context, and from which batch, the other methods pay against the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvsim.analysis.breakeven import MARGIN, BreakEven, Runner
from kvsim.analysis.plan import NoRoomError
from kvsim.output import chart
from kvsim.output.comparison import Comparison, comparison_object
from kvsim.output.page.deployment import beyond, contexts, held, memory_end, would_do
from kvsim.output.page.question import Question
from kvsim.output.page.table import Figure, answers, beside, listed, section, table
from kvsim.specs import left_out, parse_serving


@dataclass
class Answer:
    """The comparison, and the points of its curves."""

    question: Question
    compared: Comparison
    base: Runner
    contexts: list[int]

    @property
    def others(self) -> list[Runner]:
        return [runner for runner in self.compared.runners.values() if runner.method != self.base.method]

    @property
    def shown(self) -> list[str]:
        return list(self.compared.runners)

    @property
    def colours(self) -> dict[str, int]:
        """Of every method that was asked for its place in the palette."""
        return {method.name: place for place, method in enumerate(self.question.methods)}

    def rows(self, kind: str) -> list[BreakEven]:
        return [row for row in self.compared.rows if row.kind == kind]


def answer(question: Question, check: Callable[[], None] = lambda: None) -> Answer:
    """Compares every method with the first that can be; ``check`` as in :func:`kvsim.output.page.deployment.answer`.

    Raises ``NoRoomError`` where the weights do not fit, ``ValueError`` where there is nothing to compare.
    """
    engine = parse_serving(question.engine, question.card, question.num_cards)
    asked = (question.weight_bits, question.reserve, engine)
    reasons: dict[str, str] = {}
    base = None
    for method in question.methods:
        check()
        try:
            base = Runner(question.model, method, question.card, question.num_cards, *asked)
            break
        except NoRoomError as error:
            raise NoRoomError(f"{question.model.name} on {question.place}: {error}{would_do(question)}") from None
        except ValueError as error:
            reasons[method.name] = str(error)
    rest = [method for method in question.methods if base and method != base.method and method.name not in reasons]
    if base is None or not rest:
        raise ValueError("; ".join([*left_out(reasons), "nothing to compare: choose two methods or more"]))
    compared = Comparison(
        question.model,
        question.card,
        question.num_cards,
        [question.batch_size],
        [question.num_tokens],
        MARGIN,
        question.price,
    )
    compared.run(rest, [base.method], *asked, named=False)
    compared.notes = [*left_out(reasons), *compared.notes, *beyond(question)]
    return Answer(question, compared, base, contexts(question, list(compared.runners.values())))


def as_json(found: Answer) -> dict[str, Any]:
    """``kvsim.breakeven/1``, as the command has it."""
    question = found.question
    inputs: dict[str, Any] = {"model": question.model.name, "gpu": question.card.id, "cards": question.num_cards}
    inputs |= {"batch": [question.batch_size], "ctx": [question.num_tokens], "engine": question.engine}
    inputs |= {"reserve": question.reserve, "weight_bits": question.weight_bits, "margin": MARGIN}
    return comparison_object(found.compared, inputs)


def body(found: Answer) -> str:
    """The tab's HTML."""
    base, batch, tokens = found.base.method.name, found.question.batch_size, found.question.num_tokens
    by_context, by_batch, by_money = found.rows("context"), found.rows("batch"), found.rows("money")
    blocks = []
    for faster, wider, cheaper in zip(by_context, by_batch, by_money, strict=True):
        figures = (
            Figure(pays(faster), f"faster, by tokens a sequence, at batch {batch:,}"),
            Figure(pays(wider), f"faster, by sequences, at {tokens:,} tokens"),
            Figure(pays(cheaper), "cheaper, by tokens a sequence, each with all that fits"),
        )
        blocks.append((f"{faster.method.name} against {base}", figures))
    rows = (
        (
            faster.method.name,
            pays(faster),
            pays(wider),
            pays(cheaper),
            f"{faster.last:,}",
            f"{faster.against_last:,}",
        )
        for faster, wider, cheaper in zip(by_context, by_batch, by_money, strict=True)
    )
    heads = ["method", f"faster at batch {batch:,}", f"faster at {tokens:,} tokens", "cheaper"]
    heads += [f"fits to, batch {batch:,}", f"{base} fits to"]
    note = (
        "Tokens a sequence from which a step is 1 % shorter, sequences from which it is, and tokens from which a token "
        "is 1 % cheaper, each method with the largest batch that fits; solved to the token."
    )
    content = _charts(found) + table(f"Break-even against {base}", heads, rows, note)
    colours = [found.colours[row.method.name] for row in by_context]
    return answers(blocks, colours) + listed(found.compared.notes) + section(f"When it pays against {base}", content)


def _charts(found: Answer) -> str:
    base, batch, tokens = found.base, found.question.batch_size, found.question.num_tokens

    def ratio(runner: Runner) -> chart.Line:
        points = held(found.contexts, runner, batch)
        gains = tuple((float(n), base.seconds(batch, n).value / runner.seconds(batch, n).value) for n in points)
        end = memory_end(found.contexts, runner, batch)
        return chart.Line(runner.method.name, found.colours[runner.method.name], gains, end=end)

    def worth(runner: Runner) -> chart.Line:
        rates = [(float(n), runner.best_rate(n), base.best_rate(n)) for n in found.contexts]
        gains = tuple((n, mine / other) for n, mine, other in rates if mine and other)
        end = f"where memory ends for {base.method.name}" if len(gains) < len(rates) else ""
        return chart.Line(runner.method.name, found.colours[runner.method.name], gains, end=end)

    speed = chart.lines(
        f"Speed against {base.method.name} by context",
        "tokens a sequence",
        f"Times as fast as {base.method.name}, batch {batch:,}",
        [ratio(runner) for runner in found.others],
        [chart.Rule(1.0, "as fast")],
        log_y=False,
        here=tokens,
    )
    money = chart.lines(
        f"Tokens a dollar against {base.method.name} by context",
        "tokens a sequence",
        f"Times the tokens a dollar of {base.method.name}, each with all that fits",
        [worth(runner) for runner in found.others],
        [chart.Rule(1.0, "as cheap")],
        log_y=False,
        here=tokens,
    )
    return beside(speed, money)


def pays(row: BreakEven) -> str:
    """``from 1,827``; ``never``; ``always``."""
    if not row.last:
        return "does not fit"
    if row.first == 1:
        return "always"
    if row.first is not None:
        return f"from {row.first:,}"
    return "never" if not row.pays else "; ".join(f"{start:,} to {end:,}" for start, end in row.pays)
