"""``python -m validation.reliability.mutants``: small faults, one at a time; how many of them the tests find.

Each mutant is a copy of the tree with one operator, comparison, number, condition or call changed in a function of a
group of modules (``mutant_subjects``).  Every test that reaches the changed line is run, the quickest first, until one
fails.  A mutant that none notices survives: ``equivalents`` says of which nobody could notice it, and why.  A sample is
drawn with a seed, so that a score can be had again.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from validation.reliability.covering import covered, reaching, run_tests, warm
from validation.reliability.equivalents import reason
from validation.reliability.mutant_subjects import GROUPS, ROOT, Group

SCHEMA = "validation.mutants/1"
RECORD = ROOT / "validation" / "results" / "reliability" / "mutants.json"
SECONDS = 30
"""Of the tests of one mutant, as they took on the tree as it is."""
FIRST = 4
"""Tests that are run before the others: to collect a few takes less than to collect all."""
SLOWER = 4
"""So many times as long, and a mutant's tests are stopped: it is found, it hangs."""
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
RENAMED = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """One change, ``number`` of those in its module: the lines of its statement, what stands there, what takes its
    place, and the module's whole text with it."""

    module: str
    number: int
    lines: range
    before: str
    after: str
    text: str

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.module}:{self.lines[0]}: {self.before} -> {self.after}"


def count(source: str) -> int:
    """How many changes of one operator, comparison, ``not``, least or most, whole number above 1, or call on its own
    the functions of a module admit."""
    return sum(1 for _ in _places(ast.parse(source)))


def mutant(module: str, source: str, number: int) -> Mutant:
    """One of them."""
    tree = ast.parse(source)
    statement, node, place = next(islice(_places(tree), number, None))
    before = ast.unparse(node)
    after = _changed(node, place)
    ast.fix_missing_locations(tree)
    return Mutant(module, number, _lines(statement), before, after, ast.unparse(tree))


def _changed(node: Any, place: int) -> str:
    """Changes ``node`` in its tree; how it reads then."""
    if isinstance(node, ast.Expr):  # a call on its own
        node.value = ast.Constant(None)
    elif isinstance(node, ast.Constant):
        node.value = int(str(node.value)) + 1
    elif isinstance(node, ast.Compare):
        node.ops[place] = SWAPPED[type(node.ops[place])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.UnaryOp):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Name):
        node.id = RENAMED[node.id]
    elif isinstance(node, ast.Attribute):
        node.attr = RENAMED[node.attr]
    else:
        node.op = SWAPPED[type(node.op)]()
    return ast.unparse(node)


def _places(tree: ast.AST) -> Iterator[tuple[ast.stmt, ast.AST, int]]:
    """``(statement, node, place)`` of all that can be changed."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {id(each) for function in functions for each in ast.walk(function) if each is not function}
    for function in (each for each in functions if id(each) not in inner):
        for statement in _statements(function.body):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                yield statement, statement, 0
            for node in _own(statement):
                if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPPED:
                    yield statement, node, 0
                elif isinstance(node, ast.Compare):
                    yield from ((statement, node, at) for at, op in enumerate(node.ops) if type(op) in SWAPPED)
                elif (isinstance(node, ast.Constant) and type(node.value) is int and node.value > 1) or (
                    isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
                ):
                    yield statement, node, 0
                elif isinstance(node, ast.Call):
                    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                    if name in RENAMED:
                        yield statement, node.func, 0


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, name, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _own(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement without those of the statements inside it, nor of what it says to people."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop(0)
        yield node
        todo += [
            each
            for each in ast.iter_child_nodes(node)
            if not isinstance(each, ast.stmt | ast.excepthandler | ast.JoinedStr | ast.arguments)
        ]


def _lines(statement: ast.stmt) -> range:
    """Those of a statement, of one with a body those of its head."""
    inner = [each.lineno for each in _statements([statement]) if each is not statement]
    last = min(inner) - 1 if inner else statement.end_lineno or statement.lineno
    return range(statement.lineno, max(last, statement.lineno) + 1)


def of_group(group: Group) -> list[tuple[str, int]]:
    """``(module, number)`` of all of a group's."""
    counts = ((module, count((ROOT / module).read_text(encoding="utf-8"))) for module in group.modules)
    return [(module, number) for module, most in counts for number in range(most)]


def found(mutant: Mutant, folder: Path, tests: Sequence[str], seconds: float) -> bool:
    """Whether one of ``tests`` fails, or hangs, with the mutant in ``folder``, a tree that is put back."""
    file = folder / mutant.module
    whole = file.read_text(encoding="utf-8")
    file.write_text(mutant.text, encoding="utf-8")
    try:
        return any(run_tests(folder, part, seconds) != 0 for part in (tests[:FIRST], tests[FIRST:]) if part)
    finally:
        file.write_text(whole, encoding="utf-8")


