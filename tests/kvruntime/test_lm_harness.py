"""lm-evaluation-harness' interface: the model class by its own registry, requests, tasks from a local file."""

import importlib
import json
import sys
from fnmatch import fnmatch
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime.bench.quality.report import tables  # noqa: E402
from kvruntime.cli import run  # noqa: E402

try:
    import lm_eval
except ImportError:
    lm_eval = None
needs_lm_eval = pytest.mark.skipif(lm_eval is None, reason="lm_eval is not installed (extra harness)")


@pytest.mark.skipif(lm_eval is not None, reason="lm_eval is installed: the command runs")
@pytest.mark.parametrize("words", [["eval", "--lm-eval", "gsm8k"], ["lm-eval", "ls"]])
def test_without_lm_eval_the_command_says_how_to_get_it(tmp_path, capsys, words):
    more = ["--model", str(tiny_directory(tmp_path)), "--offline", "--out", str(tmp_path / "r.json")]
    assert run([*words, *(more if words[0] == "eval" else [])]) == 2
    said = capsys.readouterr().err
    assert "loading" not in said  # before a model is loaded
    assert "lm_eval" in said
    assert "pip install" in said
    assert "[harness]" in said


def test_rows_of_the_harness_become_a_table():
    row = {
        "kind": "lm-eval", "model": "m", "weights": "w", "dtype": "float16", "task": "gsm8k", "lm_eval": "0.4.13",
        "num_examples": {"gsm8k": 20},
    }  # fmt: skip
    metrics = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.05}
    rows = [
        {**row, "method": "fp16", "metrics": {"gsm8k": metrics}},
        {**row, "method": "x", "metrics": {"gsm8k": {"exact_match,strict": 0.2}}},
    ]
    shown = tables(rows)
    assert "gsm8k of lm_eval 0.4.13, 20 examples" in shown
    assert "0.2500 ± 0.0500" in shown
    assert "0.2000" in shown


@pytest.fixture
def stand_in(monkeypatch):
    """The module over a small registry, ``HFLM`` and ``TaskManager`` of its own: lm_eval need not be installed."""

    class HFLM:
        def __init__(self, pretrained, tokenizer=None, max_length=None, batch_size=1, softmax_dtype=None, revision=""):
            self.model, self.tokenizer, self.max_length = pretrained, tokenizer, max_length
            self.kept = []
            self.cache_hook = SimpleNamespace(add_partial=lambda kind, key, answer: self.kept.append(key))

    class TaskManager:
        def __init__(self, include_path=None):
            self.all = ["gsm8k", "mmlu_one", "mmlu_two"]

        def match_tasks(self, names):
            return [task for task in self.all if any(fnmatch(task, name) for name in names)]

    parts = {
        "": {}, ".api": {}, ".models": {}, ".tasks": {"TaskManager": TaskManager},
        ".api.registry": {"register_model": lambda name: lambda made: made},
        ".models.huggingface": {"HFLM": HFLM},
    }
    for name, held in parts.items():
        module = ModuleType(f"lm_eval{name}")
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    name = "kvruntime.bench.quality.lm_harness"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.import_module("kvruntime.bench.quality"), "lm_harness", None, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name)


def test_over_long_contexts_lose_their_start_and_answers_keep_their_order(stand_in, tmp_path, caplog):
    model = stand_in.KvruntimeLM(str(directory(tmp_path)), "fp32", device="cpu", max_length=24, batch_size="2")
    assert model.batch == 2
    text = [1 + 7 * place % 97 for place in range(60)]
    requests = [
        (("ab", "c"), text[:5], text[5:6]),
        (None, text[:50], text[50:53]),  # a window of a rolling text has no request of its own
        (("long", "d"), text[10:32], text[32:35]),  # 22 and 2 of 3: the last is predicted, not fed
    ]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert caplog.messages == ["1 of 3 contexts exceed 24 tokens and lose their start"]
    assert model.kept == [("long", "d"), ("ab", "c")]
    for (_, context, continuation), (own, greedy) in zip(requests, found, strict=True):
        ids = torch.tensor([[*context, *continuation][-25:]])
        with torch.inference_mode():
            logits = model.model(ids[:, :-1]).logits.float().log_softmax(-1)[0, -len(continuation) :]
        chosen = torch.tensor(continuation)
        assert own == pytest.approx(float(logits.gather(1, chosen[:, None]).sum()), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == chosen).all())


