"""The report is one well-formed file that fetches nothing, and shows the numbers of the other commands."""

from __future__ import annotations

import csv
import gc
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape, unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from weakref import ref

import pytest

from kvsim import catalog
from kvsim.analysis import breakeven
from kvsim.analysis.breakeven import Runner, by_context
from kvsim.analysis.plan import NoRoomError
from kvsim.cli import run
from kvsim.engines import ENGINES
from kvsim.hardware import find_hardware, given
from kvsim.latency.roofline import method_width
from kvsim.memory import sharding
from kvsim.memory.estimate import estimate
from kvsim.methods import Full, Kivi, make_method
from kvsim.methods.by_layer import _placed
from kvsim.models.load import load_model
from kvsim.output import chart
from kvsim.output.page import cache, question
from kvsim.output.page.deployment import answer
from kvsim.output.page.document import TAB, found, panel, report
from kvsim.output.page.form import FormFields, form
from kvsim.output.page.question import TABS, Question, command_line
from kvsim.output.page.table import amount, table

COMMAND = ["report", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"]
VOID = {"meta", "link", "input", "br", "option"}


class Tree(HTMLParser):
    """Checks that tags close in order; gathers tags, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(html: str) -> Tree:
    tree = Tree()
    tree.feed(html)
    tree.close()
    assert not tree.stack
    return tree


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "r.html"
    assert run([*COMMAND, "--out", str(path)]) == 0
    return path.read_text(encoding="utf-8")


def test_it_is_one_file_that_fetches_nothing(html: str) -> None:
    tree = parse(html)
    assert all(address.startswith(("data:", "#")) for address in tree.addresses)
    assert not re.search(r"@import|url\(|<script[^>]|https?:|fetch\(", html)
    assert all(f'id="{address[1:]}"' in html for address in tree.addresses if address.startswith("#"))
    assert {"svg", "table", "style", "figure", "h1", "h2"} <= set(tree.tags)
    assert html.startswith("<!doctype html>")
    assert 'name="viewport"' in html


def test_charts_have_names_and_tables_captions(html: str) -> None:
    tree = parse(html)
    drawn = re.findall(r'<svg class="\w+ (\w+)" viewBox="[^"]+" role="group" aria-label="', html)
    assert drawn.count("wide") == drawn.count("narrow") == tree.tags.count("figure") == 8
    assert tree.tags.count("caption") == tree.tags.count("table") > 8
    assert "prefers-color-scheme:dark" in html


def test_its_numbers_are_those_of_the_other_rooms(html: str) -> None:
    model, card = load_model("llama-3.1-8b"), find_hardware("h100-sxm")
    text = parse(html).text
    for name in ("fp16", "fp8"):
        one = estimate(model, make_method(name), 8, 32768)
        assert amount(one.total_nbytes) in text
        runner = Runner(model, make_method(name), card)
        assert f"{runner.max_batch(32768):,}" in text
        assert f"{runner.max_context(8):,}" in text
        assert f"{runner.rate(8, 32768):,.0f}" in text
    row = by_context(Runner(model, make_method("fp8"), card), Runner(model, make_method("fp16"), card), 8)
    assert f"{row.first:,}" in text


def test_json(capsys) -> None:
    assert run([*COMMAND, "--json", "--method", "bf16", "--method", "kivi"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "kvsim.page/1"
    first, second = document["rows"]
    assert first["nbytes"] == estimate(load_model("llama-3.1-8b"), make_method("bf16"), 8, 32768).nbytes
    assert first["faster_from_ctx"] is None
    assert second["cheaper_from_ctx"] is not None
    assert second["max_batch"] > first["max_batch"]


def test_hybrids_latents_and_several_cards(tmp_path: Path, capsys) -> None:
    for model, gpu, more in (
        ("qwen3-next-80b-a3b-instruct", "h200-sxm:2", []),
        ("deepseek-v3", "h200-sxm:8", ["--weight-bits", "8", "--method", "bf16", "--method", "fp8"]),
    ):
        out = tmp_path / "a.html"
        assert run(["report", "--model", model, "--gpu", gpu, "--out", str(out), *more]) == 0, capsys.readouterr().err
        tree = parse(out.read_text(encoding="utf-8"))
        assert "on each card" in tree.text
    assert "constant state" not in tree.text


@pytest.mark.parametrize(
    ("model", "cards", "engine", "names"),
    [
        ("qwen3-32b", 4, "ideal", ("fp16", "fp8", "kivi", "int4")),
        ("qwen3-32b", 4, "vllm", ("fp16", "fp8", "int8")),
        ("llama-3.1-8b", 1, "ideal", ("fp16", "fp8", "kivi", "int4")),
    ],
)
def test_an_answer_calls_what_costs_seldom(model: str, cards: int, engine: str, names: tuple[str, ...]) -> None:
    """Splitting a model and weighing its cache: 16,000 times each once, with seconds for it."""
    calls: Counter[str] = Counter()
    kind = type(ENGINES[engine]())

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            calls[name] += 1
            return function(*given, **more)

        return call

    asked = Question(
        load_model(model), find_hardware("h100-sxm"), tuple(map(make_method, names)), 32768, 8, cards, engine=engine
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "stages", counted("stages", sharding.stages))
        patch.setattr(kind, "parts", counted("parts", kind.parts))
        patch.setattr(breakeven, "decode_step", counted("steps", breakeven.decode_step))
        panel(asked, answer(asked))
    assert calls["stages"] <= len(names) + 1
    assert 0 < calls["parts"] <= 2500
    assert 0 < calls["steps"] <= 1500


def test_a_question_leaves_nothing_behind() -> None:
    """A server answers for months: what an answer remembers goes with it, and what is kept longer is bounded."""
    kept = [_placed, Kivi.record, method_width]
    assert all(memo.cache_parameters()["maxsize"] for memo in kept)
    model, card = load_model("gpt2"), find_hardware("h100-sxm")
    found = answer(Question(model, card, (make_method("fp16"), make_method("fp8")), 512, 1))
    gone = ref(found.runners[0])
    del found
    gc.collect()
    assert gone() is None


FIELDS: list[dict[str, Any]] = [
    {},
    {"model": "QWEN3-32B", "gpu": "H100-SXM", "cards": "4"},
    {"tab": "deployment", "model": "qwen3-32b", "gpu": "h100-sxm:4", "method": ("fp16",)},
    {"tab": "breakeven", "ctx": "1M", "batch": "3", "weight_bits": "4.123456789"},
    {
        "tab": "deployment",
        "engine": "vllm:block_size=32, max_num_seqs=64",
        "method": ("fp16", "fp8"),
        "reserve": "7.5%",
    },
    {"tab": "plan", "engine": "llama.cpp", "method": ("q8_0", "q4_0"), "reserve": "0", "price": "0.1"},
    {"tab": "cache", "method": (), "more": "bf16; paged:block_size=16,inner=(kivi:nbits=4) mix", "price": "1e-05"},
    {
        "tab": "breakeven",
        "method": ("kivi:nbits=3, group_size=64",),
        "more": "fp32",
        "gpu": "l40s",
        "price": "12.345678901",
    },
    {"tab": "plan", "gpus": "l40s:2, mi300x:1", "users": "7", "input_len": "3k", "output_len": "100"},
    {"tab": "plan", "users": "", "input_len": "", "output_len": "", "slo_tpot": "33.3333333 ms", "slo_ttft": ""},
    {"tab": "plan", "model": "llama-3.1-405b", "slo_tpot": "1ms", "slo_ttft": "1 ms"},
    {"tab": "cache", "model": "deepseek-v3.2", "ctx": "8k", "batch": "2"},
]


def commanded(html: str, place: int = 0) -> list[str]:
    """The words of one of the footer's commands."""
    words = shlex.split(unescape(re.findall(r"<code>([^<]*)</code>", html)[place]))
    assert words[0] == "kvsim"
    return words[1:]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: " ".join(fields))
