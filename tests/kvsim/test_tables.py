"""The one printer of tables: three forms of the same head and rows."""

from __future__ import annotations

import pytest

from kvsim.output.tables import compact, plain, table

HEADS, ROWS = ["cache", "MiB", "note"], [["fp16", "72.00", ""], ["kivi", "9.1", "+2 %"]]


def test_the_three_forms() -> None:
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
    assert plain(HEADS, ROWS).splitlines() == ["cache    MiB  note", "fp16   72.00", "kivi     9.1  +2 %"]


def test_which_columns_go_right() -> None:
    rows = [["1", "2"], ["none", "3"]]
    assert plain(["a", "b"], rows).splitlines()[1] == "   1  2"  # a figure, or why there is none
    assert compact(["a", "b"], rows).splitlines()[1] == "| --- | ---: |"
    assert compact(["a", "b"], rows, left=(1,)).splitlines()[1] == "| ---: | --- |"
    assert compact(["a"], []).splitlines() == ["| a |", "| --- |"]


def test_a_row_may_end_early_and_not_late() -> None:
    assert plain(["a", "b"], [["x"]]) == "a  b\nx"
    with pytest.raises(ValueError, match="a row of 2 cells under 1 heads"):
        plain(["a"], [["x", "y"]])
