"""``kvsim doctor``: what it prints, which files it reads, and what is no log."""

import io
import json
import os
from pathlib import Path

import pytest
from boot_logs import BOOT_019, TWO_MODELS

from kvsim.analysis.doctor import diagnose
from kvsim.cli import run


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(BOOT_019.replace("Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"))
    assert run(["doctor", "--log", str(log)]) == 0
    text = capsys.readouterr().out
    assert "| KV cache size                | tokens   |   476,032 |  476,016 | -0.00% |" in text
    assert text.strip().split("\n\n")[-1].startswith("Not modelled:")
    assert run(["doctor", "--log", str(log), "--json", "--model", "llama-3.1-8b", "--gpu", "h100"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["schema"], out["engine"], out["version"]) == ("kvsim.doctor/1", "vllm", "0.19.0")
    assert {row["what"] for row in out["rows"]} >= {"weights", "KV cache size"}


def test_a_tuned_name_is_taken_for_its_base(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(BOOT_019.replace("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B-Chat"))
    assert run(["doctor", "--log", str(log), "--json"]) == 0
    assert "taken for Qwen/Qwen3-8B" in json.loads(capsys.readouterr().out)["notes"][0]


@pytest.mark.parametrize("name", ["/models/Some-Model-FP8", "./weights", "C:/models/x/y", "nobody/No-Such-Model-7B"])
def test_a_model_that_is_not_here(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("kvsim.models.load._reachable", lambda endpoint: False)
    (tmp_path / "vllm.log").write_text(BOOT_019.replace("meta-llama/Llama-3.1-8B-Instruct", name))
    assert run(["doctor", "--log", str(tmp_path / "vllm.log")]) == 2
    error = capsys.readouterr().err
    assert f"the log's model is not here: give --model (the log names {name}" in error
    assert error.count("\n") == 1
    assert run(["doctor", "--log", str(tmp_path / "vllm.log"), "--model", "llama-3.1-8b"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log"),
        ("Traceback (most recent call last):", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log"),
        ("GPU KV cache size: 1,000 tokens", "does not name its model"),
        ("llama_context: n_ctx         = 2048", "none with a size of its cache"),
    ],
)
def test_logs_that_say_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(text, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log in it"),
        ("GPU KV cache size: 1,000 tokens", "does not name its model: give --model"),
        (None, "cannot be read"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(
    text: str | None, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "engine.log"
    if text is not None:
        log.write_text(text)
    assert run(["doctor", "--log", str(log)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\r\n", "is empty"),
        (b"\x7fELF\x02\x01\x00\x00GPU KV cache size: 1,000 tokens", "is no text: it has a byte 0 at 6"),
        (b"\x1f\x8b\x08\xff\xfe", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log"),
    ],
    ids=["empty", "blank", "binary", "gzip"],
)
def test_what_is_no_log(data: bytes, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_bytes(data)
    assert run(["doctor", "--log", str(tmp_path / "engine.log")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_only_regular_files_are_opened(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A pipe without a writer would wait for ever, a device never end."""
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "is not a regular file"), (Path("/dev/zero"), "is not a regular file")):
        assert run(["doctor", "--log", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert run(["doctor", "--log", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_the_head_of_a_log_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "engine.log"
    with log.open("w") as file:
        file.write(BOOT_019)
        file.truncate(1 << 40)  # sparse: a terabyte that is not there
    monkeypatch.setattr("kvsim.commands.doctor.LOG_NBYTES", len(BOOT_019))
    assert run(["doctor", "--log", str(log), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["notes"][0] == "the first 0 MiB of 1,048,576 of the log are read"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(BOOT_019.encode() + b"\nand so on" * 9)))
    assert run(["doctor", "--log", "-"]) == 0
    assert "| KV cache size" in capsys.readouterr().out


def test_a_log_as_windows_shells_redirect_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_bytes(TWO_MODELS.replace("\n", "\r\n").encode("utf-16"))
    assert run(["doctor", "--log", str(tmp_path / "engine.log")]) == 0
    assert "draft.gguf" in capsys.readouterr().out


# Logs beside the repository, where they are there


CASES = Path(__file__).parents[3] / "shared" / "cases"
RIGHT: dict[str, tuple[str | None, dict[str, tuple[float | None, float]]]] = {
    "vllm065_trailing_period.log": ("bamba", {"GPU blocks": (189_945, 189_945)}),
    "vllm064_peak_torch_memory.log": (None, {"KV cache memory": (2.892, 2.89)}),
    "vllm_failed_boot_needs.log": (
        None,
        {
            "needed at 131,072 tokens": (4.575, 4.54),
            "KV cache memory": (None, 1.71),
            "longest context": (47_600, 48_080),
        },
    ),
    "vllm_free_memory_line.log": (None, {"KV cache memory": (54.603, 54.60), "KV cache size": (447_280, 447_280)}),
    "llamacpp_target_and_draft.log": (None, {"keys, f16 (draft.gguf)": (448, 448)}),
    "pass_q35.log": (None, {"KV cache size": (290_864, 290_864)}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_logs_of_public_reports(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (CASES / name).is_file():
        pytest.skip(f"{name} is not beside the repository (../shared/cases)")
    model, right = RIGHT[name]
    given = [] if model is None else ["--model", str(CASES / model)]
    assert run(["doctor", "--log", str(CASES / name), "--json", *given]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for what, (predicted, reported) in right.items():
        wanted = predicted if predicted is None else pytest.approx(predicted, abs=1e-3)
        assert (rows[what]["predicted"], rows[what]["reported"]) == (wanted, reported)
