"""The tab *plan*: cards, method, batch and price for so many users, by the code of ``kvsim plan``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvsim.analysis.plan import Clock, Demand, Plan, clock_of, nearest, plan
from kvsim.hardware import Hardware
from kvsim.install import install_hint
from kvsim.layout import Method
from kvsim.output import chart, plan_screen
from kvsim.output.page.deployment import FEWER_BITS
from kvsim.output.page.question import Question
from kvsim.output.page.table import Figure, answers, beside, listed, paragraph, section, table
from kvsim.output.plan_rows import cut, plan_object
from kvsim.specs import milliseconds, parse_engine_choice

CURVE_POINTS = 18


@dataclass
class Answer:
    """Every way that was weighed, the cheapest first.

    ``near``: where nothing meets the demand, what would: a sentence, and the fields to change.
    """

    question: Question
    demand: Demand
    ways: list[Plan]
    notes: list[str]
    near: tuple[str, dict[str, str]] | None = None

    @property
    def good(self) -> list[Plan]:
        return [way for way in self.ways if way.refusal is None]

    @property
    def shown(self) -> list[str]:
        return [method.name for method in self.question.methods]

    def by_method(self) -> list[Plan | None]:
        """Of each method asked for its cheapest way, or ``None``."""
        return [next((way for way in self.good if way.method == method), None) for method in self.question.methods]


def answer(question: Question, check: Callable[[], None] = lambda: None) -> Answer:
    """Weighs every method on every card; ``check`` is called before each, and may raise what ends the work.

    Raises ``ValueError`` where a figure cannot be, or numpy is missing.
    """
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise ValueError(f"plan needs numpy: {install_hint('plan')}") from None
    lengths, notes = cut(question.demand.lengths, question.model.max_positions)
    demand = replace(question.demand, lengths=lengths)

    def weigh(wanted: Demand, bits: float | None = question.weight_bits) -> list[Plan]:
        return _weigh(question, wanted, bits, check)

    ways = weigh(demand)
    found = Answer(question, demand, ways, notes)
    if not found.good:
        found.near = _nearest(question, demand, ways, weigh)
        found.notes = notes + ([found.near[0]] if found.near else [])
    return found


def _weigh(question: Question, demand: Demand, bits: float | None, check: Callable[[], None]) -> list[Plan]:
    serving, listed_price = parse_engine_choice(question.engine, {}), question.price_of()

    def price(card: Hardware, num_cards: int) -> Any:
        check()
        return listed_price(card, num_cards)

    return plan(
        question.model,
        list(question.methods),
        list(question.cards),
        demand,
        price,
        weight_bits=bits,
        reserve=question.reserve,
        engine=serving.on,
    )


def _nearest(
    question: Question, demand: Demand, ways: list[Plan], weigh: Callable[..., list[Plan]]
) -> tuple[str, dict[str, str]] | None:
    """Longer limits that would be met; else any number of cards, where one was given; else fewer bits a weight."""
    found = nearest(ways, demand, weigh)
    if found is not None:
        changes = {
            name: plan_screen.time_text(limit)
            for name in ("slo_tpot", "slo_ttft")
            if (limit := getattr(found[0], name)) is not None and limit != getattr(demand, name)
        }
        return plan_screen.would_do(demand, found)[0], changes
    if any(count for _, count in question.cards):
        free = replace(question, plan_cards=tuple(dict.fromkeys((card, None) for card, _ in question.cards)))
        ways = _weigh(free, demand, question.weight_bits, lambda: None)
        if ways[0].refusal is None:
            names = " ".join(card.id for card, _ in free.cards)
            return f"any number of cards would do: {plan_screen.headline(ways[:1])}", {"gpus": names}
    for bits in FEWER_BITS:
        if bits < (question.weight_bits or 16):
            ways = weigh(demand, bits)
            if ways[0].refusal is None:
                said = f"--weight-bits {bits} would do: {plan_screen.headline(ways[:1])}"
                return said, {"weight_bits": str(bits)}
    return None


def as_json(found: Answer) -> dict[str, Any]:
    """``kvsim.plan/1``, as the command has it."""
    question = found.question
    told: dict[str, Any] = {"max_model_len": question.model.max_positions, "weight_bits": question.weight_bits}
    told |= {"engine": question.engine, "reserve": question.reserve, "speculate": None, "prefix_hits": None}
    return plan_object(question.model, question.cards, None, found.demand, told, found.notes, found.ways)


def body(found: Answer) -> str:
    """The tab's HTML."""
    good = found.good
    head = plan_screen.headline(good) if good else "Nothing meets this demand."
    blocks = [paragraph(head, "headline"), paragraph(f"For {plan_screen.asked(found.demand)}.", "note")]
    if found.near:
        blocks.append(paragraph(found.near[0], "near"))
    blocks.append(answers(list(map(_answered, found.question.methods, found.by_method()))))
    if good:
        ways = map(plan_screen.cells, plan_screen.cheapest_ways(good))
        blocks.append(section("What more users cost", _charts(found)))
        blocks.append(section("Every way", table("Ways, the cheapest first", plan_screen.HEADS, ways)))
    refused = plan_screen.refused_ways(found.ways)
    if refused:
        blocks.append(section("Not possible", listed(refused)))
    notes = [*plan_screen.explained(found.demand, good), *(note for note in found.notes if note not in blocks[2])]
    return "".join([*blocks, section("What the figures rest on", listed(notes))])


