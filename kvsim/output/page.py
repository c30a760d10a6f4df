"""One question (model, card, methods, context, batch) as sections of HTML: charts, and the tables behind them.

``kvsim report`` writes the sections as one file that needs nothing else; ``kvsim serve`` puts a form above them.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from kvsim import __version__
from kvsim.analysis.breakeven import BreakEven, Runner, by_context, by_money
from kvsim.analysis.plan import NoRoomError, site
from kvsim.hardware import Hardware, Price, lowest
from kvsim.layout import Method
from kvsim.memory.estimate import Estimate, estimate
from kvsim.memory.sharding import Sharding, stages
from kvsim.models.model import Model
from kvsim.output import chart
from kvsim.output.not_modelled import NOT_MODELLED
from kvsim.output.schema import envelope
from kvsim.specs import left_out, milliseconds, parse_serving

GIB, MIB = 1 << 30, 1 << 20
CURVE_POINTS = 22


@dataclass(frozen=True)
class Question:
    """What the page is about.  ``num_cards`` share the model; ``price``: of a card-hour, ``None``: none is listed.

    ``specs``, ``model_spec``: methods and model as they were typed (without the methods the page names no command).
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


@dataclass
class Answer:
    """Everything that the page shows, before it is HTML.  ``notes``: methods left out, and why."""

    question: Question
    runners: list[Runner]
    estimates: list[Estimate]
    speed: list[BreakEven]
    money: list[BreakEven]
    contexts: list[int]
    notes: list[str] = field(default_factory=list)


def answer(question: Question) -> Answer:
    """Weighs and times every method.

    Raises ``NoRoomError`` where the weights do not fit, ``ValueError`` where no method can be.
    """
    model, engine = question.model, parse_serving(question.engine, question.card, question.num_cards)
    share = model
    if question.num_cards > 1:
        (share,) = stages(model, Sharding(tensor_parallel_size=question.num_cards))
    runners, estimates = [], []
    reasons: dict[str, str] = {}
    for method in question.methods:
        try:
            runner = Runner(
                model, method, question.card, question.num_cards, question.weight_bits, question.reserve, engine
            )
            estimates.append(estimate(share, method, question.batch_size, question.num_tokens, engine))
            runners.append(runner)
        except NoRoomError as error:
            more = _more_cards(question)
            raise NoRoomError(f"{model.name} on {question.num_cards} x {question.card.id}: {error}{more}") from None
        except ValueError as error:
            reasons[method.name] = str(error)
    notes = left_out(reasons)
    if not runners:
        raise ValueError(f"{model.name} on {question.num_cards} x {question.card.id}: {'; '.join(notes)}")
    if model.max_positions and question.num_tokens > model.max_positions:
        notes.append(f"a context of {question.num_tokens:,} is beyond the model's {model.max_positions:,} positions")
    base = runners[0]
    return Answer(
        question,
        runners,
        estimates,
        [by_context(runner, base, question.batch_size) for runner in runners[1:]],
        [by_money(runner, base) for runner in runners[1:]],
        _contexts(question, runners),
        notes,
    )


def _more_cards(question: Question) -> str:
    """What would do: ``; cards=8 have room``, or nothing where no power of two up to a host's cards does."""
    count = 2 * question.num_cards
    while count <= max(8, question.card.host_cards):
        try:
            engine = parse_serving(question.engine, question.card, count)
            site(question.model, question.card, count, question.weight_bits, question.reserve, engine)
        except ValueError:
            count *= 2
        else:
            return f"; cards={count} have room"
    return ""


def _contexts(question: Question, runners: Sequence[Runner]) -> list[int]:
    """Points of the curves: from 256 tokens to what the roomiest method fits, evenly in the logarithm."""
    last = max(max(runner.max_context(1) for runner in runners), 512)
    last = min(last, max(8 * (question.model.max_positions or 1 << 17), 2 * question.num_tokens))
    ratio = (last / 256) ** (1 / (CURVE_POINTS - 1))
    return sorted({round(256 * ratio**step) for step in range(CURVE_POINTS)} | {question.num_tokens})


def amount(nbytes: float) -> str:
    """``1.25 GiB`` or ``3.1 MiB``."""
    if not nbytes:
        return "0"
    if nbytes < MIB / 10:
        return f"{nbytes / 1024:,.2f} KiB"
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= 1000 * MIB else f"{nbytes / MIB:,.2f} MiB"


