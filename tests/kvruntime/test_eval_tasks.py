"""The tasks: what they ask and how they judge, answers through a cache, the command with its table and picture."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory, tiny_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.quality.report import answers_cells, tables  # noqa: E402
from kvruntime.cli import run  # noqa: E402
from kvruntime.eval.answers import Answerer, before, ended  # noqa: E402
from kvruntime.eval.tasks import (  # noqa: E402
    TASKS,
    Example,
    TaskRequest,
    gsm8k,
    lambada,
    longbench,
    needle,
    ruler,
    task_named,
)
from kvruntime.eval.tasks import longbench_metrics as metrics  # noqa: E402
from kvruntime.eval.tasks.task import NEEDLES_SAY_LITTLE, fitted, share_found  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402

EVAL = Path(__file__).parents[3] / "shared" / "eval"


def asked(**options) -> TaskRequest:
    """Words are tokens."""
    given = {"count": lambda text: len(text.split()), "lengths": (300,), "haystack": "So it goes. And on. " * 400}
    return TaskRequest(**{**given, **options})


def found_in(example: Example) -> list[int]:
    return [example.prompt.find(answer) for answer in example.answers]


@pytest.mark.parametrize("name", ["needle", "passkey"])
def test_needles_lie_where_the_grid_says(name):
    parts = TASKS[name].parts(asked(lengths=(200, 400), depths=3))
    assert [(part.about["length"], part.about["depth"]) for part in parts] == [
        (length, depth) for length in (200, 400) for depth in (0, 0.5, 1)
    ]
    for part in parts:
        assert len(part.examples) == 4
        for example in part.examples:
            assert 0.9 * part.about["length"] < len(example.prompt.split()) <= part.about["length"]
            place = example.prompt.find(example.answers[0]) / len(example.prompt)
            assert abs(place - part.about["depth"]) < 0.3
            assert part.score(f"It is {example.answers[0]}.", example) == 1
            assert part.score("It is 12.", example) == 0
    assert TASKS[name].caveat == NEEDLES_SAY_LITTLE


def test_a_needle_is_drawn_anew_by_the_seed_alone():
    first, again, other = (needle.parts(asked(depths=1, seed=seed))[0] for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert len({example.answers for example in first.examples}) == 4


@pytest.mark.parametrize("kind", ruler.KINDS)
def test_rulers_prompts_hold_their_answers(kind):
    (part,) = [part for part in ruler.parts(asked(lengths=(900,))) if part.about["kind_of"] == kind]
    for example in part.examples:
        assert 0.7 * 900 < len(example.prompt.split()) <= 900
        assert all(place >= 0 for place in found_in(example))
        assert part.score(", ".join(example.answers), example) == 1
        assert part.score("nothing", example) == 0
    assert len({example.prompt for example in part.examples}) == len(part.examples)


def test_rulers_answers_are_the_right_ones():
    """Counted and traced here from the prompts alone."""
    parts = {part.about["kind_of"]: part.examples[0] for part in ruler.parts(asked(lengths=(1200,)))}
    listed = parts["common_words"].prompt.split("\n")[1].split()[1::2]
    most = sorted(set(listed), key=listed.count, reverse=True)
    assert set(most[:10]) == set(parts["common_words"].answers)
    assert listed.count(most[9]) > listed.count(most[10])
    coded = parts["frequent_words"].prompt.split("\n")[1].split()
    assert set(sorted(set(coded), key=coded.count, reverse=True)[:3]) == set(parts["frequent_words"].answers)
    held: dict[str, str] = {}
    for line in parts["variable_tracking"].prompt.splitlines():
        if line.startswith("VAR "):
            name, _, source = line.removeprefix("VAR ").partition(" = ")
            held[name] = held[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    assert set(held) == set(parts["variable_tracking"].answers)
    assert len(set(held.values())) == 1
    example = parts["niah_multivalue"]
    key = example.prompt.rpartition("numbers for ")[2].split()[0]
    values = [line.rstrip(".").split()[-1] for line in example.prompt.splitlines() if f"for {key} is" in line]
    assert sorted(values) == sorted(example.answers)
    assert len(example.answers) == 4


def test_filling_is_the_most_that_fits():
    def build(count: int) -> str:
        return "a " * (3 + 2 * count)

    assert fitted(build, lambda text: len(text.split()), 10) == build(3)
    assert fitted(build, lambda text: len(text.split()), 3) == build(0)
    with pytest.raises(ValueError, match="length 2: allowed are 3 and above"):
        fitted(build, lambda text: len(text.split()), 2)
    with pytest.raises(ValueError, match="no filling reaches it"):
        fitted(lambda count: "a", lambda text: 1, 5)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("So 3 + 4 = 7 and $1,200.00 in all.\n#### 1200", 1),
        ("#### 7\nNo: #### $1,200", 1),
        ("It costs 1200.50", 0),
        ("The answer is 1,200.", 1),
        ("#### none", 0),
        ("", 0),
        ("#### 1200\nThen 5 more.", 1),
    ],
)
def test_gsm8k_takes_the_number_after_the_mark(answer, score):
    assert gsm8k.right_number(answer, Example("", ("1200",))) == score


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_files_become_examples(tmp_path):
    problem = {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
    (part,) = gsm8k.parts(asked(data=lines(tmp_path / "g.jsonl", problem, problem), examples=1))
    assert part.examples[0].answers == ("1004",)
    assert part.name == "0 to 0"
    passages = [{"text": f"One more passage ends with the word number{index}"} for index in range(70)]
    first, second = lambada.parts(asked(data=lines(tmp_path / "l.jsonl", *passages)))
    assert (first.name, second.name) == ("0 to 63", "64 to 69")
    assert first.examples[1] == Example("One more passage ends with the word", (" number1",))
    for module, row, said in (
        (gsm8k, {"question": "?"}, "line 1: no 'answer'"),
        (gsm8k, {"question": "?", "answer": "four"}, "line 1: no number after ####"),
        (lambada, {"text": "word"}, "line 1: a passage of one word"),
        (lambada, "text", "line 1: no 'text'"),
    ):
        with pytest.raises(ValueError, match=said):
            module.parts(asked(data=lines(tmp_path / "bad.jsonl", row)))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        gsm8k.parts(asked(data=tmp_path / "bad.jsonl"))


@pytest.mark.skipif(not EVAL.is_dir(), reason="needs ../shared/eval, which lies beside the project's own copy")
def test_the_published_files_are_read():
    problems = [part for part in gsm8k.parts(asked(data=EVAL / "gsm8k_test.jsonl")) for part in part.examples]
    assert len(problems) == 1319
    assert problems[0].answers == ("18",)
    passages = [example for part in lambada.parts(asked(data=EVAL / "lambada_test.jsonl")) for example in part.examples]
    assert len(passages) == 5153


def longbench_copy(folder: Path) -> Path:
    """Two small datasets in LongBench's form."""
    row = {
        "input": "Who {context}?",
        "context": "Ann lives {here}.",
        "answers": ["Ann", "The Ann"],
        "all_classes": None,
    }
    lines(folder / "data" / "hotpotqa.jsonl", row)
    kinds = ["Food", "Food of day", "City"]
    lines(folder / "data" / "trec.jsonl", {**row, "answers": ["Food"], "all_classes": kinds})
    lines(folder / "data" / "dureader.jsonl", row)
    (folder / "config").mkdir()
    prompts = {"hotpotqa": "Read: {context}\nQ: {input}\nA:", "trec": "{context}\n{input}"}
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (folder / "config" / "dataset2maxlen.json").write_text(json.dumps({"hotpotqa": 32, "trec": 64}))
    return folder


