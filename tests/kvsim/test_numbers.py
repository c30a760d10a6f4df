"""No number that a command takes, however it is spelled, ends in a traceback, in a NaN or in a wall of text."""

from __future__ import annotations

import inspect
import json

import click
import pytest

from kvsim import cli
from kvsim.commandline import LONGEST
from kvsim.engines import ENGINES, engine_fields
from kvsim.methods import METHODS
from kvsim.specs import LARGEST, parse_card, parse_human, parse_size, parse_value

REQUIRED = {
    "estimate": {"--model": "gpt2", "--gpu": "l4"},
    "compare": {"--model": "gpt2", "--engine": "vllm"},
    "explain": {"--model": "gpt2"},
    "plot": {"--model": "gpt2"},
    "breakeven": {"--model": "gpt2", "--gpu": "l4"},
    "plan": {"--model": "gpt2", "--gpu": "l4", "--users": "3"},
    "goodput": {"--model": "gpt2", "--gpu": "l4"},
    "offload": {"--model": "gpt2", "--gpu": "l4"},
    "report": {"--model": "gpt2", "--gpu": "l4"},
    "sweep": {"--model": "gpt2", "--gpu": "l4"},
    "calibrate": {},
    "serve": {},
}
NAMES = {
    *("--model", "--gpu", "--method", "--against", "--engine", "--engines", "--dtype", "--kv-cache-dtype", "--lengths"),
    *("--weight-dtype", "--quantization", "--occupancy", "--profile", "--out", "--output", "--device", "--log"),
}
"""Options that take no number."""

NEVER = ("nan", "inf", "-inf", "-1", "1e400", "9" * 400, "9" * 5000, "999999999999999M", str(LARGEST + 1), "")
"""What no option takes."""

SEES_ZERO = {"--sink-length", "--reserve", "--margin", "--risk", "--port", "--prefix-hits", "--seed"}
"""Options whose 0 means something."""


def numeric(name: str) -> list[str]:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    options = [option for option in command.params if isinstance(option, click.Option)]
    names = [option.opts[0] for option in options if not option.is_flag and not option.is_eager]
    return [option for option in names if option not in NAMES]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], package: str = "kvsim") -> None:
    assert cli.run(argv) == 2, argv
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"{package}: error: "), argv
    assert err.count("\n") == 1, argv
    assert len(err) < LONGEST + 100, argv


def test_every_command_is_looked_at() -> None:
    """But those without a number."""
    assert {name for name in cli.cli.list_commands(click.Context(cli.cli)) if numeric(name)} <= set(REQUIRED)
    assert sum(len(numeric(name)) for name in REQUIRED) > 70


@pytest.mark.parametrize("name", REQUIRED)
def test_numbers_that_no_option_takes(name: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("kvsim.latency.calibrate.find_spec", lambda module: pytest.fail("it would measure"))
    for option in numeric(name):
        for value in NEVER + (() if option in SEES_ZERO else ("0",)):
            given = REQUIRED[name] | {option: value}
            refused([name, *(f"{key}={text}" for key, text in given.items()), "--json"], capsys)


@pytest.mark.parametrize("option", ["--sink-length", "--reserve"])
def test_a_zero_that_means_something_is_taken(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["estimate", "--model", "gpt2", "--gpu", "l4", f"{option}=0", "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_in_a_method(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for field in inspect.signature(METHODS[name]).parameters:
        for value in NEVER[:-1]:
            refused(["estimate", "--model", "gpt2", "--method", f"{name}:{field}={value}"], capsys)


@pytest.mark.parametrize("name", [name for name in ENGINES if engine_fields(name)])
def test_numbers_in_an_engine(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for field in engine_fields(name):
        for value in ("nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000, "999999999999999M", ""):
            refused(["estimate", "--model", "gpt2", "--engine", f"{name}:{field}={value}"], capsys)


@pytest.mark.parametrize("field", ["mean", "sigma", "output_mean", "output_sigma", "max"])
def test_numbers_in_lengths(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpy", reason="numpy is not installed")
    for value in (*NEVER, "0"):
        given = {"mean": "2000", "sigma": "0.8", "output_mean": "300", "output_sigma": "0.6"} | {field: value}
        spec = "lognormal:" + ",".join(f"{key}={text}" for key, text in given.items())
        refused(["plan", "--model", "gpt2", "--gpu", "l4", "--users", "3", "--lengths", spec], capsys)


@pytest.mark.parametrize("value", [*NEVER, "0", "1025", "1.5", "٣"])
def test_numbers_of_cards(value: str) -> None:
    with pytest.raises(ValueError, match="allowed is CARD:COUNT with a count of 1 to 1024"):
        parse_card(f"l4:{value}")


@pytest.mark.parametrize("package", ["kvruntime", "validation"])
def test_numbers_that_are_not_finite_or_boundless_anywhere_else(package: str, capsys) -> None:
    pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
    module = pytest.importorskip(f"{package}.cli")
    lines = {
        "kvruntime": ("calibrate --seconds", "generate hello --temperature", "generate hello --max-new-tokens"),
        "validation": ("speed --repeats", "quality --window"),
    }[package]
    for line in lines:
        for value in ("nan", "inf", "1e400", "9" * 400):
            assert module.run([*line.split(), value]) == 2, line
            err = capsys.readouterr().err
            assert err.startswith(f"{package}: error: ")
            assert err.count("\n") == 1


def test_a_number_that_no_float_holds_is_one_line(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it comes from: here a log, whose figures no option's bound holds."""
    log, many = tmp_path / "boot.log", "9" * 400
    log.write_text(
        f"INFO LLM engine (v0.19.0) with config: model='gpt2', max_seq_len={many}\n"
        f"INFO GPU KV cache size: {many} tokens\n"
    )
    assert cli.run(["doctor", "--log", str(log), "--model", "gpt2"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err == "kvsim: error: a number is too large: its bytes or seconds cannot be computed\n"


def test_the_largest_size_is_taken_and_no_larger() -> None:
    assert parse_size(str(LARGEST)) == parse_size("1048576M") == parse_value(str(LARGEST)) == LARGEST
    assert parse_human("1048576M", "x") == LARGEST
    assert parse_value(f"-{LARGEST}") == -LARGEST
    for parse in (parse_size, parse_value, lambda text: parse_human(text, "x")):
        with pytest.raises(ValueError, match="allowed are whole numbers"):
            parse(str(LARGEST + 1))


def test_the_largest_sizes_are_drawn_and_weighed(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    far = ["--model", "gpt2", "--batch", str(LARGEST), "--ctx", "1048576M", "--json"]
    for argv in (["plot", *far, "-o", str(tmp_path / "a.svg")], ["estimate", *far, "--gpu", "l4"], ["explain", *far]):
        assert cli.run(argv) == (1 if argv[0] == "estimate" else 0)
        assert json.loads(capsys.readouterr().out)["rows"]
