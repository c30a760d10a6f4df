"""The report is one well-formed file that fetches nothing, and shows the numbers of the other commands."""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from weakref import ref

import pytest

from kvsim import breakeven, chart, parallel
from kvsim.breakeven import Runner, by_context
from kvsim.cli import run
from kvsim.engines import ENGINES
from kvsim.estimate import estimate
from kvsim.hardware import find_hardware
from kvsim.load import load_model
from kvsim.methods import Kivi, make_method
from kvsim.methods.place import _placed
from kvsim.page import Question, amount, answer, report
from kvsim.roofline import method_width

COMMAND = ["report", "--model", "llama-3.1-8b", "--gpu", "h100-sxm"]
VOID = {"meta", "link", "input", "br"}


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
        assert self.stack.pop() == tag

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
    assert tree.addresses == ["data:,"]
    assert not re.search(r"@import|url\(|<script|http", html)
    assert {"svg", "table", "style", "figure", "h1", "h2"} <= set(tree.tags)
    assert html.startswith("<!doctype html>")
    assert 'name="viewport"' in html


def test_charts_have_names_and_tables_captions(html: str) -> None:
    tree = parse(html)
    assert tree.tags.count("figure") == html.count('role="img" aria-label="') == 5
    assert tree.tags.count("caption") == tree.tags.count("table") == 4
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
        patch.setattr(parallel, "stages", counted("stages", parallel.stages))
        patch.setattr(kind, "parts", counted("parts", kind.parts))
        patch.setattr(breakeven, "decode_step", counted("steps", breakeven.decode_step))
        report(answer(asked))
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


def test_what_was_typed_is_escaped() -> None:
    model, card = load_model("gpt2"), find_hardware("h100-sxm")
    from dataclasses import replace

    evil = replace(model, name="<script>alert(1)</script>")
    found = answer(Question(evil, card, (make_method("fp16"), make_method("fp8")), 512, 1))
    assert "<script" not in report(found)


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
    points = re.search(r'polyline[^>]*points="([^"]+)"', svg)[1]
    for point in points.split():
        x, y = map(float, point.split(","))
        assert chart.LEFT - 0.1 <= x <= chart.WIDTH
        assert chart.TOP - 0.1 <= y <= chart.HEIGHT - chart.BOTTOM + 0.1


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "missing" / "report.html"
    assert run(["report", "--model", "gpt2", "--gpu", "h100-sxm", "--out", str(path)]) == 2
    assert capsys.readouterr().err == f"kvsim: error: cannot write {path}: No such file or directory\n"
