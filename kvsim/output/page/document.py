"""The tabs put together: the parts of a page, and ``kvsim report``'s file with all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from kvsim import __version__
from kvsim.output.not_modelled import NOT_MODELLED
from kvsim.output.page import breakeven, deployment, plan
from kvsim.output.page import cache as explained
from kvsim.output.page.question import TABS, Question, command_line, terminal_command
from kvsim.output.page.table import COPY, all_figures, listed, paragraph, section

Check = Callable[[], None]


@dataclass(frozen=True)
class Tab:
    """How a tab is answered (:func:`kvsim.output.page.deployment.answer` says what ``check`` is), shown, and given as
    JSON; ``schema``: of that.  An answer's ``shown`` are the names of the methods that it did not leave out."""

    answer: Callable[[Question, Check], Any]
    body: Callable[[Any], str]
    as_json: Callable[[Any], dict[str, Any]]
    schema: str


TAB: dict[str, Tab] = {
    "plan": Tab(plan.answer, plan.body, plan.as_json, "plan"),
    "deployment": Tab(deployment.answer, deployment.body, deployment.as_json, "page"),
    "breakeven": Tab(breakeven.answer, breakeven.body, breakeven.as_json, "breakeven"),
    "cache": Tab(explained.answer, explained.body, explained.as_json, "explain"),
}


def never() -> None:
    """Nothing ends the work."""


def found(question: Question, check: Check = never) -> Any:
    """The answer of the question's tab.  Raises as the tab's ``answer`` does."""
    return TAB[question.tab].answer(question, check)


def panel(question: Question, answer: Any) -> str:
    """The HTML of the question's tab, which the command of its footer writes too."""
    tab = TAB[question.tab]
    return "".join(
        (
            tab.body(answer),
            all_figures(f"{TABS[question.tab]} {question.model.name}", tab.as_json(answer)),
            section("Not modelled", listed(NOT_MODELLED[tab.schema])),
            footer(question, answer.shown),
        )
    )


def footer(question: Question, shown: Sequence[str] | None = None) -> str:
    """The version, and the commands that write this page and that print its figures (of the methods ``shown``)."""
    version = paragraph(f"kvsim {__version__}", "note")
    if not question.specs:
        return version
    lines = [("This page as a file", command_line(question))]
    if shown is not None and (printed := terminal_command(question, shown)):
        lines.append(("The figures in a terminal", printed))
    return version + "".join(
        f'<p class="note command">{what}: <code>{escape(command)}</code> {COPY}</p>' for what, command in lines
    )


def heading(question: Question) -> str:
    """What the page is about: the model, and the card where one was chosen."""
    name = question.model.name
    return f"{name} on {question.card.id}" if question.tab in ("deployment", "breakeven") else name


def navigation(addresses: Sequence[str], first: str) -> str:
    """Links to the tabs, the ``first`` marked."""
    marked = {first: ' aria-current="page"'}
    links = "".join(
        f'<a href="{escape(address)}" data-tab="{name}"{marked.get(name, "")}>{escape(title)}</a>'
        for address, (name, title) in zip(addresses, TABS.items(), strict=True)
    )
    return f'<nav class="tabs" aria-label="Tabs">{links}</nav>'


def link(parameters: Sequence[tuple[str, str]]) -> str:
    """A query string that leads to the same page."""
    return "?" + urlencode(parameters)


@cache
def asset(name: str) -> str:
    """A file that lies beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def script(*names: str) -> str:
    """Files of scripts, as one."""
    return "\n".join(["'use strict';", *map(asset, names)])


def document(title: str, body: str, code: str = "", nonce: str = "", kind: str = "") -> str:
    """A whole page: style inline, nothing fetched."""
    word = f' nonce="{nonce}"' if nonce else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{asset("page.css")}</style></head>'
        f'<body><main class="{kind}">{body}</main><script{word}>{code}</script></body></html>\n'
    )


def report(question: Question, answer: Any) -> str:
    """``kvsim report``: the whole file, every tab, the question's own (with its ``answer``) shown first.

    Another tab that has no answer says why.
    """
    panels = []
    for name in TABS:
        asked = replace(question, tab=name)
        first = name == question.tab
        try:
            content = panel(asked, answer if first else found(asked))
        except ValueError as error:
            if first:
                raise
            content = f'<p class="error">{escape(str(error))}</p>{footer(asked)}'
        panels.append(f'<div class="tab{" first" * first}" id="{name}">{content}</div>')
    title = f"{question.model.name} on {question.card.id}"
    head = f"<header><h1>{escape(title)}</h1></header>{navigation([f'#{name}' for name in TABS], question.tab)}"
    return document(f"kvsim: {title}", head + "".join(panels), script("copy.js", "charts.js"), kind="report")
