"""kvsim serve as a person meets it: the real server, over HTTP and in headless Chromium where there is one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qsl, quote, urlencode
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("starlette", reason="starlette (the serve extra) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (the serve extra) is not installed")

from kvsim.cli import run
from kvsim.memory.estimate import estimate
from kvsim.methods import make_method
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.output import serve
from kvsim.output.page.document import found
from kvsim.output.page.form import MAX_LENGTH
from kvsim.output.page.question import TABS
from kvsim.output.serve import app

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a free port, with a model of its own."""
    config = tmp_path_factory.mktemp("own") / "config.json"
    fields = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000, "head_dim": 64}
    config.write_text(json.dumps(fields | {"max_position_embeddings": 4096, "tie_word_embeddings": False}))
    command = [sys.executable, "-m", "kvsim", "serve", "--port", "0", "--json", "--model", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            line = server.stdout.readline()
            document = json.loads(line)
            assert document["schema"] == "kvsim.serve/1"
            address = document["rows"][0]["url"]
            assert address.startswith("http://127.0.0.1:")
            while server.poll() is None:  # bound to be there soon: the address is printed just before
                try:
                    urlopen(address).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield address
        finally:
            server.terminate()
            server.wait()


def get(url: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urlopen(Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


def test_a_page_with_a_form_and_an_answer(url: str) -> None:
    status, html, headers = get(
        url + "?tab=deployment&model=llama-3.1-8b&gpu=h100-sxm&ctx=8k&batch=4&method=fp16&method=fp8"
    )
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "<form" in html
    one = estimate(load_model("llama-3.1-8b"), make_method("fp16"), 4, 8192)
    assert f"{one.nbytes / 2**30:,.2f} GiB" in html
    assert 'value="fp8" checked' in html
    assert 'value="int8" checked' not in html
    assert not re.search(r'(src|href)="http', html)


def test_the_link_leads_to_the_same_page(url: str) -> None:
    _, html, _ = get(url + "?tab=deployment&model=gpt2&gpu=l4&ctx=512&method=bf16&method=fp8&price=0.5")
    link = unescape(re.search(r'<a href="([^"]+)">Link to this page', html)[1])
    _, again, _ = get(url + link)
    strip = re.compile(r'nonce="[^"]+"')
    assert strip.sub("", again) == strip.sub("", html)


def test_the_api_says_the_same(url: str) -> None:
    status, text, _ = get(
        url + "api?tab=deployment&model=llama-3.1-8b&gpu=h100-sxm&ctx=8k&batch=4&method=fp16&method=kivi:nbits=2"
    )
    document = json.loads(text)
    assert (status, document["schema"]) == (200, "kvsim.page/1")
    assert document["rows"][0]["nbytes"] == estimate(load_model("llama-3.1-8b"), make_method("fp16"), 4, 8192).nbytes


def test_a_model_of_ones_own_is_offered(url: str) -> None:
    status, html, _ = get(url + "?tab=deployment&gpu=t4&ctx=1k")
    assert status == 200
    assert "config.json" in html


@pytest.mark.parametrize(
    "query",
    [
        "model=lama-3-8b",
        "model=/etc/passwd",
        "model=../secret",
        "gpu=h1000",
        "ctx=0",
        "ctx=9999999M",
        "batch=-1",
        "cards=x",
        "method=kiwi",
        "more=" + quote("<script>alert(1)</script>"),
        "weight_bits=999",
        "price=free",
        "reserve=200%25",
        "engine=x",
        "model=gpt2&more=",
        "shape=round",
        "model=llama-3-70b&gpu=t4",
        "method=" + "&method=".join(f"kivi:residual_length={32 * n}" for n in range(1, 12)),
    ],
)
def test_bad_input_is_a_line_not_a_trace(url: str, query: str) -> None:
    query = f"tab=deployment&{query}"
    status, html, _ = get(f"{url}?{query}")
    assert status == 400
    alert = re.sub("</?a[^>]*>", "", re.search(r'role="alert">(.*?)</p>', html)[1])
    assert len(alert) > 10
    assert "Traceback" not in html
    assert "<script>alert" not in html
    assert json.loads(get(f"{url}api?{query}")[1])["error"] == unescape(alert)


def called(path: str, pairs: list[tuple[str, str]], own: dict[str, Model] | None = None, gone: bool = False):
    """Status and text of the application's answer to one request, without a server; ``gone``: the client has left."""
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.disconnect"} if gone else {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")]}
    asyncio.run(app(own=own)({**scope, "query_string": urlencode(pairs).encode()}, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *((name, "9" * 400, "allowed") for name in ("batch", "weight_bits", "cards", "price", "reserve", "engine")),
        *((name, "nan", "allowed") for name in ("batch", "weight_bits", "cards", "price", "reserve", "engine")),
        ("reserve", "-inf", "reserve '-inf': allowed are"),
        ("price", "1e999", "price '1e999': allowed are numbers above 0"),
        ("batch", "9" * 5000, "batch of 5,000 characters: allowed are up to 400"),
        ("more", "fp8;" * 200, "more of 800 characters"),
        ("method", "paged:inner=" + "(paged:inner=" * 25 + ")" * 25, "inside one another"),
        ("method", "kivi:nbits=" + "9" * 380, "allowed are whole numbers up to 1,099,511,627,776"),
        ("model", "x" * 400, "unknown model"),
        ("gpu", "x" * 400, "unknown GPU"),
        ("colour", "red", "unknown parameter 'colour': allowed are tab, model"),
        ("ctx", "16k", "ctx is given twice: '8k' and '16k'"),
    ],
)
def test_a_hostile_field_gets_a_short_line_and_the_others_stay(name: str, value: str, said: str) -> None:
    pairs = [("tab", "deployment"), ("ctx", "8k"), *([("reserve", "5%")] if name != "reserve" else [])]
    status, html = called("/", [*pairs, (name, value)])
    alert = unescape(re.search(r'role="alert">([^<]+)<', html)[1])
    assert status == 400
    assert said in alert
    assert len(alert) <= MAX_LENGTH
    assert alert.isprintable()
    for key, kept in pairs:
        assert re.search(f'<input (type="hidden" )?name="{key}" value="{kept}"', html)
    status, text = called("/api", [*pairs, (name, value)])
    document = json.loads(text)
    assert (status, document["schema"], document["error"]) == (400, "kvsim.page/1", alert)
    assert document["inputs"].items() >= dict(pairs).items()