def test_the_footers_commands_give_the_page_and_its_figures(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first writes the panel to the letter, and the same JSON; the second is the tab's own command."""
    asked = FormFields(**fields).question({})
    answered = found(asked)
    html, document = panel(asked, answered), json.loads(json.dumps(TAB[asked.tab].as_json(answered)))
    command = commanded(html)
    code = 0 if getattr(answered, "good", True) else 1
    assert command[0] == "report"
    assert run([*command, "--json"]) == code
    assert json.loads(capsys.readouterr().out) == document
    assert run([*command, "--out", str(tmp_path / "r.html")]) == code
    assert html in (tmp_path / "r.html").read_text(encoding="utf-8")
    if asked.tab != "deployment":
        capsys.readouterr()
        assert run([*commanded(html, 1), "--json"]) == code
        told = json.loads(capsys.readouterr().out)
        assert told["rows"] == document["rows"]
        assert told["schema"] == document["schema"]


def test_a_reports_own_command_writes_it_again(html: str, tmp_path: Path) -> None:
    shown = re.search(r'<div class="tab first"[^>]*>(.*?)<div class="tab"', html, re.DOTALL)[1]
    assert run([*commanded(shown), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_a_model_of_ones_own_is_named_as_it_was_given(tmp_path: Path, capsys) -> None:
    file = tmp_path / 'it\'s $(mine); "<b>"' / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(catalog.find("models", "gpt2")["config"]), encoding="utf-8")
    fields = FormFields("cache", str(file), method=("fp16", "fp8"), ctx="512")
    asked = fields.question({str(file): load_model(str(file))})
    for place in (0, 1):
        assert run([*commanded(panel(asked, found(asked)), place), "--json"]) == 0
        rows = json.loads(json.dumps(cache.as_json(found(asked))["rows"]))
        assert json.loads(capsys.readouterr().out)["rows"] == rows


def test_every_field_of_the_form_is_in_the_command() -> None:
    other = {"model": "gpt2", "gpu": "h200-sxm", "cards": "2", "method": ("fp16",), "more": "int4", "ctx": "4k"}
    other |= {"batch": "2", "weight_bits": "8", "engine": "vllm", "reserve": "20%", "price": "2", "tab": "cache"}
    other |= {"gpus": "l40s", "users": "3", "input_len": "100", "output_len": "9", "slo_tpot": "", "slo_ttft": "1s"}
    assert other.keys() == FormFields.__dataclass_fields__.keys()
    plain = command_line(FormFields().question({}))
    for name, value in other.items():
        assert command_line(FormFields(**{name: value}).question({})) != plain, name


def test_a_page_of_nothing_typed_names_no_command() -> None:
    asked = Question(load_model("gpt2"), find_hardware("h100-sxm"), (make_method("fp16"),), 512, 1)
    assert "<code>" not in panel(asked, answer(asked))


def test_a_report_opens_at_what_was_asked(tmp_path: Path) -> None:
    """The plan where users are given; a tab that has no answer says why, the others stand."""
    out = tmp_path / "r.html"
    assert run([*COMMAND, "--method", "fp16", "--users", "9", "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    assert '<div class="tab first" id="plan">' in html
    assert 'data-tab="plan" aria-current="page"' in html
    assert "For 9 users, 32,256 input and 512 output tokens." in html
    assert 'id="breakeven"><p class="error">nothing to compare: choose two methods or more</p>' in html
    assert [name for name in TABS if f'id="{name}">' in html] == list(TABS)


HOSTILE = "<x-evil onload=\"a\" onclick='b'>&amp;"


@dataclass(frozen=True)
class Named(Full):
    """A method by a hostile name."""

    label: str = ""

    @property
    def name(self) -> str:
        return f"{HOSTILE}{self.label}"


class Shown(Tree):
    """Every value of an attribute too."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        self.names |= {name for name, _ in attrs}
        self.values += [value or "" for _, value in attrs]


def shown(html: str) -> Shown:
    """Reads HTML in which hostile names are to be text alone."""
    tree = Shown()
    tree.feed(html)
    tree.close()
    assert not tree.stack
    assert "x-evil" not in tree.tags
    assert not {"onload", "onclick"} & tree.names
    assert HOSTILE in tree.text + " ".join(tree.values)
    raw = html.count("<x-evil") + html.count('onload="') + html.count("onclick='")
    assert raw == 0
    assert "&amp;amp;" in html
    return tree


@pytest.mark.parametrize("tab", TABS)
@pytest.mark.parametrize("methods", [1, 3])
def test_what_was_typed_is_escaped(tab: str, methods: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of a model, a card, methods, an engine, a price and notes, wherever the page prints them."""
    monkeypatch.setattr(question, "choose_methods", lambda specs, shared, dtype: ([Named()], False))
    model = replace(load_model("gpt2"), name=HOSTILE, notes=(HOSTILE,))
    card, named = replace(find_hardware("h100-sxm"), id=HOSTILE), (Named(), Named(label="2"), make_method("kivi"))
    price = replace(given(HOSTILE, 2.0), provider=HOSTILE)
    asked = Question(model, card, named[:methods], 2048, 1, price=price, specs=(HOSTILE,), model_spec=HOSTILE, tab=tab)
    if (tab, methods) == ("breakeven", 1):  # nothing to compare: the other tabs stand
        asked = replace(asked, tab="cache")
    answered = found(asked)
    if tab != "plan":  # whose charts ask the engine
        answered.question = replace(asked, engine=HOSTILE)
    assert shown(panel(asked, answered)).text.count(HOSTILE) > 5
    shown(report(asked, answered))


@pytest.mark.parametrize("place", ["caption", "heads", "row", "cell", "note"])
def test_a_table_escapes(place: str) -> None:
    given = {"caption": "c", "heads": ["h", "h"], "row": "r", "cell": "d", "note": "n"}
    given[place] = [HOSTILE, "h"] if place == "heads" else HOSTILE
    shown(table(given["caption"], given["heads"], [(given["row"], given["cell"])], given["note"]))


@pytest.mark.parametrize("place", ["title", "x_name", "y_name", "curve", "rule"])
def test_a_chart_of_lines_escapes(place: str) -> None:
    given = dict.fromkeys(("title", "x_name", "y_name", "curve", "rule"), "a") | {place: HOSTILE}
    curves = [chart.Line(given["curve"], 0, ((1.0, 1.0), (2.0, 2.0)))]
    shown(chart.lines(given["title"], given["x_name"], given["y_name"], curves, [chart.Rule(1.0, given["rule"])]))


@pytest.mark.parametrize("place", ["title", "caption", "row", "part", "total"])
def test_a_chart_of_bars_escapes(place: str) -> None:
    given = dict.fromkeys(("title", "caption", "row", "part", "total"), "a") | {place: HOSTILE}
    rows = [(given["row"], {given["part"]: 1.0})]
    shown(chart.bars(given["title"], given["caption"], rows, lambda amount: given["total"]))


@pytest.mark.parametrize("name", FormFields.__dataclass_fields__)
def test_the_form_escapes(name: str) -> None:
    """In every tab, shown or hidden; a tab that is none never comes so far."""
    if name == "tab":
        assert FormFields.from_query([("tab", HOSTILE)], FormFields())[0].tab == "plan"
        return
    for tab in TABS:
        shown(form(FormFields(tab, **{name: (HOSTILE,) if name == "method" else HOSTILE}), ["gpt2"]))
    shown(form(FormFields(), [HOSTILE]))


@pytest.mark.parametrize(("name", "value"), [("engine", "vllm:block_size=32"), ("weight_bits", "4.5")])
def test_the_form_keeps_what_its_lists_do_not_offer(name: str, value: str) -> None:
    """What the address asked for is still asked for when another field is changed."""
    assert f'<option value="{value}" selected>' in form(FormFields(**{name: value}), [])


@pytest.mark.parametrize(
    "more",
    [
        ["--gpu", "t9"],
        ["--ctx", "0"],
        ["--method", "kiwi"],
        ["--price", "-1"],
        ["--weight-bits", "0"],
        ["--engine", "x"],
    ],
)
def test_bad_input_is_one_line_and_no_file(more: list[str], tmp_path: Path, capsys) -> None:
    assert run([*COMMAND, "--out", str(tmp_path / "r.html"), *more]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_charts_of_nothing_say_so() -> None:
    assert "Nothing to draw" in chart.lines("t", "x", "y", [])
    assert "Nothing to draw" in chart.bars("t", "c", [], str)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (0.3, 0.31), (2, 9000), (1e-3, 1e9)])
@pytest.mark.parametrize("log", [True, False])
def test_axes_hold_their_curves(low: float, high: float, log: bool) -> None:
    svg = chart.lines("t", "x", "y", [chart.Line("a", 0, ((256.0, low), (4096.0, high)))], log_y=log)
    points = re.findall(r'polyline[^>]*points="([^"]+)"', svg)
    for frame, line in zip(chart.FRAMES, points, strict=True):
        for point in line.split():
            x, y = map(float, point.split(","))
            assert frame.left - 0.1 <= x <= frame.end + 0.1
            assert frame.top - 0.1 <= y <= frame.floor + 0.1


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "missing" / "report.html"
    assert run(["report", "--model", "gpt2", "--gpu", "h100-sxm", "--out", str(path)]) == 2
    assert capsys.readouterr().err == f"kvsim: error: cannot write {path}: No such file or directory\n"


def test_the_first_fold_has_the_answers(html: str) -> None:
    """Of each method whether it fits, how many, and how fast with all of them: those of the other rooms."""
    fold = html[html.index('id="deployment"') : html.index('<dl class="facts">')]
    assert fold.count('<div class="answer ') == 4
    model, card = load_model("llama-3.1-8b"), find_hardware("h100-sxm")
    runner = Runner(model, make_method("fp16"), card)
    assert f"<b>{runner.max_batch(32768):,}</b>sequences at most" in fold
    assert f"<b>{runner.best_rate(32768):,.0f} tok/s</b>" in fold
    assert "a million tokens" in fold


def test_every_table_is_there_as_csv_and_json(html: str) -> None:
    """Within the page, cell by cell, and with a button that copies it."""
    tables = re.findall(r'<div class="data">(.*?)</div></div>', html, re.DOTALL)
    assert len(tables) == len(re.findall("<table[ >]", html)) > 12
    for each in tables:
        heads = [unescape(head) for head in re.findall(r'<th scope="col">(.*?)</th>', each)]
        rows = [
            [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", each)[1:]
        ]
        files = dict(re.findall(r'download="[a-z0-9-]+\.(csv|json)" href="data:[a-z/]+;charset=utf-8,([^"]*)"', each))
        assert list(csv.reader(StringIO(unquote(files["csv"])))) == [heads, *rows]
        assert [list(row.values()) for row in json.loads(unquote(files["json"]))] == rows
        assert each.count('class="copy"') == 1
        assert re.findall(r'data-head="(.*?)"', each)[: len(heads) - 1] == [escape(head) for head in heads[1:]]


def test_charts_mark_what_was_asked_and_where_memory_ends(html: str) -> None:
    """In both drawings of each; Tab reaches the columns of both, and says the values of every method there."""
    model, card = load_model("llama-3.1-8b"), find_hardware("h100-sxm")
    assert html.count("asked: 32,768</text>") == 8
    columns = re.findall(r'<g class="column" tabindex="(-?\d)" role="img"><title>([^<]+)</title>', html)
    reached = [said.split("\n") for tab, said in columns if tab == "0"]
    for name in ("fp16", "fp8"):
        runner = Runner(model, make_method(name), card)
        most = runner.max_context(8)
        rate = chart.value(runner.rate(8, most))
        ends = [said for said in reached if said[0] == f"{most:,} tokens"]
        assert sum(f"{name}: {rate}, where memory ends" in said for said in ends) == 2
    asked = [said for said in reached if said[0] == "32,768 tokens"]
    assert len(asked) == 8
    assert all(len(said) == 5 for said in asked[:4])
    assert f"fp16: {chart.value(Runner(model, make_method('fp16'), card).rate(8, 32768))}" in asked[2]
    assert {tab for tab, _ in columns} == {"0", "-1"}


def test_too_little_room_says_how_much_is_missing_and_what_would_do() -> None:
    """What it offers has room, and half of it has none."""
    with pytest.raises(NoRoomError, match=r"GiB are missing for them alone; cards=4 have room$"):
        answer(FormFields(model="llama-3.1-405b", gpu="h200-sxm", weight_bits="8").question({}))
    with pytest.raises(NoRoomError):
        answer(FormFields(model="llama-3.1-405b", gpu="h200-sxm", weight_bits="8", cards="2").question({}))
    answer(FormFields(model="llama-3.1-405b", gpu="h200-sxm", weight_bits="8", cards="4").question({}))