def test_a_copy_of_longbench(tmp_path):
    folder = longbench_copy(tmp_path)
    hotpot, trec = longbench.parts(asked(data=folder))
    assert hotpot.examples[0].prompt == "Read: Ann lives {here}.\nQ: Who {context}?\nA:"
    assert (hotpot.max_new_tokens, hotpot.chat, trec.max_new_tokens, trec.chat) == (32, True, 64, False)
    assert hotpot.score("the Ann!", hotpot.examples[0]) == 1
    assert trec.score("\nFood\nCity", trec.examples[0]) == 1
    assert trec.score("Food City", trec.examples[0]) == 0.5
    cut: list[int] = []
    longbench.parts(asked(data=folder, longest=100, cut=lambda text, most: cut.append(most) or text))
    assert cut == [68, 36]
    with pytest.raises(ValueError, match="hotpotqa: answers of 32 tokens do not fit the model's 30 positions"):
        longbench.parts(asked(data=folder, longest=30))
    (folder / "config" / "dataset2maxlen.json").write_text("{}")
    with pytest.raises(ValueError, match="no prompt and length of an answer for hotpotqa"):
        longbench.parts(asked(data=folder))
    with pytest.raises(ValueError, match="cannot read LongBench config"):
        longbench.parts(asked(data=tmp_path / "none"))