@pytest.mark.parametrize(
    "pair", [("method", "paged:block_size=" + "9" * 370), ("engine", "vllm:block_size=" + "9" * 370)]
)
def test_what_no_float_holds_is_a_line(pair: tuple[str, str]) -> None:
    status, html = called("/", [pair])
    assert status == 400
    assert "allowed are whole numbers up to 1,099,511,627,776" in html


def test_cards_are_counted_once() -> None:
    asked = [("tab", "deployment"), ("gpu", "h100-sxm:2")]
    assert called("/", [*asked, ("cards", "1")])[0] == 200  # as the form sends it
    status, html = called("/", [*asked, ("cards", "4")])
    assert status == 400
    assert "give the number of cards once" in html


@pytest.mark.parametrize("path", ["/", "/api"])
def test_a_client_that_has_left_is_not_computed_for(path: str, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(serve, "found", lambda question, check: asked.append(question) or found(question, check))
    assert called(path, [("model", "gpt2")], gone=True) == (serve.LEFT, "")
    assert asked == []
    assert called(path, [("model", "gpt2")])[0] == 200
    assert len(asked) == 1


def test_what_was_typed_is_escaped() -> None:
    evil = "<x-evil>&amp;"
    own = {evil: replace(load_model("gpt2"), name=evil)}
    for pairs in ([("model", evil)], [("model", evil), ("gpu", evil)], [(evil, evil)], [("method", evil)]):
        html = called("/", pairs, own)[1]
        assert "<x-evil" not in html
        assert "&lt;x-evil" in html
        assert "<h1>&lt;x-evil&gt;&amp;amp;</h1>" in html or pairs[-1] != ("model", evil)
        link = unescape(re.search(r'<a href="([^"]+)">Link to this page', html)[1])
        if pairs[0][0] in ("model", "method"):
            assert pairs[0] in parse_qsl(link[1:], keep_blank_values=True)


def test_other_hosts_are_refused(url: str) -> None:
    assert get(url, Host="evil.example")[0] == 400


def test_a_taken_port_is_one_line(url: str, capsys) -> None:
    assert run(["serve", "--port", url.rsplit(":", 1)[1].strip("/")]) == 2
    assert capsys.readouterr().err.startswith("kvsim: error: port ")


def test_an_error_offers_the_change(url: str) -> None:
    """The link that it offers leads to an answer, with the rest as it was asked."""
    status, body, _ = get(f"{url}?tab=deployment&model=llama-3.1-405b&gpu=h200-sxm&weight_bits=8&method=fp16&ctx=4k")
    assert status == 400
    found = re.search(r'GiB are missing for them alone; <a href="([^"]+)">cards=4</a> have room', body)
    assert found is not None
    status, body, _ = get(url + unescape(found[1]))
    assert status == 200
    assert "4,096 tokens" in body


@pytest.mark.parametrize(
    ("query", "changes"),
    [
        ({"model": "llama-3.1-405b", "slo_tpot": "1ms"}, {"slo_tpot"}),
        ({"model": "llama-3.1-405b", "slo_tpot": "1ms", "slo_ttft": "1ms"}, {"slo_tpot", "slo_ttft"}),
        ({"model": "llama-3.1-405b", "gpus": "h100-sxm:2"}, {"gpus"}),
        ({"model": "llama-3.1-8b", "engine": "llama.cpp"}, None),
    ],
)
def test_a_plan_that_cannot_be_offers_one_that_can(query: dict[str, str], changes: set[str] | None) -> None:
    """And says what it would take; its link leads to a plan."""
    asked = {"tab": "plan", "method": "fp8", "slo_ttft": "", **query}
    status, html = called("/", list(asked.items()))
    assert status == 200
    assert "Nothing meets this demand." in html
    offer = re.search(r'class="near">Ask again with <a href="([^"]+)">([^<]+)</a>', html)
    if changes is None:
        assert offer is None
        return
    assert {each.split("=")[0] for each in offer[2].split(", ")} == changes
    status, html = called("/", parse_qsl(unescape(offer[1])[1:], keep_blank_values=True))
    assert status == 200
    assert "Nothing meets this demand." not in html
    assert "would do: " not in html


def test_what_is_unknown_is_left_out_by_a_link() -> None:
    """The valid ones are kept: the link asks the same without the other."""
    pairs = [("tab", "cache"), ("model", "gpt2"), ("ctx", "1k"), ("colour", "red")]
    status, html = called("/", pairs)
    assert status == 400
    link = unescape(re.search(r'class="near"><a href="([^"]+)">The same without it</a>', html)[1])
    again = parse_qsl(link[1:], keep_blank_values=True)
    assert set(pairs[:-1]) <= set(again)
    assert called("/", again)[0] == 200


@pytest.mark.parametrize("tab", TABS)
def test_an_answer_ends_when_its_client_leaves(tab: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after it: the next one need not wait.  The work asks between two methods whether anybody still waits."""
    looked = []

    def slow(question, check):
        def counted() -> None:
            looked.append(tab)
            while leaving:
                check()

        return found(question, counted)

    leaving = iter([False, False, True])  # there at the turn and at the first look
    monkeypatch.setattr(serve, "found", slow)
    sent: list[dict] = []

    async def receive() -> dict:
        gone = next(leaving, True)
        return {"type": "http.disconnect"} if gone else {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(app()({**scope, "query_string": f"tab={tab}".encode()}, receive, send))
    assert sent[0]["status"] == serve.LEFT
    assert looked == [tab]


HANG = 120_000
"""Milliseconds after which a page hangs, on however slow a machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (768, "dark"), (1920, "light")])
def test_in_a_browser(url: str, browser, width: int, scheme: str) -> None:
    """The form answers as it is changed, the address follows, nothing overflows, nothing is logged or fetched."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(HANG)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url + "?model=llama-3.1-8b&gpu=h100-sxm&ctx=32k&method=fp16&method=fp8")
    for tab in TABS:
        page.click(f"nav.tabs a[data-tab={tab}]")
        page.wait_for_url(f"**tab={tab}**")
        page.wait_for_selector("#result:not([aria-busy])")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        assert page.locator(".answer").first.bounding_box()["y"] < 800  # the first fold has figures
        assert page.locator("svg.wide").first.is_visible() != page.locator("svg.narrow").first.is_visible() or (
            tab == "cache" and not page.locator("figure").count()
        )
    page.click("nav.tabs a[data-tab=deployment]")
    page.wait_for_url("**tab=deployment**")
    page.wait_for_selector("#result:not([aria-busy])")
    assert page.locator("form").is_visible() == (width >= 768)
    if width < 768:
        page.click("summary >> nth=0")
    page.fill("input[name=ctx]", "8k")
    page.press("input[name=ctx]", "Tab")
    page.wait_for_url("**ctx=8k**")
    page.wait_for_selector("#result:not([aria-busy])")
    assert "8,192 tokens" in page.inner_text("#result")
    page.check("input[value=int8]")
    page.wait_for_url("**method=int8**")
    page.wait_for_selector("#result:not([aria-busy])")
    assert "int8" in page.inner_text("#result")
    column = page.locator("svg:visible .column[tabindex='0']").first
    page.mouse.move(0, 0)
    column.focus()
    assert "8,192 tokens" in page.inner_text(".tip")
    page.keyboard.press("ArrowRight")
    assert "8,192 tokens" not in page.inner_text(".tip")
    page.fill("input[name=gpu]", "h1000")
    page.press("input[name=gpu]", "Tab")
    page.wait_for_selector("[role=alert]")
    assert "h1000" in page.inner_text("[role=alert]")
    page.goto(page.url.replace("h1000", "l40s"))  # the address alone is the whole page
    assert "8,192 tokens" in page.inner_text("#result")
    assert "l40s" in page.inner_text("h1")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    assert all(address.startswith((url, "data:")) for address in asked)
    assert [line for line in said if "400" not in line] == []
    context.close()


def test_a_busy_page_says_so_and_can_be_cancelled(url: str, browser) -> None:
    """The answer before stands; what is asked next is answered."""
    context = browser.new_context()
    context.set_default_timeout(HANG)
    page = context.new_page()
    page.goto(url + "?tab=deployment&model=gpt2&gpu=l4&ctx=512")
    page.route("**ctx=64*", lambda route: None)  # never answered
    page.fill("input[name=ctx]", "64")
    page.press("input[name=ctx]", "Tab")
    page.wait_for_selector("#result[aria-busy]")
    assert page.inner_text("#busy").startswith("Computing")
    page.click("#busy button")
    page.wait_for_selector("#result:not([aria-busy])")
    assert not page.locator("#busy").is_visible()
    assert "512 tokens" in page.inner_text("#result")
    page.fill("input[name=ctx]", "128")
    page.press("input[name=ctx]", "Tab")
    page.wait_for_url("**ctx=128**")
    page.wait_for_selector("#result:not([aria-busy])")
    assert "128 tokens" in page.inner_text("#result")
    context.close()


def test_a_file_in_a_browser(browser, tmp_path: Path) -> None:
    """Tabs without a script, a table that is copied, a phone's cards."""
    file = tmp_path / "r.html"
    assert run(["report", "gpt2", "--gpu", "l4", "--ctx", "1k", "--out", str(file)]) == 0
    for scripts in (False, True):
        context = browser.new_context(java_script_enabled=scripts, viewport={"width": 360, "height": 800})
        context.set_default_timeout(HANG)
        page = context.new_page()
        page.goto(file.as_uri())
        assert [tab for tab in TABS if page.locator(f"#{tab}").is_visible()] == ["deployment"]
        page.click("text=Break-even")
        assert [tab for tab in TABS if page.locator(f"#{tab}").is_visible()] == ["breakeven"]
        first = page.locator("#breakeven td").first
        assert first.evaluate("cell => getComputedStyle(cell, '::before').content").startswith('"faster at')
        if scripts:
            page.click("#breakeven button.copy >> nth=0")
            page.wait_for_selector("#breakeven button.copy:has-text('Copied')")
        context.close()


def test_without_script_the_button_does_it(url: str, browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(HANG)
    page = context.new_page()
    page.goto(url + "?tab=deployment&model=gpt2&gpu=l4")
    page.fill("input[name=ctx]", "512")
    page.click("form > button")
    assert "ctx=512" in page.url
    assert "512 tokens" in page.inner_text("#result")
    page.click("nav.tabs a[data-tab=cache]")
    assert "tab=cache" in page.url
    assert "512 tokens" in page.inner_text("#result")
    context.close()
