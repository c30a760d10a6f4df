"""The one printer of tables: forms of the same head and rows."""

from __future__ import annotations

import pytest

from kvsim.cli import run
from kvsim.output.tables import compact, plain, table

HEADS, ROWS = ["cache", "MiB", "note"], [["fp16", "72.00", ""], ["kivi", "9.1", "+2 %"]]


def test_the_forms() -> None:
    assert table(HEADS, ROWS).splitlines() == [
        "| cache |   MiB | note |",
        "| ----- | ----: | ---: |",
        "| fp16  | 72.00 |      |",
        "| kivi  |   9.1 | +2 % |",
    ]
    assert compact(HEADS, ROWS).splitlines()[:3] == [
        "| cache | MiB | note |",
        "| --- | ---: | ---: |",
        "| fp16 | 72.00 |  |",
    ]
    assert plain(HEADS, ROWS) == table(HEADS, ROWS)


def test_which_columns_go_right() -> None:
    rows = [["1", "2"], ["none", "3"]]
    assert plain(["a", "b"], rows).splitlines()[1] == "| ---: | --: |"  # a figure, or why there is none
    assert compact(["a", "b"], rows).splitlines()[1] == "| --- | ---: |"
    assert compact(["a", "b"], rows, left=(1,)).splitlines()[1] == "| ---: | --- |"
    assert compact(["a"], []).splitlines() == ["| a |", "| --- |"]


def test_a_row_may_end_early_and_not_late() -> None:
    assert plain(["a", "b"], [["x"]]).splitlines()[2] == "| x   |     |"
    with pytest.raises(ValueError, match="a row of 2 cells under 1 heads"):
        plain(["a"], [["x", "y"]])


@pytest.mark.parametrize("width", [30, 60, 99])
def test_a_narrow_terminal_gets_narrow_tables(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost: the columns follow one another, each time after the first, and none is cut."""
    heads = ["method", *(f"column {number}" for number in range(8))]
    rows = [["fp16", *(str(10**number) for number in range(8))]]
    whole = table(heads, rows).splitlines()
    assert len(whole) == 3
    monkeypatch.setenv("COLUMNS", str(width))
    shown = table(heads, rows)
    assert max(map(len, shown.splitlines())) <= width
    blocks = [[line.strip("| ").split(" | ") for line in block.splitlines()] for block in shown.split("\n\n")]
    assert all(block[0][0].strip() == "method" for block in blocks)
    assert [cell.strip() for block in blocks for cell in block[0][1:]] == heads[1:]
    assert [cell.strip() for block in blocks for cell in block[2][1:]] == rows[0][1:]


def test_a_column_wider_than_the_terminal_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert table(["a", "b"], [["x", "y" * 40]]).splitlines()[2] == f"| x   | {'y' * 40} |"


@pytest.mark.parametrize(
    "command",
    [
        "estimate qwen3-8b --gpu 4090 --ctx 32k --batch 4",
        "plan qwen3-8b --gpu 4090 --users 8",
        "plan llama-3.1-405b --gpu h100-sxm:8 --users 8",
        "breakeven gpt2 --gpu l4 --batch 4 --ctx 1k",
        "compare qwen3-8b",
        "explain qwen3-8b",
        "offload qwen3-8b --gpu h100",
        "goodput gpt2 --gpu l4 --rate 1 --requests 40",
        "models qwen3",
        "hardware",
        "hardware h100",
        "-h",
        "plan -h",
    ],
)
def test_a_screen_of_60_columns_has_no_longer_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    run(command.split())
    shown = capsys.readouterr()
    assert not shown.err
    assert len(shown.out.splitlines()) > 8
    assert not [line for line in shown.out.splitlines() if len(line) > 60]


def test_prose_is_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe's lines are those of the document that it is pasted into."""
    assert run(["plan", "gpt2", "--gpu", "l4", "--users", "2"]) == 0
    assert "note: first token: of a long prompt; 95% of the prompts are no longer" in capsys.readouterr().out