def test_longbenchs_metrics_by_hand():
    """ROUGE-L and the likeness of code agree with the packages ``rouge`` and ``fuzzywuzzy`` on 3,000 random texts."""
    assert metrics.qa_f1("An apple, red", "the red apple pie") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert metrics.qa_f1("", "x") == 0
    assert metrics.rouge_l("a b c d", "a c x d") == pytest.approx(0.75, abs=1e-6)  # a c d of four
    assert metrics.rouge_l("a b. c d", "c d. a b") == pytest.approx(1, abs=1e-6)  # sentences in any order
    assert metrics.rouge_l("", "a") == 0
    assert metrics.retrieval("Paragraph 3, or 4", "Paragraph 3") == 0.5
    assert metrics.count("there are 7", "7") == 1
    assert metrics.count("none", "7") == 0
    assert metrics.code_similarity("# no\nx = 1\ny", "x = 2") == 0.8
    assert metrics.classification("City", "City", ["City", "Food"]) == 1


@pytest.mark.parametrize("package", ["rouge", "fuzzywuzzy"])
def test_longbenchs_metrics_are_those_of_its_packages(package):
    pytest.importorskip(package, reason=f"{package} is not installed: LongBench's own metric cannot be asked")
    import random

    chance = random.Random(0)
    for _ in range(50):
        one, other = ("".join(chance.choice(["a ", "b ", "c ", "d. "]) for _ in range(12)) for _ in range(2))
        if package == "rouge":
            from rouge import Rouge

            want = Rouge().get_scores([one], [other], avg=True)["rouge-l"]["f"]
            assert metrics.rouge_l(one, other) == pytest.approx(want)
        else:
            from fuzzywuzzy import fuzz

            assert metrics.code_similarity(one, other) == fuzz.ratio(one, other) / 100


def test_an_unknown_task_is_named():
    with pytest.raises(LookupError, match="unknown task 'neddle': did you mean needle"):
        task_named("neddle")


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory(tmp_path_factory.mktemp("tiny")))
    model = tiny_model()

    def make(method, batch):
        return Answerer(model, tokenizer, lambda n: make_cache(model, method, max_seq_len=n), batch)

    return make


PROMPTS = ("abcdefgh" * 8, "xyz", "Some words, and more of them")


def test_answers_are_those_of_the_plain_model(answerer):
    """Ragged rows in one batch, each as alone."""
    who = answerer(Full("float32"), 3)
    prompts = [who.encode(prompt, False) for prompt in PROMPTS]
    ticks: list[float] = []
    answers = who.generate(prompts, 6, tick=ticks.append)
    assert sum(ticks) == pytest.approx(1)
    for prompt, answer in zip(prompts, answers, strict=True):
        out = who.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert answer == who.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    stopped = who.generate(prompts, 6, stop=(answers[0][2],))
    assert stopped[0] == answers[0][: answers[0].index(answers[0][2])]
    with pytest.raises(ValueError, match="64 tokens and 200 new ones exceed the model's 256 positions"):
        who.generate(prompts, 200)


