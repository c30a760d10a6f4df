"""lm-evaluation-harness' interface: the model class by its own registry, requests, tasks from a local file."""

import json

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
    assert run([*words, "--lm-eval", "no_such_task", "--out", str(out)]) == 2
    assert "lm_eval has no task 'no_such_task'" in capsys.readouterr().err
    words = ["lm-eval", "run", "--model", "kvruntime", "--model_args", f"pretrained={folder},method=kivi,nbits=4"]
    assert run([*words, "--tasks", "made_words", "--include_path", str(tasks), "--device", "cpu"]) == 0
    assert "made_words" in capsys.readouterr().out
