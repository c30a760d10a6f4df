"""Checkpoints that are damaged, incomplete, dangerous or not what they were: one line, and never a random weight."""

import json
import math
import os
import pickle
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from kvruntime.checkpoints.load import files_sha256, load, resolve, shape_sha256  # noqa: E402
from kvruntime.cli import run  # noqa: E402

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("asked on the terminal"))
    return shutil.copytree(whole, tmp_path / "tiny")


def tensors(folder, change):
    """Replaces the weights by ``change`` of them."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def configured(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def pickled(folder, content):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    found = content(state)
    if isinstance(found, bytes):
        (folder / "pytorch_model.bin").write_bytes(found)
    else:
        torch.save(found, folder / "pytorch_model.bin")


def without(*words):
    return lambda folder: tensors(
        folder, lambda state: {key: each for key, each in state.items() if not any(word in key for word in words)}
    )


def cut(name, nbytes):
    return lambda folder: os.truncate(folder / name, nbytes)


def wrong_index(parts):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        text = parts if isinstance(parts, str) else json.dumps({"metadata": {}, "weight_map": parts})
        (folder / f"{WEIGHTS}.index.json").write_text(text)

    return change


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def own_code(folder):
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    configured(folder, model_type="own-thing", architectures=["Model"], auto_map=names)
    (folder / "code.py").write_text("import os\nos.mkdir('ran')\n")


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


KEY = "model.layers.0.self_attn.k_proj.weight"
REFUSED = {
    "one weight is missing": (without(KEY), f"weight {KEY} is missing from the checkpoint"),
    "weights are missing": (without("k_proj"), f"2 weights ({KEY}, ...) are missing"),
    "the head is missing and not tied": (without("lm_head"), "weight lm_head.weight is missing"),
    "a layer is missing": (lambda folder: configured(folder, num_hidden_layers=3), "9 weights (model.layers.2."),
    "another shape": (
        lambda folder: tensors(folder, lambda state: state | {"model.norm.weight": torch.zeros(3)}),
        "weight model.norm.weight has shape [3], the configuration asks for [64]",
    ),
    "cut in the header": (cut(WEIGHTS, 100), "cannot read the weights"),
    "cut in a tensor": (cut(WEIGHTS, 20_000), "cannot read the weights"),
    "empty": (cut(WEIGHTS, 0), "cannot read the weights"),
    "garbage": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 999), "cannot read the weights"),
    "a pickle that runs code": (lambda folder: pickled(folder, lambda state: state | {"z": Evil()}), "nothing of them"),
    "an old pickle that runs code": (lambda f: pickled(f, lambda state: pickle.dumps(Evil(), 2)), "nothing of them"),
    "a pickle that is none": (lambda folder: pickled(folder, lambda state: b"garbage"), "pickled weights"),
    "an empty pickle": (lambda folder: pickled(folder, lambda state: b""), "cannot read the weights"),
    "a pickle of something else": (lambda folder: pickled(folder, lambda state: [1, 2]), "cannot load it"),
    "code of its own": (own_code, "needs code of its own (auto_map), which is not run"),
    "an index that is none": (wrong_index("{"), "is not valid JSON"),
    "an index of a list": (wrong_index("[]"), "has no weight_map"),
    "an index out of the folder": (wrong_index({"a": "../other.safetensors"}), "allowed are files of its own folder"),
    "an index to a file that is not there": (wrong_index({"a": "b.safetensors"}), "which is not there"),
    "weights that are a pipe": (pipe(WEIGHTS), "is not a regular file"),
    "a configuration that is a pipe": (pipe(CONFIG), "is not a regular file"),
    "a configuration that is a list": (lambda folder: (folder / CONFIG).write_text("[1]"), "is not a JSON object"),
    "a configuration without end": (lambda f: (f / CONFIG).write_text("[" * 100_000), "nested too deeply"),
    "a type that is a list": (lambda folder: configured(folder, model_type=["llama"]), "cannot load it: TypeError"),
    "no heads": (lambda folder: configured(folder, num_attention_heads=0), "cannot load it: ZeroDivisionError"),
    "a size as text": (lambda folder: configured(folder, hidden_size="64"), "hidden_size"),
    "weights under a name of its own": (
        lambda folder: configured(folder, transformers_weights="../x.safetensors"),
        "transformers_weights",
    ),
    "a tokenizer that is broken": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "has a tokenizer that cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_is_not_whole_is_one_line(name, folder, capsys, tmp_path, monkeypatch):
    change, message = REFUSED[name]
    change(folder)
    monkeypatch.setenv("KVRUNTIME_UNPICKLE", "1")
    assert run(["generate", "x", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "1"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if not line.startswith(("loading", "tiny, weights:"))] == shown[-1:]
    assert message in shown[-1]
    assert len(shown[-1]) < 400
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [lambda state: state, lambda state: state | {"z": Evil()}], ids=["tensors", "code"])
def test_pickled_weights_are_not_read_unasked(content, folder, capsys, tmp_path, monkeypatch):
    """Not even their first byte is; with the variable, tensors are read and the same text comes."""
    command = ["generate", "x", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "4"]
    assert run(command) == 0
    text = capsys.readouterr().out
    pickled(folder, content)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
        assert run(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "its weights are pickled (pytorch_model.bin), which is not read unasked" in said
    assert "KVRUNTIME_UNPICKLE=1" in said
    monkeypatch.setenv("KVRUNTIME_UNPICKLE", "1")
    asked = run(command)
    assert (asked, capsys.readouterr().out) == ((0, text) if content({}) == {} else (2, ""))
    assert not (tmp_path / "ran").exists()


def test_what_may_be_absent_is(folder, capsys, monkeypatch):
    """Tied embeddings, whichever of the two is there, and pickled tensors."""
    monkeypatch.setenv("KVRUNTIME_UNPICKLE", "1")
    said = []
    configured(folder, tie_word_embeddings=True)
    without("lm_head")(folder)
    model = load(resolve(str(folder)), "cpu", say=said.append).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    pickled(folder, lambda state: {key.replace("model.embed_tokens", "lm_head"): each for key, each in state.items()})
    other = load(resolve(str(folder)), "cpu", say=said.append).model
    assert torch.equal(model.lm_head.weight, other.model.embed_tokens.weight)
    assert said == []


def test_what_has_no_place_is_said(folder):
    said = []
    configured(folder, num_hidden_layers=1, auto_map={"AutoModelForCausalLM": "code.Model"})
    load(resolve(str(folder)), "cpu", say=said.append)
    assert said == [
        "tiny: its own code (auto_map) is not run: transformers' LlamaForCausalLM is",
        "tiny: 9 weights (model.layers.1.input_layernorm.weight, ...) are not used: "
        "the configured model has no place for them",
    ]


def test_a_tokenizer_with_code_of_its_own_is_not_run(folder, capsys, tmp_path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("import os\nos.mkdir('ran')\n")
    loaded = load(resolve(str(folder)), "cpu")
    assert loaded.tokenizer is None
    assert "contains custom code" in loaded.no_tokenizer
    assert run(["perplexity", "--model", str(folder), "--device", "cpu"]) == 2
    assert "has a tokenizer that cannot be loaded" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_the_digest_is_of_every_byte(folder, tmp_path):
    """The same file in another folder has the same; one changed byte of the same size and date has another."""
    first = files_sha256(folder)
    assert first == files_sha256(shutil.copytree(folder, tmp_path / "other"))
    for name in (WEIGHTS, CONFIG, "tokenizer.json"):
        path = folder / name
        content, times = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_size == len(content)
        assert files_sha256(folder) != first
        path.write_bytes(content)
    assert files_sha256(folder) == first
    (folder / "notes.md").write_text("not loaded")
    assert files_sha256(folder) == first
    assert shape_sha256({"a": 1, "b": 2}) == shape_sha256({"b": 2, "a": 1}) != shape_sha256({"a": 1})


def test_resume_does_not_take_another_model_for_the_same(folder, tmp_path, capsys):
    words = ["bench", "--device", "cpu", "--only", "memory", "--ctx", "8", "--method", "fp16", "--out", "r.json"]
    other = shutil.copytree(folder, tmp_path / "elsewhere" / "tiny")
    tensors(other, lambda state: state | {"model.norm.weight": state["model.norm.weight"] * 2})
    assert (other / WEIGHTS).stat().st_size == (folder / WEIGHTS).stat().st_size
    assert run([*words, "--model", str(folder)]) == 0
    for model, count in ((folder, 1), (other, 2), (other, 2), (folder, 2)):
        assert run([*words, "--model", str(model), "--resume"]) == 0
        rows = json.loads((tmp_path / "r.json").read_text())["rows"]
        assert len({row["model_sha256"] for row in rows}) == len(rows) == count
    assert {row["model"] for row in rows} == {"tiny"}


def test_weights_that_are_nan_are_a_failed_row(folder, tmp_path, capsys):
    tensors(folder, lambda state: state | {"model.norm.weight": state["model.norm.weight"] * math.nan})
    words = ["--model", str(folder), "--device", "cpu", "--window", "16", "--max-tokens", "16"]
    assert run(["perplexity", *words, "--method", "fp16", "--out", "r.json"]) == 1
    text = (tmp_path / "r.json").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))["rows"][0]
    assert row["failed"].startswith("nll is nan")
    assert "failed: quality" in capsys.readouterr().out
    assert run(["generate", "x", *words[:4]]) == 2
    assert "weight model.norm.weight holds NaN or infinity as float32" in capsys.readouterr().err


def test_a_perplexity_beyond_a_float_is_a_failed_row(folder, tmp_path, capsys):
    tensors(folder, lambda state: state | {"lm_head.weight": state["lm_head.weight"] * 1e6})
    words = ["--model", str(folder), "--device", "cpu", "--window", "16", "--max-tokens", "16"]
    assert run(["perplexity", *words, "--method", "fp16", "--out", "r.json"]) == 1
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["failed"].startswith("ppl is inf")
