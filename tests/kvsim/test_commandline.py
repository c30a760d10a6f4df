"""Every command line: what takes one value is given once, and an error is one line of bounded length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kvsim import cli
from kvsim.commandline import LONGEST, Command, Group, TextType, one_line, os_message
from kvsim.commands import LAZY
from kvsim.commands.flags import TOKENS
from kvsim.specs import parse_value


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def single(command: click.Command) -> Iterator[click.Option]:
    for option in command.params:
        if isinstance(option, click.Option) and not option.multiple and not option.is_eager:
            yield option


def given(option: click.Option, name: str) -> list[str]:
    return [name] if option.is_flag or option._flag_needs_value else [name, "1"]


def runs(package: str):
    if package == "kvsim":
        return cli
    pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
    return pytest.importorskip(f"{package}.cli")


@pytest.mark.parametrize("package", ["kvsim", "kvruntime"])
def test_every_number_of_tokens_is_taken_in_thousands(package: str) -> None:
    """A whole number of tokens by the help of its option takes ``4k`` and ``1M``: none is click's own integer."""
    for path, command in commands(runs(package).cli):
        for option in command.params:
            if isinstance(option, click.Option) and (option.help or "").startswith(("Tokens", "Newest t", "First")):
                assert option.type.name != "integer", (path, option.opts)
                if option.type is TOKENS:
                    context = click.Context(command)
                    assert [TOKENS.convert(text, option, context) for text in ("4k", "1M", "0")] == [4096, 1 << 20, 0]


@pytest.mark.parametrize("package", ["kvsim", "kvruntime", "validation"])
def test_no_option_of_one_value_is_taken_twice(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = runs(package)
    found = 0
    for path, command in commands(module.cli):
        assert isinstance(command, Command | Group), path
        for option in single(command):
            if option.is_flag and not option.secondary_opts:
                continue  # the same said twice
            names = [*option.opts, *option.secondary_opts]
            argv = [*path, *given(option, names[0]), *given(option, names[-1])]
            assert module.run(argv) == 2, argv
            out, err = capsys.readouterr()
            assert not out
            assert err == f"{package}: error: {max(option.opts, key=len)} is given 2 times: allowed is one\n"
            found += 1
    assert found > 10


def test_what_may_be_repeated_still_may(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["estimate", "--model", "gpt2", "--method", "fp16", "--method", "fp8", "--json", "--json"]) == 0
    assert '"fp8"' in capsys.readouterr().out


@pytest.mark.parametrize("name", LAZY)
def test_a_wall_of_text_is_cut(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a value of every option, and as an option or argument that is not there."""
    monkeypatch.setattr("kvsim.latency.calibrate.find_spec", lambda module: None)  # nothing is measured here
    wall = "9x" * 37_000
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    options = [option for option in single(command) if not option.is_flag]
    options += [option for option in command.params if isinstance(option, click.Option) and option.multiple]
    needed = {"--model": "gpt2", "--gpu": "l4", "--log": "-", "--users": "3"}
    for flags in [[f"{option.opts[0]}={wall}"] for option in options] + [[f"--{wall}"], [wall, wall]]:
        asked = [*flags, *(f"{key}={needed[key]}" for option in command.params for key in option.opts if key in needed)]
        given = list({word.partition("=")[0]: word for word in reversed(asked)}.values())
        assert cli.run([name, *given]) == 2, (name, flags[0][:30])
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        assert len(err) < LONGEST + 100


def test_a_cut_line_keeps_both_ends() -> None:
    line = one_line("begins " + "x" * 5000 + " ends\n")
    assert line.startswith("begins xxx")
    assert line.endswith("xxx ends")
    assert "characters left out" in line
    assert len(line) < LONGEST + 60
    assert one_line("a\n b\x1b[31m") == "a b?[31m"
    assert one_line("y" * LONGEST) == "y" * LONGEST


def test_an_error_of_the_system_names_its_file() -> None:
    assert os_message(FileNotFoundError(2, "No such file or directory", "a.csv")) == "a.csv: No such file or directory"
    assert os_message(OSError(28, "No space left on device")) == "No space left on device"
    assert os_message(OSError("plain")) == "plain"


@pytest.mark.parametrize("package", ["kvsim", "kvruntime"])
def test_what_an_option_refuses_is_said_under_every_click(package: str) -> None:
    """Of a bare function's ``ValueError`` older ones leave nothing but the value."""
    types = [param.type for _, command in commands(runs(package).cli) for param in command.params]
    bare = {type.func for type in types if isinstance(type, click.types.FuncParamType)}
    assert bare <= {Path}  # refuses nothing
    with pytest.raises(click.BadParameter, match="allowed are whole numbers up to"):
        TextType(parse_value).convert("9" * 20, None, None)
