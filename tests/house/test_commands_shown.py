"""What the README and the tutorials tell a stranger to type does what they say.

Lines of ``console`` blocks that begin with ``$ kvsim`` run as they stand, ``$ kvruntime`` on a tiny model in place of
the real one; those marked ``# minutes``, ``# GPU`` or ``# runs until`` are parsed alone.  Python blocks run on a tiny
model too.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("README", "glossary", "first-hour"))]
PAGES += [ROOT / "docs" / f"{name}.md" for name in ("size-a-deployment", "halve-memory", "compare-methods")]
PARSED = ("# minutes", "# GPU", "# runs until")


def lines(page: Path) -> list[str]:
    """The lines of a page's console blocks that are typed, ``$ `` taken off."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.strip()]


def typed(tool: str) -> list[str]:
    return sorted({line for page in PAGES for line in lines(page) if line.startswith(f"{tool} ")})


def parses(group: click.Group, words: list[str]) -> None:
    """Raises ``click.UsageError`` for an option or a command that is not there."""
    above = click.Context(group, **group.context_settings)
    name, command, rest = group.resolve_command(above, words)
    assert command is not None
    command.make_context(name, rest, parent=above)


@pytest.mark.parametrize("line", typed("kvsim"))
def test_a_command_of_kvsim_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsim.cli import cli, run

    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[1:]
    if any(mark in line for mark in PARSED):
        parses(cli, words)
    else:
        assert run(words) == 0


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model under the name of the real one."""
    pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
    from runtime_tiny import tiny_directory

    from kvruntime.checkpoints import pull

    folder = tiny_directory(tmp_path / "tiny")
    monkeypatch.setattr(pull, "pull", lambda name, say=None: folder)
    return folder


@pytest.mark.parametrize("line", typed("kvruntime"))
def test_a_command_of_kvruntime_runs(line: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvruntime.cli import cli, run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("A prompt that is short enough for a tiny model.")
    words = shlex.split(line, comments=True)[1:]
    if any(mark in line for mark in PARSED):
        parses(cli, words)
    else:
        assert run([*words, "--model", str(tiny), "--device", "cpu"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_python_runs(page: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, but for the argument's name before transformers 5.24, and 200 tokens for a tiny model's 256."""
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        request.getfixturevalue("tiny")
        import transformers

        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
            code = code.replace("cache=cache", "past_key_values=cache")
        shared: dict[str, Any] = {}
        exec(compile(code.replace(" * 25", " * 4"), str(page), "exec"), shared)
        out, cache = shared["output"], shared["cache"]
        assert cache.nbytes < 2 * 2 * 2 * 32 * 4 * out.shape[1] * 2  # the tiny model's keys and values, exact
        assert capsys.readouterr().out


def test_every_extra_that_is_typed_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    typed_extras = [
        name for page in PAGES for name in re.findall(r"-e '\.\[(\w+)\]'", page.read_text(encoding="utf-8"))
    ]
    assert typed_extras
    assert set(typed_extras) <= project["optional-dependencies"].keys()


def test_a_wrong_option_is_found() -> None:
    from kvsim.cli import cli

    with pytest.raises(click.UsageError, match="No such option"):
        parses(cli, ["plan", "qwen3-8b", "--userz", "3"])
