"""The one printer of tables: forms of the same head and rows."""

from __future__ import annotations

import pytest

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
