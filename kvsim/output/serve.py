"""``kvsim serve``: the page of :mod:`kvsim.output.page` under a form, on this machine.

Everything that the page shows is in its query string, so its address is a link to share.  Models come from the
catalogue, or are the one that the command was given: a request cannot make the server read files.
"""

from __future__ import annotations

import re
import secrets
from asyncio import Lock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from kvsim import catalog
from kvsim.engines import ENGINES
from kvsim.hardware import given
from kvsim.methods.defaults import DEFAULT_SPECS, EXAMPLES
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.output.page import Answer, Question, answer, as_json, asset, document, link, question_price, sections
from kvsim.specs import card_and_count, choose_methods, parse_card, parse_reserve, parse_serving, parse_size

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BITS = ("", "16", "8", "4")
MAX_METHODS = 8
MAX_LENGTH = 400
"""Characters of a field, and of an error."""
MAX_TOKENS = 1 << 30
MAX_BATCH = 1 << 20
LONG_WORD = re.compile(r"\S{80,}")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
LEFT = 499
"""Status of a request whose client has left; nobody reads it."""
Shown = TypeVar("Shown", dict[str, Any], tuple[str, str])
HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class FormFields:
    """The form's fields, as text."""

    model: str = "llama-3.1-8b"
    gpu: str = "h100-sxm"
    cards: str = "1"
    method: tuple[str, ...] = DEFAULT_SPECS["page"]
    more: str = ""
    ctx: str = "32k"
    batch: str = "8"
    weight_bits: str = ""
    engine: str = "ideal"
    reserve: str = ""
    price: str = ""

    @classmethod
    def from_query(cls, pairs: Sequence[tuple[str, str]], default: FormFields) -> tuple[FormFields, str]:
        """The fields of a query string, and what is wrong with it (empty: nothing); without what is wrong, the others
        stand.  Fields that it lacks are ``default``'s."""
        known = cls.__dataclass_fields__
        fields, methods, wrong = dict(vars(default)), [], []
        given: set[str] = set()
        for name, text in pairs:
            value = text.strip()
            if name not in known:
                wrong.append(f"unknown parameter {name[:40]!r}: allowed are {', '.join(known)}")
            elif len(value) > MAX_LENGTH and value != fields[name]:
                wrong.append(f"{name} of {len(value):,} characters: allowed are up to {MAX_LENGTH}")
            elif name == "method":
                methods.append(value)
            elif name in given:
                wrong.append(f"{name} is given twice: {fields[name]!r} and {value!r}")
            else:
                fields[name] = value
            given.add(name)
        if given & {"method", "more"}:  # the form always sends "more": no method was ticked
            fields["method"] = tuple(methods)
        return cls(**fields), wrong[0] if wrong else ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query string's pairs."""
        out = []
        for name, value in vars(self).items():
            out += [(name, each) for each in value] if isinstance(value, tuple) else [(name, value)]
        return out

    def question(self, own: dict[str, Model]) -> Question:
        """The question asked.  Raises ``ValueError`` or ``LookupError`` for a field that means nothing."""
        model = own.get(self.model) or _catalogued(self.model)
        counted = card_and_count(self.gpu)[1] is not None
        card, count = parse_card(self.gpu if counted or not self.cards else f"{self.gpu}:{self.cards}")
        if counted and self.cards not in ("", "1", str(count)):
            raise ValueError(f"gpu {self.gpu!r} and cards {self.cards!r}: give the number of cards once")
        specs = [*self.method, *_specs(self.more)]
        if not specs:
            raise ValueError("choose a method")
        if len(specs) > MAX_METHODS:
            raise ValueError(f"{len(specs)} methods: allowed are up to {MAX_METHODS}")
        tokens, batch = parse_size(self.ctx, "context"), parse_size(self.batch, "batch")
        for what, size, most in (("context", tokens, MAX_TOKENS), ("batch", batch, MAX_BATCH)):
            if size > most:
                raise ValueError(f"{what} {size:,}: allowed are up to {most:,}")
        parse_serving(self.engine, card)
        bits = _number(self.weight_bits, "weight bits", 64)
        price = _number(self.price, "price", 1e6)
        return Question(
            model,
            card,
            tuple(choose_methods(specs, {}, None)[0]),
            tokens,
            batch,
            count or 1,
            bits,
            self.engine,
            parse_reserve(self.reserve) if self.reserve else None,
            question_price(card, count or 1) if price is None else given(card.id, price),
            tuple(specs),
            self.model,
        )