def test_tasks_are_known_before_a_model_is_loaded(stand_in, tmp_path, capsys):
    assert stand_in.tasks_named(["mmlu_*", "gsm8k", "mmlu_two"], None)[1] == ["mmlu_one", "mmlu_two", "gsm8k"]
    words = ["eval", "--offline", "--out", str(tmp_path / "r.json"), "--lm-eval"]
    assert run([*words, "gsm8"]) == 2
    said = "lm_eval has no task 'gsm8': `kvruntime lm-eval ls tasks` lists them"
    assert capsys.readouterr().err == f"kvruntime: error: {said}\n"
    assert run([*words, "gsm8k", "--lm-eval-include", "nowhere"]) == 2
    assert capsys.readouterr().err == "kvruntime: error: lm-eval-include nowhere: allowed is a folder with tasks\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"softmax_dtype": "float32"}, "model argument softmax_dtype: allowed are pretrained, .*max_length"),
        ({"tokenizer": "t", "revision": "r"}, "model argument tokenizer, revision: allowed"),
        ({"batch_size": "auto:4"}, "batch_size auto:4: allowed are 1 and above"),
        ({"batch_size": 0}, "batch_size 0: allowed are 1 and above"),
        ({"max_lenght": 8}, "max_lenght"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused_before_a_model_is_loaded(stand_in, given, said):
    with pytest.raises((ValueError, LookupError), match=said):
        stand_in.KvruntimeLM("no such folder", "kivi", device="cpu", **given)


def directory(folder):
    """The tiny model with an end-of-text token, which lm_eval wants."""
    tiny_directory(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token": "~", "pad_token": "~"}))
    return folder


def own_task(folder):
    """A task of three questions for lm_eval, as a user has it in a folder; returns the folder."""
    rows = [{"q": "ab", "a": "c"}, {"q": "de", "a": "f"}, {"q": "gh", "a": "i"}]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
    }
    generated = {"output_type": "generate_until", "generation_kwargs": {"until": ["z"], "max_gen_toks": 4}}
    metric = {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    (folder / "made_generate.yaml").write_text(json.dumps({"task": "made_generate", **shared, **generated, **metric}))
    chosen = {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]}
    (folder / "made_words.yaml").write_text(json.dumps({"task": "made_words", **shared, **chosen}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if lm_eval is None:
        pytest.skip("lm_eval is not installed (extra harness)")
    from lm_eval.api.registry import get_model

    import kvruntime.bench.quality.lm_harness

    assert get_model("kvruntime") is kvruntime.bench.quality.lm_harness.KvruntimeLM
    folder = directory(tmp_path_factory.mktemp("tiny"))

    def make(arguments):
        return get_model("kvruntime").create_from_arg_string(
            f"pretrained={folder},{arguments}", {"batch_size": 2, "device": "cpu"}
        )

    return make


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@needs_lm_eval
def test_requests_of_an_uncompressed_cache_are_those_of_lm_evals_own_model(model):
    from lm_eval.models.huggingface import HFLM

    ours = model("method=fp32")
    plain = HFLM(ours.model, tokenizer=ours.tokenizer, batch_size=2)
    pairs = instances("loglikelihood", ("abc", "de"), ("some longer context", " and"), ("", "xy"))
    for (own, own_greedy), (theirs, greedy) in zip(ours.loglikelihood(pairs), plain.loglikelihood(pairs), strict=True):
        assert own == pytest.approx(theirs, abs=1e-3)
        assert own_greedy == greedy
    texts = instances("loglikelihood_rolling", ("a text of some length " * 14,))  # more than the model's 256 positions
    assert ours.loglikelihood_rolling(texts) == pytest.approx(plain.loglikelihood_rolling(texts), abs=0.05)
    asked = instances("generate_until", ("abc", {"until": ["z"], "max_gen_toks": 6}), ("x", {"max_gen_toks": 6}))
    assert ours.generate_until(asked) == plain.generate_until(asked)


@needs_lm_eval
def test_the_methods_options_come_with_the_arguments(model):
    ours = model("method=kivi,nbits=2,residual_length=32")
    assert ours.contender.name == "kivi-2bit-g32-r32"
    assert model("method=kivi:nbits=4,group_size=64").contender.name == "kivi-4bit-g64-r128"
    pairs = instances("loglikelihood", ("ab" * 60, "cdef"))
    exact = model("method=fp32").loglikelihood(pairs)[0][0]
    assert ours.loglikelihood(pairs)[0][0] != pytest.approx(exact, abs=1e-4)
    with pytest.raises(LookupError, match="unknown method 'kivy'"):
        model("method=kivy")


@needs_lm_eval
def test_the_commands(tmp_path, capsys):
    folder, tasks, out = directory(tmp_path), own_task(tmp_path / ""), tmp_path / "rows.json"
    words = ["eval", "--model", str(folder), "--offline", "--device", "cpu", "--method", "kivi:residual_length=32"]
    more = ["--lm-eval", "made_generate", "--lm-eval", "made_words", "--lm-eval-include", str(tasks), "--out", str(out)]
    assert run([*words, *more]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "made_words of lm_eval" in shown
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in ("made_generate", "made_words") for method in ("fp16", "kivi-2bit-g32-r32")
    ]
    assert rows[2]["metrics"]["made_words"]["perplexity,none"] > 1
    for wrong in (["no_such_task"], ["made_words", "--lm-eval-include", str(out)]):
        assert run([*words, "--lm-eval", *wrong, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert "lm_eval has no task 'no_such_task'" in said or "lm-eval-include" in said
        assert "loading" not in said
    words = ["lm-eval", "run", "--model", "kvruntime", "--model_args", f"pretrained={folder},method=kivi,nbits=4"]
    assert run([*words, "--tasks", "made_words", "--include_path", str(tasks), "--device", "cpu"]) == 0
    assert "made_words" in capsys.readouterr().out
