"""``kvsim serve``: the page of :mod:`kvsim.page` under a form, on this machine.

Everything that the page shows is in its query string, so its address is a link to share.  Models come from the
catalogue, or are the one that the command was given: a request cannot make the server read files.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from kvsim import catalog
from kvsim.engines import ENGINES
from kvsim.load import load_model
from kvsim.model import Model
from kvsim.options import choose_methods, parse_reserve, parse_size
from kvsim.page import Question, answer, as_json, asset, document, link, question_price, sections
from kvsim.prices import given
from kvsim.quantities import parse_card, parse_serving

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

METHODS = ("fp16", "fp8", "int8", "int4", "nvfp4", "q8_0", "q4_0", "kivi:nbits=4", "kivi:nbits=2")
CHOSEN = ("fp16", "fp8", "kivi:nbits=4", "kivi:nbits=2")
BITS = ("", "16", "8", "4")
MAX_METHODS = 8
MAX_TOKENS = 1 << 30
MAX_BATCH = 1 << 20
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Asked:
    """The form's fields, as text."""

    model: str = "llama-3.1-8b"
    gpu: str = "h100-sxm"
    cards: str = "1"
    method: tuple[str, ...] = CHOSEN
    more: str = ""
    ctx: str = "32k"
    batch: str = "8"
    weight_bits: str = ""
    engine: str = "ideal"
    reserve: str = ""
    price: str = ""

    @classmethod
    def from_query(cls, pairs: Sequence[tuple[str, str]], default: Asked) -> Asked:
        """The fields of a query string; those that it lacks are ``default``'s.  Unknown names: ``ValueError``."""
        known = cls.__dataclass_fields__
        unknown = sorted({name for name, _ in pairs} - set(known))
        if unknown:
            raise ValueError(f"unknown parameter {unknown[0][:40]!r}: allowed are {', '.join(known)}")
        fields = vars(default) | {name: value.strip() for name, value in pairs if name != "method"}
        methods = tuple(value for name, value in pairs if name == "method")
        if methods or any(name == "more" for name, _ in pairs):  # the form always sends "more": no method was ticked
            fields["method"] = methods
        return cls(**fields)

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
        card, count = parse_card(f"{self.gpu}:{self.cards}" if self.cards and ":" not in self.gpu else self.gpu)
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


def form(asked: Asked, own: Sequence[str]) -> str:
    """The form with what was asked."""
    models = [*own, *(row["id"] for row in catalog.rows("models"))]
    cards = [row["id"] for row in catalog.rows("hardware")]
    checks = "".join(
        f'<label><input type="checkbox" name="method" value="{escape(spec)}"{" checked" * (spec in asked.method)}>'
        f"{escape(spec)}</label>"
        for spec in dict.fromkeys((*asked.method, *METHODS))
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
        + _typed("more", "More methods", asked.more, "text", "kivi:nbits=3,group_size=64 evict:budget=4096")
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
    items = "".join(
        f'<option value="{escape(each)}"{" selected" * (each == value)}>{escape(text)}</option>'
        for each, text in options
    )
    return f'<label class="field">{escape(label)}<select name="{name}">{items}</select></label>'


def app(default: Asked | None = None, own: dict[str, Model] | None = None) -> Starlette:
    """The web application: ``/`` is the page, ``/api`` the same as JSON.

    ``own``: models beyond the catalogue, by the name that the form shows.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    first, models = default or Asked(), own or {}

    async def page(request: Request) -> Response:
        status, body, heading, asked = await run_in_threadpool(_page, request.query_params.multi_items(), first, models)
        nonce = secrets.token_urlsafe(12)
        header = f"<header><h1>{escape(heading)}</h1></header>"
        share = f'<p class="note"><a href="{escape(link(asked.pairs))}">Link to this page</a></p>'
        html = document(
            f"kvsim: {heading}",
            f'{header}{form(asked, list(models))}<div id="result" aria-live="polite">{body}{share}</div>',
            asset("page.js"),
            nonce,
        )
        policy = f"{POLICY}; script-src 'nonce-{nonce}'"
        return HTMLResponse(html, status, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    async def api(request: Request) -> Response:
        try:
            asked = Asked.from_query(request.query_params.multi_items(), first)
            return JSONResponse(await run_in_threadpool(lambda: as_json(answer(asked.question(models)))))
        except (ValueError, LookupError) as error:
            if isinstance(error, KeyError | IndexError):
                raise
            return JSONResponse({"schema": "kvsim.page/1", "error": str(error)}, 400)

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[host.strip("[]") for host in HOSTS] + ["[::1]"])
    return Starlette(routes=[Route("/", page), Route("/api", api)], middleware=[hosts])


def _page(pairs: Sequence[tuple[str, str]], first: Asked, models: dict[str, Model]) -> tuple[int, str, str, Asked]:
    """Status, body, heading, and what was asked."""
    asked = first
    try:
        asked = Asked.from_query(pairs, first)
        question = asked.question(models)
        body = sections(answer(question))
    except (ValueError, LookupError) as error:
        if isinstance(error, KeyError | IndexError):
            raise
        return 400, f'<p class="error" role="alert">{escape(str(error))}</p>', "What a cache costs", asked
    return 200, body, f"{question.model.name} on {question.card.id}", asked


def serve(application: Starlette, host: str, port: int) -> None:
    """Answers until it is interrupted."""
    import uvicorn

    uvicorn.run(application, host=host, port=port, log_level="warning")