def _catalogued(name: str) -> Model:
    if catalog.find("models", name) is None:
        raise LookupError(catalog.unknown("models", "model", name, "kvsim models"))
    return load_model(name)


def _specs(text: str) -> list[str]:
    """Methods with spaces or semicolons between them (their options have the commas)."""
    return text.replace(";", " ").split()


def _number(text: str, what: str, most: float) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= most:
        raise ValueError(f"{what} {text!r}: allowed are numbers above 0 to {most:g}")
    return number


def form(asked: FormFields, own: Sequence[str]) -> str:
    """The form with what was asked."""
    models = [*own, *(row["id"] for row in catalog.rows("models"))]
    cards = [row["id"] for row in catalog.rows("hardware")]
    checks = "".join(
        f'<label><input type="checkbox" name="method" value="{escape(spec)}"{" checked" * (spec in asked.method)}>'
        f"{escape(spec)}</label>"
        for spec in dict.fromkeys((*asked.method, *DEFAULT_SPECS["page offers"]))
    )
    return (
        '<form method="get" action="/" aria-label="What to weigh">'
        + _listed("model", "Model", asked.model, models)
        + _listed("gpu", "Card", asked.gpu, cards)
        + _typed("cards", "Cards that share it", asked.cards, "numeric")
        + _typed("ctx", "Context, tokens", asked.ctx)
        + _typed("batch", "Batch, sequences", asked.batch)
        + _chosen(
            "weight_bits",
            "Weights",
            asked.weight_bits,
            [(bits, f"{bits} bits" if bits else "as the config says") for bits in BITS],
        )
        + _chosen("engine", "Engine", asked.engine, [(name, name) for name in ENGINES])
        + _typed("reserve", "Memory held back", asked.reserve, "text", "10%, or the engine's")
        + _typed("price", "Dollars a card-hour", asked.price, "decimal", "list price")
        + '<fieldset class="wide"><legend>Methods; the others are compared with the first</legend>'
        + f'<div class="checks">{checks}</div></fieldset>'
        + _typed("more", "More methods", asked.more, "text", " ".join(EXAMPLES))
        + "<button>Weigh</button></form>"
    )


def _typed(name: str, label: str, value: str, mode: str = "text", hint: str = "", more: str = "") -> str:
    wide = " long" if name in ("model", "more") else ""
    return (
        f'<label class="field{wide}">{escape(label)}<input name="{name}" value="{escape(value)}" inputmode="{mode}" '
        f'placeholder="{escape(hint)}" autocomplete="off" spellcheck="false"{more}></label>'
    )


def _listed(name: str, label: str, value: str, names: Sequence[str]) -> str:
    options = "".join(f'<option value="{escape(each)}">' for each in names)
    return _typed(name, label, value, more=f' list="{name}s"') + f'<datalist id="{name}s">{options}</datalist>'


def _chosen(name: str, label: str, value: str, options: Sequence[tuple[str, str]]) -> str:
    more = [] if value in dict(options) else [(value, value)]
    items = "".join(
        f'<option value="{escape(each)}"{" selected" * (each == value)}>{escape(text)}</option>'
        for each, text in (*options, *more)
    )
    return f'<label class="field">{escape(label)}<select name="{name}">{items}</select></label>'


