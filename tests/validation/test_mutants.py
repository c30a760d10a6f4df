"""The mutation run: what it changes, which tests it asks, that what it calls found is found, and its record."""

from __future__ import annotations

import ast
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from validation.reliability import covering, equivalents, mutant_subjects, mutants

SOURCE = dedent(
    '''
    LIMIT = 7

    def held(rows, most=9):
        """What 5 rows hold."""
        count = max(rows) + 2
        if not rows or count >= most:
            rows.clear()
            raise ValueError(f"{count + 1} rows")
        count -= 1
        return count // 2
    '''
)


def test_every_kind_of_change_and_nothing_that_is_said_to_people() -> None:
    found = [mutants.mutant("m.py", SOURCE, number) for number in range(mutants.count(SOURCE))]
    changes = {(each.before, each.after) for each in found}
    assert changes == {
        ("max", "min"),
        ("max(rows) + 2", "max(rows) - 2"),
        ("2", "3"),
        ("not rows or count >= most", "not rows and count >= most"),
        ("not rows", "not not rows"),
        ("count >= most", "count > most"),
        ("rows.clear()", "None"),
        ("count -= 1", "count += 1"),
        ("count // 2", "count * 2"),
    }
    texts = {each.text for each in found}
    assert len(texts) == len(found) == 10  # two numbers are 2
    assert all(ast.unparse(ast.parse(SOURCE)) != text for text in texts)
    (condition,) = [each for each in found if each.after == "not rows and count >= most"]
    assert condition.lines == range(7, 8)  # of the `if`, not of what it does


def test_tests_are_those_that_reach_a_line_the_quickest_first() -> None:
    cover = {
        "slow": {"seconds": 9.0, "lines": {"m.py": [7, 8]}},
        "quick": {"seconds": 1.0, "lines": {"m.py": [8]}},
        "elsewhere": {"seconds": 0.1, "lines": {"m.py": [3], "n.py": [8]}},
    }
    assert list(covering.reaching(cover, "m.py", range(8, 9), 20)) == ["quick", "slow"]
    assert list(covering.reaching(cover, "m.py", range(8, 9), 5)) == ["quick"]
    assert list(covering.reaching(cover, "m.py", range(7, 8), 5)) == ["slow"]
    assert list(covering.reaching(cover, "m.py", range(1, 3), 5)) == []


class Graph:
    """Of one process, as a CUDA graph is: elsewhere its end is that of the process."""

    def __init__(self) -> None:
        self.process, self.cycle = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(3)


@pytest.fixture
def left_in_a_cycle() -> Iterator[None]:
    """A graph that nobody holds and no collection has met."""
    gc.disable()
    Graph()
    yield
    gc.enable()


@pytest.mark.usefixtures("left_in_a_cycle")
def test_lines_and_verdicts_of_real_runs(tmp_path: Path) -> None:
    """A package and its tests in a folder: one test reaches the line, and one mutant of two is found."""
    (tmp_path / "kvsim").mkdir()
    module = tmp_path / "kvsim" / "__init__.py"
    module.write_text("def more(x):\n    return x + 2\n\ndef other():\n    return 1\n")
    (tmp_path / "test_more.py").write_text(
        "import gc\n\nfrom kvsim import more, other\n\ngc.collect()\n\n"
        "def test_more():\n    assert more(0) == 2\n\ndef test_other():\n    other()\n"
    )
    cover = covering.covered(tmp_path, ["kvsim/__init__.py"], ["test_more.py"], 60)
    reached = {name.rpartition("::")[2]: each["lines"] for name, each in cover.items()}
    assert reached == {"test_more": {"kvsim/__init__.py": [1, 2]}, "test_other": {"kvsim/__init__.py": [4, 5]}}
    source = module.read_text()
    wrong = mutants.Mutant("kvsim/__init__.py", 0, range(2, 3), "x + 2", "x - 2", source.replace("x + 2", "x - 2"))
    same = wrong._replace(text=source.replace("x + 2", "2 + x"))
    assert [mutants.found(each, tmp_path, ["test_more.py"], 60) for each in (wrong, same)] == [True, False]
    assert module.read_text() == source


def test_the_groups_are_of_files_that_are_there() -> None:
    for group in mutant_subjects.GROUPS.values():
        assert len(group.modules) >= 5
        for name in (*group.modules, *group.tests):
            assert (mutant_subjects.ROOT / name).is_file(), name


def test_what_is_called_equivalent_survived() -> None:
    """And nothing is excused that no run has met."""
    groups = json.loads(mutants.RECORD.read_text(encoding="utf-8"))["groups"]
    left = [row for group in groups.values() for row in group["mutants"] if not row["found"]]
    excused = set(equivalents.reasons())
    assert excused == {(row["module"], row["before"], row["after"]) for row in left if equivalents.reason(row)}
    for group in groups.values():
        assert len({(row["module"], row["number"]) for row in group["mutants"]}) == len(group["mutants"])
        assert group["found_at_first"] <= sum(row["found"] for row in group["mutants"])


def test_a_tree_whose_tests_fail_is_no_subject(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(RuntimeError, match=r"test_it\.py fails on the tree as it is"):
        covering.covered(tmp_path, [], ["test_it.py"], 60)
