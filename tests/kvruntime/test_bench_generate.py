"""``bench generate`` without a GPU: a tiny model through the same tasks and tables."""

from __future__ import annotations

import types
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime.bench.engine.suite import Models  # noqa: E402
from kvruntime.bench.generate import calls, grounded, report, rounds, suite  # noqa: E402
from kvruntime.bench.harness import session  # noqa: E402
from kvruntime.bench.harness.results import Results  # noqa: E402
from kvruntime.cli import run as command  # noqa: E402
from kvsim.methods import Kivi  # noqa: E402
from validation.latency import ways  # noqa: E402


def test_a_sitting_on_a_tiny_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(rounds, "LONG", 9)
    monkeypatch.setattr(suite, "TURNS", 2)
    for module in (session, rounds):
        monkeypatch.setattr(module, "release", lambda: None)  # a whole collection of garbage after every call
    folder = tiny_directory(tmp_path / "tiny")
    subject = suite.Subject(str(folder), "float32", ((1, 24), (2, 16)), conversation=20)
    method = Kivi(group_size=32, residual_length=128, dtype="float32")
    own = suite.contenders((method,), False, False, True)
    parts = [*own, suite.Contender("broken", lambda *_: 1 / 0, "hqq", goes_on=False)]
    results = Results(tmp_path / "g.json", {"device": {"name": "here"}})
    kinds = (calls.GREEDY, calls.PADDED, calls.DRAFTED, calls.CONVERSATION)
    turns = rounds.Turns(tmp_path / "lock")
    schedule = suite.Schedule(kinds, 2, turns)
    tasks = suite.subject_tasks(Models("cpu"), subject, parts, suite.Clock("cpu"), schedule, results)
    assert session.carry_out(tasks, results, report.line, report.tables) == 0
    turns.close()
    failed = {(row["method"], row["call"]) for row in results.rows if "failed" in row}
    assert failed == {("broken", call) for call in (*kinds[:3], calls.UNDRAFTED)}
    steps = [row for row in results.rows if row["kind"] == "generate" and "failed" not in row]
    greedy = [(row["method"], row["runs"], row["batch_size"]) for row in steps if row["call"] == "greedy"]
    assert greedy == [(one.name, one.runs, batch) for batch in (1, 2) for one in own]
    beside = [(row["method"], row["prompt"], row["calls_of_model"]) for row in steps if row["call"] == calls.UNDRAFTED]
    random = "64 random tokens, repeated"
    assert beside == [(one.name, random, rounds.LONG) for one in own]
    drafted = [row for row in steps if row["call"] == calls.DRAFTED]
    assert [(row["method"], row["batch_size"], row["prompt"]) for row in drafted] == [
        (one.name, 1, random) for one in own if one.name != report.STOCK[1]
    ]
    assert all(row["first_token_seconds"][0] > 0 and row["beside"] for row in steps)
    timed = {row["method"]: len(row["calls"]) for row in steps}
    assert timed == {report.STOCK[0]: 3, report.STOCK[1]: 2, method.name: 2}
    assert {len(row.get("middle_steps", ())) for row in steps if row["call"] != calls.DRAFTED} == {2}
    assert not any("middle_steps" in row for row in steps if row["call"] == calls.DRAFTED)
    assert {row.get("kernel") for row in steps if row["method"] == method.name} == {"PyTorch reference"}
    talks = [row for row in results.rows if row["kind"] == "conversation"]
    assert [row["method"] for row in talks] == [report.STOCK[0], method.name]
    shown = capsys.readouterr().out
    for words in (
        "of best stock",
        "2 turns on one cache",
        "2 x 16 padded",
        "greedy, broken: ZeroDivisionError",
        f"drafts against none, 1 x 24 of {random}: transformers-dynamic ",
    ):
        assert words in shown