def app(default: FormFields | None = None, own: dict[str, Model] | None = None) -> Starlette:
    """The web application: ``/`` is the page, ``/api`` the same as JSON.

    ``own``: models beyond the catalogue, by the name that the form shows.  Answers are computed one after the other
    (they are Python's work alone), none for a client that has left before its turn.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    first, models = default or FormFields(), own or {}
    turn = Lock()

    async def computed(request: Request, show: Callable[[Answer], Shown]) -> tuple[FormFields, Shown | str] | None:
        """What was asked, and what it shows or what is wrong with it; ``None``: nobody waits any more."""
        async with turn:
            if await request.is_disconnected():
                return None
            return await run_in_threadpool(_computed, request.query_params.multi_items(), first, models, show)

    async def page(request: Request) -> Response:
        done = await computed(request, _shown)
        if done is None:
            return Response(status_code=LEFT)
        asked, found = done
        if isinstance(found, str):
            status, heading = 400, "What a cache costs"
            body = f'<p class="error" role="alert">{_offered(found, asked)}</p>'
        else:
            status, (heading, body) = 200, found
        nonce = secrets.token_urlsafe(12)
        header = f"<header><h1>{escape(heading)}</h1></header>"
        share = f'<p class="note"><a href="{escape(link(asked.pairs))}">Link to this page</a></p>'
        html = document(
            f"kvsim: {heading}",
            f'{header}{form(asked, list(models))}<div id="result" aria-live="polite">{body}{share}</div>',
            asset("page.js") + asset("copy.js").replace('"use strict";\n', ""),
            nonce,
        )
        policy = f"{POLICY}; script-src 'nonce-{nonce}'"
        return HTMLResponse(html, status, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    async def api(request: Request) -> Response:
        done = await computed(request, as_json)
        if done is None:
            return Response(status_code=LEFT)
        asked, found = done
        if isinstance(found, str):
            return JSONResponse({"schema": "kvsim.page/1", "inputs": vars(asked), "error": found}, 400)
        return JSONResponse(found)

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[host.strip("[]") for host in HOSTS] + ["[::1]"])
    return Starlette(routes=[Route("/", page), Route("/api", api)], middleware=[hosts])


def _offered(error: str, asked: FormFields) -> str:
    """An error as HTML; the change that it names (``cards=8``) is a link to the same question with it."""
    change = re.search(r"\bcards=(\d+)", error)
    if change is None:
        return escape(error)
    address = link(replace(asked, gpu=card_and_count(asked.gpu)[0], cards=change[1]).pairs)
    before, after = error[: change.start()], error[change.end() :]
    return f'{escape(before)}<a href="{escape(address)}">{change[0]}</a>{escape(after)}'


def _shown(found: Answer) -> tuple[str, str]:
    """The page's heading and body."""
    return f"{found.question.model.name} on {found.question.card.id}", sections(found)


def _computed(
    pairs: Sequence[tuple[str, str]], first: FormFields, models: dict[str, Model], show: Callable[[Answer], Shown]
) -> tuple[FormFields, Shown | str]:
    asked, wrong = FormFields.from_query(pairs, first)
    if wrong:
        return asked, _cut(wrong)
    try:
        return asked, show(answer(asked.question(models)))
    except OverflowError:
        return asked, "a number is too large: its bytes or seconds cannot be computed"
    except (ValueError, LookupError) as error:
        if isinstance(error, KeyError | IndexError):
            raise  # a fault of ours
        return asked, _cut(str(error))


def _cut(line: str) -> str:
    """An error in a line of moderate length: of a long word its ends, so that what is allowed is still read."""
    line = LONG_WORD.sub(lambda word: f"{word[0][:40]}...{word[0][-8:]}", line)
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH - 4]} ..."


def serve(application: Starlette, host: str, port: int) -> None:
    """Answers until it is interrupted."""
    import uvicorn

    uvicorn.run(application, host=host, port=port, log_level="warning")
