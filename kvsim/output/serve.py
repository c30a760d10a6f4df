"""``kvsim serve``: the page of :mod:`kvsim.output.page` under a form, on this machine.

Everything that the page shows is in its query string, so its address is a link to share.  Models come from the
catalogue, or are the one that the command was given: a request cannot make the server read files.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from kvsim.models.model import Model
from kvsim.output.page.document import TAB, Check, document, found, heading, link, navigation, panel, script
from kvsim.output.page.form import MAX_LENGTH, FormFields, form
from kvsim.output.page.question import TABS, Question
from kvsim.specs import card_and_count

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LONG_WORD = re.compile(r"\S{80,}")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
LEFT = 499
"""Status of a request whose client has left; nobody reads it."""
LOOK = 0.05
"""Seconds between two looks at whether the client is still there."""
Shown = TypeVar("Shown", dict[str, Any], tuple[str, str])
HOSTS = ("localhost", "127.0.0.1", "[::1]")


class LeftError(Exception):
    """The client has left: nobody waits for the answer."""


def app(default: FormFields | None = None, own: dict[str, Model] | None = None) -> Starlette:
    """The web application: ``/`` is the page, ``/api`` the same as JSON.

    ``own``: models beyond the catalogue, by the name that the form shows.  Answers are computed one after the other
    (they are Python's work alone); one whose client leaves is given up.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    first, models = default or FormFields(), own or {}
    turn = asyncio.Lock()

    async def computed(
        request: Request, show: Callable[[FormFields, Question, Any], Shown]
    ) -> tuple[FormFields, Shown | str] | None:
        """What was asked, and what it shows or what is wrong with it; ``None``: nobody waits any more."""
        gone = Event()
        async with turn:
            if await request.is_disconnected():
                return None
            pairs = request.query_params.multi_items()
            work = asyncio.ensure_future(run_in_threadpool(_computed, pairs, first, models, show, _raises(gone)))
            while not (await asyncio.wait({work}, timeout=LOOK))[0]:
                if await request.is_disconnected():
                    gone.set()
            try:
                return work.result()
            except LeftError:
                return None

    async def page(request: Request) -> Response:
        done = await computed(request, _page)
        if done is None:
            return Response(status_code=LEFT)
        asked, shown = done
        if isinstance(shown, str):
            status, title = 400, "What a cache costs"
            body = f'<p class="error" role="alert">{_offered(shown, asked)}</p>{_without(shown, asked)}'
        else:
            status, (title, body) = 200, shown
        nonce = secrets.token_urlsafe(12)
        tabs = navigation([link(replace(asked, tab=name).pairs) for name in TABS], asked.tab)
        share = f'<p class="note"><a href="{escape(link(asked.pairs))}">Link to this page</a></p>'
        busy = '<p id="busy" role="status" hidden>Computing ... <button type="button">Cancel</button></p>'
        html = document(
            f"kvsim: {title}",
            f'<header><h1>{escape(title)}</h1></header>{tabs}<div id="ask">{form(asked, list(models))}</div>'
            f'<div class="found">{busy}<div id="result" aria-live="polite">{body}{share}</div></div>',
            script("copy.js", "charts.js", "page.js"),
            nonce,
            "asks",
        )
        policy = f"{POLICY}; script-src 'nonce-{nonce}'"
        return HTMLResponse(html, status, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    async def api(request: Request) -> Response:
        done = await computed(request, _object)
        if done is None:
            return Response(status_code=LEFT)
        asked, shown = done
        if isinstance(shown, str):
            schema = f"kvsim.{TAB[asked.tab].schema}/1"
            return JSONResponse({"schema": schema, "inputs": vars(asked), "error": shown}, 400)
        return JSONResponse(shown)

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[host.strip("[]") for host in HOSTS] + ["[::1]"])
    return Starlette(routes=[Route("/", page), Route("/api", api)], middleware=[hosts])


def _raises(gone: Event) -> Check:
    """Ends a work whose client has left."""

    def check() -> None:
        if gone.is_set():
            raise LeftError

    return check


def _page(asked: FormFields, question: Question, answer: Any) -> tuple[str, str]:
    """The page's heading and body; above it what an answer of "no" offers."""
    changes = getattr(answer, "near", None)
    offer = ""
    if changes is not None:
        words = ", ".join(f"{name}={value}" for name, value in changes[1].items())
        offer = f'<p class="near">Ask again with {_link(_changed(asked, changes[1]), words)}.</p>'
    return heading(question), offer + panel(question, answer)


def _object(asked: FormFields, question: Question, answer: Any) -> dict[str, Any]:
    return TAB[question.tab].as_json(answer)


def _changed(asked: FormFields, changes: dict[str, str]) -> FormFields:
    return replace(asked, **changes)  # type: ignore[arg-type]  # no field that is a tuple is offered


def _link(asked: FormFields, words: str) -> str:
    return f'<a href="{escape(link(asked.pairs))}">{escape(words)}</a>'


def _offered(error: str, asked: FormFields) -> str:
    """An error as HTML; the changes that it names (``cards=8``) are a link to the same question with them."""
    named = list(re.finditer(r"\b(cards|weight_bits)=(\d+)", error))
    if not named:
        return escape(error)
    start, end = named[0].start(), named[-1].end()
    changes = {"gpu": card_and_count(asked.gpu)[0]} | {str(each[1]): str(each[2]) for each in named}
    changed = _changed(asked, changes)
    return f"{escape(error[:start])}{_link(changed, error[start:end])}{escape(error[end:])}"


def _without(error: str, asked: FormFields) -> str:
    """Of a query with what is not known, a link to the rest of it."""
    if not error.startswith(("unknown parameter", "tab ")):
        return ""
    return f'<p class="near">{_link(asked, "The same without it")}: what is known of it was kept.</p>'


def _computed(
    pairs: Sequence[tuple[str, str]],
    first: FormFields,
    models: dict[str, Model],
    show: Callable[[FormFields, Question, Any], Shown],
    check: Check,
) -> tuple[FormFields, Shown | str]:
    asked, wrong = FormFields.from_query(pairs, first)
    if wrong:
        return asked, _cut(wrong)
    try:
        question = asked.question(models)
        return asked, show(asked, question, found(question, check))
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