TEMPLATE = "{% for each in messages %}<{{ each.role }}>{{ each.content }}{% endfor %}<assistant>"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_drafted_prompt_asks_for_its_own_prose(tmp_path, template) -> None:
    """Of exactly as many tokens as are asked for: three texts of one length, or as much more as the answer begins
    with."""
    tiny_directory(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = template
    for num_tokens in (600, 601, 602):
        ids = grounded.tokens(tokenizer, num_tokens)
        assert len(ids) == num_tokens
        shown = "".join(tokenizer.convert_ids_to_tokens(ids))
        before, text = shown.split(grounded.AGAIN)[0].split("\n\n", 1)
        assert before.endswith("word for word.")
        text = text.removesuffix("<user>").split("<assistant>" if template else "\n\n" + text[:20])[0]
        assert shown.count(text) == grounded.COPIES - 1 + (not shown.endswith(text))
        assert shown.count(grounded.AGAIN) == grounded.COPIES - 1
    model = types.SimpleNamespace(device="cpu")
    both = [calls.prompt(model, 1, 600, 0, call, tokenizer) for call in (calls.DRAFTED, calls.UNDRAFTED)]
    assert torch.equal(*both)
    assert both[0].tolist() == [grounded.tokens(tokenizer, 600)]
    assert calls.prompt_name(calls.UNDRAFTED, tokenizer) == grounded.name()
    with pytest.raises(ValueError, match="a prompt of 40 tokens that asks for a text again: allowed are "):
        grounded.tokens(tokenizer, 40)
    tokenizer.chat_template = "<user>{{ messages[-3].content }}{{ messages[-1].content }}<assistant>"
    with pytest.raises(ValueError, match="a chat template shows 0 of 3 texts: allowed are those that show all"):
        grounded.tokens(tokenizer, 600)


def test_a_longer_call_is_a_row_of_its_own() -> None:
    """The cache has room for it, steps are timed to its end, and stock caches of other lengths are not beside it."""
    rooms = []
    one = suite.Contender("none", lambda model, room: rooms.append(room))
    entrant = rounds.Entrant(one, calls.GREEDY, (1, 24), 1, 100)

    def clock(model, ids, num_new, cache, call):
        return [0.01 * (at + 1) for at in range(num_new)], ids

    clock.device, clock.steps = "cpu", 100
    entrant.first(clock, None, lambda entrant: None)
    entrant.again(clock, None, lambda entrant: None, 0, 0)
    assert rooms == [124, 124]
    assert entrant.row()["seconds_per_step"] == pytest.approx([0.01] * 3)
    assert entrant.row()["calls_of_model"] == 100


def test_what_was_compiled_of_a_size_is_let_go_before_another(monkeypatch) -> None:
    """torch.compile compiles one function eight times, and then runs it eagerly."""
    begun = []
    monkeypatch.setattr("torch.compiler.reset", lambda: begun.append(True))
    method = Kivi(group_size=32, residual_length=128, dtype="float32")
    one = next(each for each in suite.contenders((method,), True, False) if each.runs and each.package == "kvruntime")
    text = types.SimpleNamespace(vocab_size=8)
    model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: text), device="cpu")
    group = rounds.Group(suite.Clock("cpu"), lambda: (model, None), rounds.Turns(None), 0, lambda *_: None)
    broken = replace(one, cache=Failing(one.cache), around=lambda model: nullcontext())
    group.entrants.append(rounds.Entrant(broken, calls.GREEDY, (1, 8), 1))
    with pytest.raises(ZeroDivisionError):
        group.row(group.entrants[0])
    assert begun == [True]


class Failing:
    """A contender's cache that cannot be made."""

    def __init__(self, cache: Any) -> None:
        self.free = cache.free

    def __call__(self, model: Any, num_tokens: int) -> Any:
        raise ZeroDivisionError


def test_a_conversation_loads_and_compiles_while_nobody_times(tmp_path, monkeypatch) -> None:
    """The lock is shared when the model is loaded, of a second subject's too, and in the turn before those that are
    timed; it is held alone while these are."""
    turns, seen = rounds.Turns(tmp_path / "lock"), []

    class Watched(Models):
        def loaded(self, subject):
            seen.append(turns.shared)
            return types.SimpleNamespace(model=None)

    def clock(model, ids, num_new, cache):
        seen.append(turns.shared)
        return [0.5], ids

    monkeypatch.setattr(session, "release", lambda: None)
    monkeypatch.setattr(suite, "prompt", lambda *_: torch.zeros(1, 1))
    for name in ("llama-3.2-1b", "llama-3-8b"):
        schedule = suite.Schedule((calls.CONVERSATION,), 1, turns)
        subject, parts = suite.SUBJECTS[name], [suite.Contender("none", lambda *_: None)]
        results = Results(tmp_path / f"{name}.json", {"device": {"name": "here"}})
        (task,) = suite.subject_tasks(Watched("cpu"), subject, parts, clock, schedule, results)
        assert task.measure(lambda _: None)["seconds"] == 0.5 * suite.TURNS
    turns.close()
    assert seen == ([True] * 2 + [False] * suite.TURNS) * 2


