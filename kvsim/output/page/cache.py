"""The tab *the cache explained*: where every byte of a model's cache comes from, by the code of ``kvsim explain``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvsim.analysis.explain import Explanation, explain, model_numbers
from kvsim.layout import Method
from kvsim.memory.estimate import Estimate, estimate
from kvsim.methods.formulas import Number
from kvsim.output import text
from kvsim.output.page.deployment import beyond, weights_chart
from kvsim.output.page.question import Question
from kvsim.output.page.table import Figure, amount, answers, listed, paragraph, section, table
from kvsim.output.schema import envelope, explain_rows, model_object
from kvsim.specs import rows_of


@dataclass
class Answer:
    """The model's numbers, and each method's bytes with their formulas; ``notes``: what to know of them."""

    question: Question
    numbers: list[Number]
    weighed: list[Estimate]
    explained: list[Explanation]
    notes: list[str]

    @property
    def shown(self) -> list[str]:
        return [one.method.name for one in self.weighed]


def answer(question: Question, check: Callable[[], None] = lambda: None) -> Answer:
    """Explains every method; ``check`` as in :func:`kvsim.output.page.deployment.answer`.

    Raises ``ValueError`` where no method can hold the model.
    """
    model, batch, tokens = question.model, question.batch_size, question.num_tokens

    def made(method: Method) -> list[tuple[Estimate, Explanation]]:
        check()
        return [(estimate(model, method, batch, tokens), explain(model, method, batch, tokens))]

    rows, notes = rows_of(question.methods, made, model.name)
    weighed, explained = map(list, zip(*rows, strict=True))
    notes = [*model.notes, *notes, *beyond(question)]
    return Answer(question, model_numbers(model, batch, tokens), weighed, explained, notes)


def as_json(found: Answer) -> dict[str, Any]:
    """``kvsim.explain/1``, as the command has it."""
    question = found.question
    inputs = {
        "model": question.model.name,
        "batch": question.batch_size,
        "methods": [method.name for method in question.methods],
        "ctx": question.num_tokens,
    }
    out = envelope("explain", inputs, found.notes) | {"model": model_object(question.model)}
    return out | explain_rows(found.numbers, found.weighed, found.explained)


def body(found: Answer) -> str:
    """The tab's HTML."""
    question = found.question
    base = found.weighed[0]
    blocks = []
    for one in found.weighed:
        smaller = f"{base.total_nbytes / one.total_nbytes:.2f}×" if one.total_nbytes else "-"
        figures = (
            Figure(f"{one.nbytes_per_token:,.0f} B", "a token, over all layers"),
            Figure(amount(one.total_nbytes), f"for {one.batch_size:,} sequences of {one.num_tokens:,} tokens"),
            Figure(smaller, f"smaller than {base.method.name}"),
        )
        blocks.append((one.method.name, figures))
    heading = text.heading(question.model).split("\n")[1:]
    return "".join(
        (
            answers(blocks),
            "".join(paragraph(line, "note") for line in heading),
            listed(found.notes),
            section("What the cache weighs", weights_chart(found.weighed, "")),
            section("The model's numbers", _numbers(f"Numbers of {question.model.name}", found.numbers)),
            *(section(f"Every byte of {one.method.name}", _formulas(one)) for one in found.explained),
        )
    )


def _numbers(caption: str, numbers: list[Number]) -> str:
    rows = ((n.name, f"{n.value:,}" if isinstance(n.value, int) else n.value, n.origin) for n in numbers)
    return table(caption, ["number", "value", "from"], rows, words=True)


def _formulas(one: Explanation) -> str:
    """The method's numbers, and every section's bytes as a product."""
    name = one.method.name
    layers = len({formula.layer for formula in one.formulas}) > 1
    rows = (
        (
            f"{formula.buffer}: {formula.section}" if formula.section != formula.buffer else formula.buffer,
            *([formula.layer] if layers else []),
            f"{formula.nbytes:,}",
            formula.text + (" (apart)" if formula.apart else ""),
        )
        for formula in one.formulas
    )
    apart = f", and {one.apart_nbytes:,} B apart that no method stores" if one.apart_nbytes else ""
    return (
        paragraph(f"{one.nbytes:,} B{apart}.", "note")
        + (_numbers(f"Numbers of {name}", list(one.numbers)) if one.numbers else "")
        + table(
            f"Formulas of {name}", ["section", *(["layers"] if layers else []), "bytes", "formula"], rows, words=True
        )
    )