def test_continuations_are_scored_as_the_plain_model_scores_them(answerer):
    who = answerer(Full("float32"), 2)
    pairs = [
        (who.encode(prompt, False), who.encode(target, False))
        for prompt, target in zip(PROMPTS, ("ab", "qrstu", "x"), strict=True)
    ]
    for (context, target), (nll, greedy) in zip(pairs, who.continuations(pairs), strict=True):
        with torch.inference_mode():
            logits = who.model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].double()
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum().item()
        assert nll == pytest.approx(chosen, abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == target)
    lossy = answerer(Kivi(nbits=2, residual_length=32), 1).continuations(pairs[:1])
    assert lossy[0][0] != pytest.approx(who.continuations(pairs[:1])[0][0], abs=1e-3)


def test_before():
    assert before("one two three", ("three", " two")) == "one"
    assert before("one", ()) == "one"


def command(folder: Path, out: Path, *more: str) -> int:
    words = ["eval", "--model", str(folder), "--offline", "--device", "cpu", "--out", str(out), "--plain"]
    return run([*words, "--method", "kivi:nbits=2,residual_length=32", *more])


def test_parts_share_a_call_as_far_as_a_batch_goes():
    from kvruntime.bench.quality.answers import together

    parts = TASKS["ruler"].parts(asked(lengths=(300, 400), examples=2))
    groups = together(parts, 6)
    assert sorted(part.name for group in groups for part in group.parts) == sorted(part.name for part in parts)
    for group in groups:
        assert len({(part.max_new_tokens, part.about["length"]) for part in group.parts}) == 1
        assert sum(len(part.examples) for part in group.parts) <= 6
    assert [len(group.parts) for group in groups] == [3, 2, 2, 2, 1] * 2
    assert [len(group.parts) for group in together(parts, 1)] == [1] * 20  # no part is divided


def test_the_command_answers_tasks(tmp_path, capsys, monkeypatch):
    calls, generate = [], Answerer.generate

    def counted(who, prompts, *more):
        calls.append(len(prompts))
        return generate(who, prompts, *more)

    monkeypatch.setattr(Answerer, "generate", counted)
    folder, out = tiny_directory(tmp_path), tmp_path / "rows.json"
    passage = lines(tmp_path / "l.jsonl", {"text": "ab cd ef"}, {"text": "gh ij kl mn"})
    more = ("--task", "passkey", "--task", "lambada", "--data", str(passage), "--length", "200", "--depths", "2")
    assert command(folder, out, *more, "--examples", "2") == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert NEEDLES_SAY_LITTLE in shown
    assert "not a test; a method without exact tokens is" in " ".join(shown.split())
    assert "perplexity" not in shown.partition("recorded")[0].replace("perplexity by position", "")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["method"], row.get("depth")) for row in rows[:4]] == [
        ("passkey", method, depth) for method in ("fp16", "kivi-2bit-g32-r32") for depth in (0, 1)
    ]
    assert calls == [4, 4]  # both depths at once
    assert all(len(row["scores"]) == row["num_examples"] == 2 for row in rows)
    assert rows[-1]["target_nll"][0] > 0
    head, body = answers_cells([row for row in rows if row["task"] == "passkey"])
    assert head[-1] == "200"
    assert len(body) == 2
    assert run(["plot", str(out), "--out", str(tmp_path / "plots")]) == 0, capsys.readouterr().err
    assert (tmp_path / "plots" / "passkey.png").stat().st_size > 5000


def test_an_answer_ends_with_its_end_token_whatever_its_batch(answerer, monkeypatch):
    """Padding to the longest row of a batch is no part of an answer: it would agree with other padding."""
    batched, alone = (answerer(Full("float32"), batch) for batch in (3, 1))
    prompts = [batched.encode(prompt, False) for prompt in PROMPTS]
    whole = batched.answer(prompts, 10)
    assert [len(row) for row in whole] == [10] * 3
    ends = [whole[0][4], 127]
    monkeypatch.setattr(batched.model.generation_config, "eos_token_id", ends)
    got = batched.answer(prompts, 10)
    assert got == alone.answer(prompts, 10) == [ended(row, ends) for row in whole]
    assert len(got[0]) <= 5 < max(map(len, got))
    assert got[0][-1] == ends[0]
    assert ended([5, 2, 0, 2], {2}) == [5, 2]
    assert ended([2, 0], {2}) == [2]
    assert ended([5, 6], set()) == [5, 6]