def command_line(question: Question) -> str:
    """The command that writes the same page, quoted for a shell; a flag where the default is another."""
    price = question.price if question.price != question_price(question.card, question.num_cards) else None
    flags: list[tuple[str, object]] = [
        ("--model", question.model_spec or question.model.name),
        ("--gpu", f"{question.card.id}:{question.num_cards}"),
        *(("--method", spec) for spec in question.specs),
        ("--ctx", question.num_tokens),
        ("--batch", question.batch_size),
    ]
    if question.weight_bits is not None:
        flags.append(("--weight-bits", question.weight_bits))
    if question.engine != "ideal":
        flags.append(("--engine", question.engine))
    if question.reserve is not None:
        flags.append(("--reserve", question.reserve))
    if price is not None:
        flags.append(("--price", price.usd_per_hour))
    return shlex.join(["kvsim", "report", *(str(word) for flag in flags for word in flag)])


def as_json(found: Answer) -> dict[str, Any]:
    """The tables as one object."""
    question = found.question
    speed = {row.method.name: row for row in found.speed}
    money = {row.method.name: row for row in found.money}
    rows = []
    for runner, one in zip(found.runners, found.estimates, strict=True):
        name, step = runner.method.name, runner.step(question.batch_size, question.num_tokens)
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
                "best_tokens_per_second": runner.best_rate(question.num_tokens),
                "usd_per_mtok": _dollars(runner, question.num_tokens, question),
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


def _dollars(runner: Runner, tokens: int, question: Question) -> float | None:
    rate = runner.best_rate(tokens)
    if question.price is None or not rate:
        return None
    return question.price.usd_per_hour * question.num_cards / 3600 / rate * 1e6


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """An HTML table, on a narrow screen a card a row; the first column names the row.

    Below it a button that copies it, and the same as CSV and JSON, within the page.
    """
    rows = list(rows)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-head="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(heads[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    after = f'<p class="note">{escape(note)}</p>' if note else ""
    title = escape(caption)
    return (
        f'<div class="data"><div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{_downloads(caption, heads, rows)}</div>{after}"
    )


COPY = '<button type="button" class="copy">Copy</button>'


