"""What the page is asked, and the command that asks the same."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvsim.analysis.plan import Demand
from kvsim.analysis.request_lengths import constant
from kvsim.hardware import Hardware, Price, given, lowest
from kvsim.layout import Method
from kvsim.models.model import Model
from kvsim.output.plan_screen import time_text
from kvsim.specs import choose_methods

ANSWER = 512
"""Tokens of an answer, unless told otherwise or half of the context."""
TABS = {
    "plan": "Plan",
    "deployment": "One deployment",
    "breakeven": "Break-even",
    "cache": "The cache explained",
}
"""Name -> title, the first one first."""


@dataclass(frozen=True)
class Question:
    """What the page is about.  ``num_cards`` share the model; ``price``: of a card-hour, ``None``: none is listed.

    ``specs``, ``model_spec``: methods and model as they were typed (without the methods the page names no command).
    The plan's own: ``users`` (``None``: the batch), ``input_len`` and ``output_len`` (``None``: the context together),
    limits in seconds, and cards with how many share the model (``()``: this card, as many as suit).  ``tab``: of
    :data:`TABS`, the one that is shown first.
    """

    model: Model
    card: Hardware
    methods: tuple[Method, ...]
    num_tokens: int
    batch_size: int
    num_cards: int = 1
    weight_bits: float | None = None
    engine: str = "ideal"
    reserve: float | None = None
    price: Price | None = None
    specs: tuple[str, ...] = ()
    model_spec: str = ""
    users: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    slo_tpot: float | None = None
    slo_ttft: float | None = None
    plan_cards: tuple[tuple[Hardware, int | None], ...] = ()
    tab: str = "deployment"

    @property
    def place(self) -> str:
        """``2 x h100-sxm``."""
        return f"{self.num_cards} x {self.card.id}"

    @property
    def cards(self) -> tuple[tuple[Hardware, int | None], ...]:
        """The cards that a plan weighs."""
        return self.plan_cards or ((self.card, None),)

    @property
    def own_price(self) -> float | None:
        """Dollars a card-hour, where the listed price was not taken."""
        listed = question_price(self.card, self.num_cards)
        return None if self.price is None or self.price == listed else self.price.usd_per_hour

    @property
    def demand(self) -> Demand:
        """The plan's users, lengths and limits.  Raises ``ValueError`` for users or limits that cannot be."""
        output = self.output_len or min(ANSWER, max(1, self.num_tokens // 2))
        given_tokens = self.input_len or max(1, self.num_tokens - output)
        lengths = constant(given_tokens, output)
        return Demand(self.users or self.batch_size, lengths, self.slo_tpot, self.slo_ttft)

    def price_of(self) -> Callable[[Hardware, int], Price | None]:
        """What a card-hour costs, of any card and number."""
        own = self.own_price
        return question_price if own is None else lambda card, num_cards: given(card.id, own)

    def dollars(self, tokens_per_second: float) -> float | None:
        """Of a million tokens; ``None`` where no price is known, or nothing runs."""
        if self.price is None or not tokens_per_second:
            return None
        return self.price.usd_per_hour * self.num_cards / 3600 / tokens_per_second * 1e6


def question_price(card: Hardware, num_cards: int) -> Price | None:
    """The lowest listed price, for :class:`Question`."""
    return lowest(card.id, num_cards)


def _words(command: str, flags: list[tuple[str, object]]) -> str:
    return shlex.join([*command.split(), *(str(word) for flag, value in flags for word in (flag, value))])


def _model(question: Question) -> tuple[str, object]:
    return "--model", question.model_spec or question.model.name


def _methods(question: Question, shown: Sequence[str] | None = None) -> list[tuple[str, object]]:
    def is_shown(spec: str) -> bool:
        return shown is None or choose_methods([spec], {}, None)[0][0].name in shown

    return [("--method", spec) for spec in question.specs if is_shown(spec)]


def _serving(question: Question) -> list[tuple[str, object]]:
    """Flags where the default is another."""
    flags: list[tuple[str, object]] = []
    if question.weight_bits is not None:
        flags.append(("--weight-bits", question.weight_bits))
    if question.engine != "ideal":
        flags.append(("--engine", question.engine))
    if question.reserve is not None:
        flags.append(("--reserve", question.reserve))
    if question.own_price is not None:
        flags.append(("--price", question.own_price))
    return flags


def _limits(question: Question) -> list[tuple[str, object]]:
    limits = ("--slo-tpot", question.slo_tpot), ("--slo-ttft", question.slo_ttft)
    return [(flag, time_text(seconds)) for flag, seconds in limits if seconds is not None]


def _counted(card: Hardware, count: int | None) -> str:
    return card.id if count is None else f"{card.id}:{count}"


def command_line(question: Question) -> str:
    """The command that writes the same page, quoted for a shell; a flag where the default is another."""
    flags = [_model(question), ("--gpu", f"{question.card.id}:{question.num_cards}"), *_methods(question)]
    flags += [("--ctx", question.num_tokens), ("--batch", question.batch_size), *_serving(question)]
    flags += [("--plan-gpu", _counted(*place)) for place in question.plan_cards]
    own = ("--users", question.users), ("--input-len", question.input_len), ("--output-len", question.output_len)
    flags += [(flag, value) for flag, value in own if value is not None]
    return _words("kvsim report", [*flags, *_limits(question), ("--tab", question.tab)])


def terminal_command(question: Question, shown: Sequence[str]) -> str:
    """The command that prints the tab's figures in a terminal; nothing for the deployment, which has none of its own.

    ``shown``: names of the methods that the tab shows, the others were left out.
    """
    model, methods, serving = _model(question), _methods(question, shown), _serving(question)
    if question.tab == "plan":
        demand = question.demand
        ((given_tokens, output, _),) = demand.lengths.points
        flags = [model, *(("--gpu", _counted(*place)) for place in question.cards), ("--users", demand.users)]
        flags += [("--input-len", given_tokens), ("--output-len", output), *_limits(question)]
        return _words("kvsim plan", [*flags, *methods, *serving])
    if question.tab == "breakeven":
        flags = [model, ("--gpu", f"{question.card.id}:{question.num_cards}"), *methods[1:]]
        flags += [("--against", spec) for _, spec in methods[:1]]
        return _words(
            "kvsim breakeven",
            [*flags, ("--batch", question.batch_size), ("--ctx", question.num_tokens), *serving],
        )
    if question.tab == "cache":
        return _words(
            "kvsim explain", [model, ("--ctx", question.num_tokens), ("--batch", question.batch_size), *methods]
        )
    return ""