def _answered(method: Method, way: Plan | None) -> tuple[str, tuple[Figure, ...]]:
    """A method's cheapest way: its cards, the most users on them, and how fast at what price."""
    if way is None:
        return method.name, (Figure("no", "does not meet this demand: see below"),)
    replicas = f"{way.num_replicas} replica{'s' if way.num_replicas > 1 else ''} of {plan_screen.place(way)}"
    cost = f", ${way.usd_per_mtok:.3f} a million output tokens" if way.usd_per_mtok else ""
    times = ((way.tpot, "a token"), (way.ttft, "the first"))
    said = ", ".join(f"{milliseconds(band.value)} ms {what}" for band, what in times if band)
    return method.name, (
        Figure(f"{way.num_cards} card{'s' if way.num_cards > 1 else ''}", f"{replicas}, within the limits"),
        Figure(f"{way.max_batch * way.num_replicas:,}", "users at most on them"),
        Figure(f"{way.tokens_per_second:,.0f} tok/s", f"{said}{cost}"),
    )


def _charts(found: Answer) -> str:
    """Of each method's cheapest way: a token's time by requests in a replica, and dollars by users."""
    question, demand = found.question, found.demand
    serving = parse_engine_choice(question.engine, {})
    times, money = [], []
    users = _grid(max(4 * demand.users, 64), demand.users)
    for colour, way in enumerate(found.by_method()):
        if way is None:
            continue
        engine = serving.on(way.card, way.cards_per_replica)
        clock = clock_of(question.model, way, demand.lengths, question.weight_bits, question.reserve, engine)
        times.append(_times(way, colour, clock, demand))
        points = [(float(count), cost(question, way, clock, count)) for count in users]
        priced = tuple((count, dollars) for count, dollars in points if dollars)
        money.append(chart.Line(way.method.name, colour, priced))
    rules = [chart.Rule(demand.slo_tpot * 1e3, "the limit")] if demand.slo_tpot else []
    latency = chart.lines(
        "Milliseconds a token by requests in flight, a line a method",
        "requests in flight in a replica",
        "Milliseconds a token, each method on its cheapest cards",
        times,
        rules,
        log_y=False,
        unit="requests",
    )
    if not any(line.points for line in money):
        return latency
    dollars = chart.lines(
        "Dollars a million output tokens by users, a line a method",
        "users",
        "Dollars a million output tokens, replicas added as they are needed",
        money,
        here=float(demand.users),
        unit="users",
    )
    return beside(dollars, latency)


def _times(way: Plan, colour: int, clock: Clock, demand: Demand) -> chart.Line:
    """A token's time up to the largest batch of a replica, its own batch marked."""
    end = "where memory ends" if clock.within(way.max_batch + 1, demand) else "where the limits end"
    points = tuple((float(n), clock.tpot(n).value * 1e3) for n in _grid(way.max_batch, way.batch_size))
    return chart.Line(way.method.name, colour, points, end=end, here=float(way.batch_size))


def cost(question: Question, way: Plan, clock: Clock, users: int) -> float | None:
    """Dollars of a million output tokens where replicas like ``way``'s serve so many users; ``None``: no price."""
    replicas = -(-users // way.max_batch)
    price = question.price_of()(way.card, replicas * way.cards_per_replica)
    if price is None:
        return None
    rate = users / clock.tpot(-(-users // replicas)).value
    return price.usd_per_hour * replicas * way.cards_per_replica / 3600 / rate * 1e6


def _grid(last: int, asked: int) -> list[int]:
    """Whole numbers to ``last``, evenly in the logarithm, ``asked`` among them."""
    ratio = last ** (1 / (CURVE_POINTS - 1))
    return sorted({round(ratio**step) for step in range(CURVE_POINTS)} | {last, asked})