def test_an_answer_agrees_up_to_its_first_other_token(tmp_path, capsys, monkeypatch):
    from kvruntime.bench.quality import answers
    from kvruntime.bench.quality.answers import shared_start

    assert [shared_start(own, [5, 6, 7]) for own in ([5, 6, 7, 8], [5, 6, 8], [4, 6, 7], [5], [])] == [3, 2, 0, 1, 0]
    folder, out = tiny_directory(tmp_path), tmp_path / "rows.json"
    (tmp_path / "prose.txt").write_text("It was so. He went on and on. " * 40)
    more = ("--task", "agreement", "--text", str(tmp_path / "prose.txt"), "--length", "230", "--examples", "2")
    assert command(folder, out, *more) == 0, capsys.readouterr().err
    assert " ".join(TASKS["agreement"].caveat.split()) in " ".join(capsys.readouterr().out.split())
    lead, plain, packed = json.loads(out.read_text())["rows"]
    assert (lead["kind"], lead["method"], len(lead["tokens"])) == ("lead", "transformers-dynamic", 2)
    assert (plain["length"], plain["max_new_tokens"], plain["chat"]) == (230, 256 - 230, False)
    assert plain["scores"] == [1, 1]  # the same kernels, on a CPU
    assert all(0 <= score < 1 and (26 * score).is_integer() for score in packed["scores"])
    monkeypatch.setattr(answers, "measure_lead", lambda *_: pytest.fail("the lead is in the file"))
    assert command(folder, out, *more, "--resume", "--method", "int8") == 0, capsys.readouterr().err
    assert json.loads(out.read_text())["rows"][-1]["method"] == "int8"
    monkeypatch.undo()
    assert command(folder, out, *more[:-3], "256", "--examples", "1") == 2
    assert "256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--task", "nedle"], "unknown task 'nedle': did you mean needle"),
        (["--task", "gsm8k"], "task gsm8k needs --data gsm8k=PATH: a JSON-lines file"),
        (["--task", "needle", "--data", "x"], "data x: allowed is none, no task here needs a file"),
        (["--task", "gsm8k", "--task", "lambada", "--data", "x"], "data x: allowed is TASK=PATH of gsm8k, lambada"),
        (["--task", "needle", "--length", "256"], "length 256: allowed are 1 to 255, below the model's 256 positions"),
        (["--task", "needle", "--length", "20"], "length 20: allowed are"),
        (["--task", "needle", "--length", "1k"], "length 1024: allowed are 1 to 255"),
        (["--task", "needle", "--length", "x"], "length 'x': allowed are whole numbers"),
        (["--task", "needle", "--depths", "0"], "depths 0: allowed are 1 to"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, more, said):
    assert command(tiny_directory(tmp_path), tmp_path / "rows.json", *more) == 2
    assert said in capsys.readouterr().err


def test_scores_are_compared_over_the_same_examples():
    """A part that one method has not answered yet is left out for all."""
    row = {"kind": "answers", "task": "gsm8k", "model": "m", "weights": "w", "dtype": "float32", "num_examples": 2}
    rows = [
        {**row, "method": "fp16", "part": "a", "examples_sha256": "1", "scores": [1.0, 1.0], "bits": 16.0},
        {**row, "method": "fp16", "part": "b", "examples_sha256": "2", "scores": [0.0, 0.0], "bits": 16.0},
        {**row, "method": "x", "part": "a", "examples_sha256": "1", "scores": [1.0, 0.0], "bits": 3.0},
    ]
    _, (plain, other) = answers_cells(rows)
    assert plain[2] == "100.0%"
    assert other[:3] == ["x", "3.000", "50.0%"]
    assert other[4].startswith("-50.0 (")
    assert "4 examples" in tables(rows)


def test_the_share_of_answers():
    assert share_found("a and B", Example("", ("A", "b", "c"))) == pytest.approx(2 / 3)