def _downloads(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The button, and links to the table as two files that lie in the page itself."""
    lines = StringIO()
    csv.writer(lines, lineterminator="\n").writerows([heads, *rows])
    records = [dict(zip(heads, row, strict=True)) for row in rows]
    kinds = (("csv", "text/csv", lines.getvalue()), ("json", "application/json", json.dumps(records, indent=1)))
    name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-") or "table"
    links = "".join(
        f'<a download="{name}.{kind}" href="data:{media};charset=utf-8,{quote(text)}">{kind.upper()}</a>'
        for kind, media, text in kinds
    )
    return f'<div class="tools">{COPY}{links}</div>'


def sections(found: Answer) -> str:
    """The page's body."""
    question = found.question
    return "".join(
        (
            _answers(found),
            _navigation(found),
            _summary(found),
            _section("bytes", "What the cache weighs", _bytes(found)),
            _section("fits", "What fits", _fits(found)),
            _section("speed", "How fast a token is", _speed(found)),
            _section("breakeven", f"When it pays against {found.runners[0].method.name}", _breakeven(found)),
            _section("not", "Not modelled", _limits(found)),
            _footer(question),
        )
    )


def _footer(question: Question) -> str:
    if not question.specs:
        return f'<p class="note">kvsim {__version__}</p>'
    command = f": the same on the command line, <code>{escape(command_line(question))}</code>"
    return f'<p class="note command">kvsim {__version__}{command} {COPY}</p>'


def _answers(found: Answer) -> str:
    """The first thing that is seen: of every method what fits, how fast, and at what price."""
    question = found.question
    tokens, batch = question.num_tokens, question.batch_size
    blocks = []
    for place, (runner, one) in enumerate(zip(found.runners, found.estimates, strict=True)):
        most, fits = runner.max_batch(tokens), one.total_nbytes <= runner.place.cache_nbytes
        missing = "" if fits else f": {amount(one.total_nbytes - runner.place.cache_nbytes)} are missing"
        verdict = f"{'fits' if fits else 'does not fit'}: {batch:,} sequences of {tokens:,} tokens{missing}"
        dollars = _dollars(runner, tokens, question)
        rate = f"{runner.best_rate(tokens):,.0f}" if most else "-"
        figures = (
            ("yes" if fits else "no", verdict),
            (f"{most:,}", "sequences at most"),
            (f"{rate} tok/s", "with all of them" + (f", ${dollars:.3f} a million tokens" if dollars else "")),
        )
        said = "".join(f"<p><b>{escape(figure)}</b>{escape(what)}</p>" for figure, what in figures)
        blocks.append(f'<div class="answer c{place % 8}"><h2>{escape(runner.method.name)}</h2>{said}</div>')
    return f'<div class="answers">{"".join(blocks)}</div>'


def _navigation(found: Answer) -> str:
    places = (
        ("bytes", "The cache explained"),
        ("fits", "What fits"),
        ("speed", "How fast"),
        ("breakeven", "Break-even"),
        ("not", "Not modelled"),
    )
    return "<nav>" + "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in places) + "</nav>"


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>'


def _summary(found: Answer) -> str:
    question, model = found.question, found.question.model
    place = found.runners[0].place
    cards = f"{question.num_cards} × {question.card.id}" if question.num_cards > 1 else question.card.id
    facts = (
        ("Model", model.name),
        ("Parameters", f"{model.num_params:,}" if model.num_params else "not known"),
        ("Card", cards),
        ("Weights", f"{place.weight_bits:g} bits each"),
        ("Room for the cache" + (" a card" if question.num_cards > 1 else ""), amount(place.cache_nbytes)),
        ("Context", f"{question.num_tokens:,} tokens"),
        ("Batch", f"{question.batch_size:,}"),
        ("Engine", question.engine),
    )
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return f'<dl class="facts">{items}</dl>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _parts(one: Estimate) -> dict[str, float]:
    parts: dict[str, float] = {name: float(size) for name, size in one.split.items()}
    parts["exact tokens"] = parts.pop("residual", 0.0)
    return parts | {"constant state": float(one.state_nbytes), "index keys": float(one.index_nbytes)}


def _bytes(found: Answer) -> str:
    rows = [(one.method.name, _parts(one)) for one in found.estimates]
    kinds = [kind for kind in rows[0][1] if any(parts.get(kind) for _, parts in rows)]
    base = found.estimates[0].total_nbytes
    a_card = " on each card" if found.question.num_cards > 1 else ""
    return chart.bars(
        "Bytes of the cache by component, a bar a method", f"Bytes by component{a_card}", rows, amount
    ) + table(
        f"Bytes of the cache{a_card}",
        ["method", *(f"{kind}" for kind in kinds), "total", "smaller", "read a step"],
        (
            (
                one.method.name,
                *(amount(parts.get(kind, 0)) for kind in kinds),
                amount(one.total_nbytes),
                f"{base / one.total_nbytes:.2f}×" if one.total_nbytes else "-",
                amount(one.read_nbytes),
            )
            for one, (_, parts) in zip(found.estimates, rows, strict=True)
        ),
    )


def _fits(found: Answer) -> str:
    question = found.question
    tokens, batch = question.num_tokens, question.batch_size
    curves = [
        chart.Line(
            runner.method.name,
            colour,
            tuple((float(n), float(runner.max_batch(n))) for n in _held(found, runner, 1)),
            full=_ends(found, runner, 1),
        )
        for colour, runner in enumerate(found.runners)
    ]
    return table(
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
    ) + chart.lines(
        "Largest batch by context, a line a method",
        "tokens a sequence",
        "Largest batch (a cross: memory ends)",
        curves,
        here=tokens,
    )


def _held(found: Answer, runner: Runner, batch: int) -> list[int]:
    """The contexts of a curve: those that fit, and the longest that does where it is shorter than the chart."""
    most = runner.max_context(batch)
    held = [n for n in found.contexts if n <= most]
    return [*held, most] if held and held[-1] < most < found.contexts[-1] else held


def _ends(found: Answer, runner: Runner, batch: int) -> bool:
    return runner.max_context(batch) < found.contexts[-1]


def _speed(found: Answer) -> str:
    question = found.question
    tokens, batch = question.num_tokens, question.batch_size

    def curve(runner: Runner, banded: bool) -> chart.Line:
        bands = [(float(n), runner.seconds(batch, n)) for n in _held(found, runner, batch)]
        points = tuple((n, batch / band.value) for n, band in bands)
        return chart.Line(
            runner.method.name,
            found.runners.index(runner),
            points,
            tuple((n, batch / band.high, batch / band.low) for n, band in bands) if banded else (),
            full=_ends(found, runner, batch),
        )

    price = [f"Money: {question.price.label}." if question.price else f"No price of {question.card.id} is listed."]
    return table(
        f"Decode at {tokens:,} tokens",
        [
            "method",
            "ms a token",
            "low to high",
            "bound by",
            f"tok/s at batch {batch:,}",
            "tok/s, all that fits",
            "$/Mtok",
        ],
        (
            (
                runner.method.name,
                milliseconds(step.seconds.value),
                f"{milliseconds(step.seconds.low)} to {milliseconds(step.seconds.high)}",
                step.bound,
                f"{runner.rate(batch, tokens):,.0f}",
                f"{runner.best_rate(tokens):,.0f}",
                f"{_dollars(runner, tokens, question):.3f}" if _dollars(runner, tokens, question) else "-",
            )
            for runner in found.runners
            for step in (runner.step(batch, tokens),)
        ),
        f"Predictions with the range that nine in ten measurements fell into. {price[0]}",
    ) + chart.lines(
        "Tokens a second by context, with the first method's band",
        "tokens a sequence",
        f"Tokens a second at batch {batch:,} (shaded: low to high of {found.runners[0].method.name})",
        [curve(runner, runner is found.runners[0]) for runner in found.runners],
        here=tokens,
    )


def _breakeven(found: Answer) -> str:
    if not found.speed:
        return "<p>Only one method was chosen: nothing to compare.</p>"
    base, batch = found.runners[0], found.question.batch_size

    def ratio(runner: Runner) -> chart.Line:
        held = [n for n in found.contexts if n <= runner.max_context(batch)]
        gains = tuple((float(n), base.seconds(batch, n).value / runner.seconds(batch, n).value) for n in held)
        return chart.Line(runner.method.name, found.runners.index(runner), gains)

    def worth(runner: Runner) -> chart.Line:
        rates = [(float(n), runner.best_rate(n), base.best_rate(n)) for n in found.contexts]
        gains = tuple((n, mine / other) for n, mine, other in rates if mine and other)
        return chart.Line(runner.method.name, found.runners.index(runner), gains)

    others = found.runners[1:]
    charts = (
        chart.lines(
            f"Speed against {base.method.name} by context",
            "tokens a sequence",
            f"Times as fast as {base.method.name}, batch {batch:,}",
            [ratio(runner) for runner in others],
            [chart.Rule(1.0, "as fast")],
            log_y=False,
            here=found.question.num_tokens,
        ),
        chart.lines(
            f"Tokens a dollar against {base.method.name} by context",
            "tokens a sequence",
            f"Times the tokens a dollar of {base.method.name}, each with all that fits",
            [worth(runner) for runner in others],
            [chart.Rule(1.0, "as cheap")],
            log_y=False,
            here=found.question.num_tokens,
        ),
    )
    rows = (
        (speed.method.name, _pays(speed), _pays(money), f"{speed.last:,}", f"{speed.against_last:,}")
        for speed, money in zip(found.speed, found.money, strict=True)
    )
    heads = [
        "method",
        f"faster at batch {batch:,}",
        "cheaper",
        f"fits to, batch {batch:,}",
        f"{base.method.name} fits to",
    ]
    note = (
        "Tokens a sequence from which a step is 1 % shorter, and from which a token is 1 % cheaper, each method with "
    )
    note += "the largest batch that fits; solved to the token."
    return f"{''.join(charts)}" + table(f"Break-even against {base.method.name}", heads, rows, note)


def _pays(row: BreakEven) -> str:
    if not row.last:
        return "does not fit"
    if row.first == 1:
        return "always"
    if row.first is not None:
        return f"from {row.first:,}"
    return "never" if not row.pays else "; ".join(f"{start:,} to {end:,}" for start, end in row.pays)


def _limits(found: Answer) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in NOT_MODELLED["page"])}</ul>'


def link(parameters: Sequence[tuple[str, str]]) -> str:
    """A query string that leads to the same page."""
    return "?" + urlencode(parameters)


@cache
def asset(name: str) -> str:
    """A file that lies beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def document(title: str, body: str, script: str = "", nonce: str = "") -> str:
    """A whole page: style inline, nothing fetched."""
    word = f' nonce="{nonce}"' if nonce else ""
    code = f"<script{word}>{script}</script>" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{asset("page.css")}</style></head>'
        f"<body><main>{body}</main>{code}</body></html>\n"
    )


def report(found: Answer) -> str:
    """``kvsim report``: the whole file."""
    title = f"{found.question.model.name} on {found.question.card.id}"
    return document(f"kvsim: {title}", f"<header><h1>{escape(title)}</h1></header>{sections(found)}", asset("copy.js"))


def question_price(card: Hardware, num_cards: int) -> Price | None:
    """The lowest listed price, for :class:`Question`."""
    return lowest(card.id, num_cards)