def copied(folder: Path) -> None:
    """The tree, as the tests need it."""
    for part in ("kvsim", "kvruntime", "validation", "tests", "docs", "pyproject.toml", "README.md"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)


def score(
    name: str, sample: Sequence[tuple[str, int]], folder: Path, asked: Callable[[Mutant], tuple[list[str], float]]
) -> list[dict[str, Any]]:
    """A row a mutant of the sample: whether it is found by the tests that ``asked`` says, in its seconds."""
    rows = []
    for done, (module, number) in enumerate(sample, 1):
        one = mutant(module, (ROOT / module).read_text(encoding="utf-8"), number)
        tests, seconds = asked(one)
        row = {"module": module, "number": number, "line": one.lines[0], "before": one.before, "after": one.after}
        row |= {"tests": len(tests), "found": found(one, folder, tests, seconds)}
        rows.append(row)
        verdict = "found" if row["found"] else "equivalent" if reason(row) else "SURVIVES"
        print(f"[{name} {done}/{len(sample)}] {verdict}  {one.shown} ({len(tests)} tests)", flush=True)
    return rows


def kept(path: Path, name: str, row: dict[str, Any]) -> None:
    """Puts a group's score into the file."""
    file = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": SCHEMA, "groups": {}}
    file["groups"][name] = row  # type: ignore[index]
    path.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sample of each group and prints its score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="These groups only.")
    parser.add_argument("--sample", type=int, default=40, help="Mutants of a group to run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="The recorded survivors only, beside what was found.")
    parser.add_argument("--test", action="append", default=[], help="With --again: these files, instead of all tests.")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="Of a mutant's tests, the quickest first.")
    parser.add_argument("--cover", type=Path, help="JSON file that keeps which test reaches which line.")
    parser.add_argument("--out", type=Path, default=RECORD, help="JSON file with the score and every mutant.")
    given = parser.parse_args(argv)
    warm()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        copied(folder)
        for name in given.group or GROUPS:
            every = of_group(GROUPS[name])
            before = json.loads(given.out.read_text(encoding="utf-8"))["groups"][name] if given.again else None
            sample = random.Random(given.seed).sample(every, min(given.sample, len(every)))
            if before:
                left = [(row, _again(row)) for row in before["mutants"] if not row["found"]]
                sample, gone = [at for _, at in left if at], [row | {"gone": True} for row, at in left if not at]
            cover = None if given.test else _cover(name, folder, given.cover)
            asked = partial(_asked, cover, given.seconds) if cover is not None else lambda _: (given.test, 10 * SECONDS)
            rows = score(name, sample, folder, asked)
            first = sum(row["found"] for row in rows)
            if before:
                rows = [*(row for row in before["mutants"] if row["found"]), *rows, *gone]
                first = before["found_at_first"]
            row = {"possible": len(every), "seed": given.seed if not before else before["seed"]}
            kept(given.out, name, row | {"found_at_first": first, "mutants": rows})
            print(f"{name}: {sum(row['found'] for row in rows)} of {len(rows)} mutants found ({len(every)} possible)")
    return 0


def _asked(cover: dict[str, Any], seconds: float, mutant: Mutant) -> tuple[list[str], float]:
    """The tests that reach a mutant, and after how long they hang."""
    tests = list(reaching(cover, mutant.module, mutant.lines, seconds))
    return tests, 20 + SLOWER * sum(cover[test]["seconds"] for test in tests)


def _again(row: Any) -> tuple[str, int] | None:
    """A recorded mutant in its module as it is now: of those that read alike the nearest by number; None where what it
    changed is gone."""
    module, source = row["module"], (ROOT / row["module"]).read_text(encoding="utf-8")
    alike = [at for at, (_, node, _) in enumerate(_places(ast.parse(source))) if ast.unparse(node) == row["before"]]
    alike = [at for at in alike if mutant(module, source, at).after == row["after"]]
    return (module, min(alike, key=lambda at: abs(at - row["number"]))) if alike else None


def _cover(name: str, folder: Path, path: Path | None) -> dict[str, Any]:
    """Which test of a group reaches which line; kept in ``path``, where tests that are not there yet are added."""
    group, kept = GROUPS[name], json.loads(path.read_text()) if path and path.exists() else {}
    for test in group.tests:
        if test not in kept.setdefault(name, {}):
            print(f"{name}: what {test} reaches", flush=True)
            kept[name][test] = covered(folder, group.modules, [test], 1800)
            if path:
                path.write_text(json.dumps(kept), encoding="utf-8")
    return {test: of for file in group.tests for test, of in kept[name][file].items()}


if __name__ == "__main__":
    sys.exit(main())