def test_who_waits_for_another_process_says_so(tmp_path, monkeypatch) -> None:
    """A file opened twice is locked twice, in one process too; the other one ends when it is waited for."""
    ours, theirs, said = rounds.Turns(tmp_path / "lock"), rounds.Turns(tmp_path / "lock"), []
    monkeypatch.setattr(rounds, "say", lambda text: said.append(text) or theirs.close())
    with ours.alone():
        assert said[0] == f"waiting: another process runs first calls or times ({tmp_path / 'lock'})"
        assert said[1].startswith("waited ")
    ours.together()
    ours.close()
    assert len(said) == 2


def test_one_slow_step_moves_the_mean_of_a_first_call_and_not_its_middle() -> None:
    """Tokens a hundredth apart, the first ones and one later one a tenth: what is predicted is the middle."""
    each = [0.1] * rounds.SHORT + [0.01] * (rounds.LONG - rounds.SHORT)
    each[20] = 0.1
    times = [sum(each[: count + 1]) for count in range(rounds.LONG)]
    assert rounds.middle_step(times) == pytest.approx(0.01)
    assert rounds.per_token(times) == pytest.approx(0.01 + 0.09 / 64)
    row = {"package": "transformers", "seconds_per_step": [0.3, 0.1, 0.5], "calls": [0.5, 0.1], "repeats": 1}
    assert [way.seconds[0] for way in ways.ways(row)] == [0.5, 0.1]
    assert [way.seconds[0] for way in ways.ways(row | {"new_length_seconds": 0.4})] == [0.4, 0.1]
    assert [way.seconds[0] for way in ways.ways(row | {"middle_steps": [0.09]})] == [0.5, 0.09]
    ours = row | {"package": "kvruntime", "runs": "", "middle_steps": [0.2]}  # whose steps that pack are no pauses
    assert [way.seconds[0] for way in ways.ways(ours)] == [0.3]


def test_ratios_are_to_the_faster_of_the_stock_caches() -> None:
    same = {
        "kind": "generate",
        "model": "m",
        "weights": "w",
        "dtype": "d",
        "batch_size": 1,
        "num_tokens": 8,
        "runs": "",
    }
    times = dict(zip(report.STOCK, (4e-3, 2e-3), strict=True))
    rows = [{**same, "method": name, "seconds_per_step": [time] * 3} for name, time in times.items()]
    ours = {**same, "method": "kivi-2bit-g64-r64", "seconds_per_step": [1e-3] * 3, "first_call_seconds": 1.0}
    assert report.best_stock(ours, rows) is rows[1]
    assert report.best_stock(ours, rows[:1]) is None
    drafted, undrafted = {"call": calls.DRAFTED, "prompt": "p"}, {"call": calls.UNDRAFTED, "prompt": "p"}
    dynamic, static = rows[0] | drafted, rows[1] | undrafted
    assert report.best_stock(ours | drafted, [dynamic]) is None  # the static cache without drafts may be faster
    assert report.best_stock(ours | drafted, [dynamic, static]) == static  # drafts or not, it is stock
    assert report.best_stock(ours | undrafted, [dynamic, static]) == static
    assert report.best_stock(ours | drafted, [dynamic, static | {"prompt": "q"}]) is None
    assert report.best_stock(ours | {"new_tokens": 256}, rows) is None
    assert report.line(ours, rows).endswith("1.00 ms a step, first call 1.0 s, 2.00x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt3"], "unknown model 'gpt3'"),
        (["--repeats", "0"], "repeats 0"),
        (["--new-tokens", "8"], "new tokens 8: allowed are 9 to 4,096"),
        (["--device", "cpu"], "needs a CUDA"),
    ],
)
def test_refused_in_one_line(arguments, words, capsys) -> None:
    assert command(["bench", "generate", *arguments]) == 2
    assert words in capsys.readouterr().err
