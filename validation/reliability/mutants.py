"""``python -m validation.reliability.mutants``: small faults in the formulas, one at a time; how many the tests find.

Each mutant is a copy of the tree with one operator, comparison, constant or condition changed in a module of
:data:`SUBJECTS`, and that module's tests run on it until one fails.  A mutant that none of them notices survives.  The
sample is drawn with a seed, so that a score can be had again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
"""Of one mutant's tests; one that runs longer is found (it hangs)."""
LAYOUTS = ("test_methods.py", "test_record.py", "test_layouts.py", "test_explain.py")
SUBJECTS: dict[str, tuple[str, ...]] = {
    **{
        path.relative_to(ROOT).as_posix(): (*LAYOUTS, "test_timing.py")
        for path in sorted((ROOT / "kvsim" / "methods").glob("*.py"))
    },
    "kvsim/layout.py": LAYOUTS,
    "kvsim/memory/estimate.py": LAYOUTS,
    "kvsim/memory/capacity.py": ("test_capacity.py", "test_parallel.py", "test_page.py"),
}
"""Module -> its tests, of tests/kvsim."""
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Mutant(NamedTuple):
    """One change: the module, its line, what stands there and what takes its place, and the module's whole text."""

    module: str
    line: int
    before: str
    after: str
    text: str


def mutants(module: str) -> Iterator[Mutant]:
    """Every change of one operator, comparison, condition or whole number above 1 in a function of ``module``."""
    source = (ROOT / module).read_text(encoding="utf-8")
    count = sum(1 for _ in _places(ast.parse(source)))
    for number in range(count):
        tree = ast.parse(source)
        node, place = list(_places(tree))[number]
        before = ast.unparse(node)
        if isinstance(node, ast.Constant):
            node.value = int(str(node.value)) + 1
        elif isinstance(node, ast.Compare):
            node.ops[place] = SWAPPED[type(node.ops[place])]()  # type: ignore[call-overload]
        else:
            node.op = SWAPPED[type(node.op)]()  # type: ignore[attr-defined]
        yield Mutant(module, node.lineno, before, ast.unparse(node), ast.unparse(tree))  # type: ignore[attr-defined]


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, int]]:
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in (each for statement in function.body for each in ast.walk(statement)):
            if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
                yield node, 0
            elif isinstance(node, ast.Compare):
                yield from ((node, place) for place, op in enumerate(node.ops) if type(op) in SWAPPED)
            elif isinstance(node, ast.Constant) and type(node.value) is int and node.value > 1:
                yield node, 0


def found(mutant: Mutant, folder: Path) -> bool:
    """Whether a test of the module fails on the mutant in ``folder``, a copy of the tree that is put back."""
    file = folder / mutant.module
    whole = file.read_text(encoding="utf-8")
    file.write_text(mutant.text, encoding="utf-8")
    tests = [f"tests/kvsim/{name}" for name in SUBJECTS[mutant.module]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=SECONDS, check=False)
        return ran.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_text(whole, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sample and prints its score; 1 where the unchanged tree already fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="Mutants to run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with the score and the survivors.")
    given = parser.parse_args(argv)
    every = [mutant for module in SUBJECTS for mutant in mutants(module)]
    sample = random.Random(given.seed).sample(every, min(given.sample, len(every)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("kvsim", "kvruntime", "validation", "tests", "docs", "pyproject.toml", "README.md"):
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
        for module in sorted({mutant.module for mutant in sample}):
            if found(Mutant(module, 0, "", "", (folder / module).read_text(encoding="utf-8")), folder):
                print(f"the tests of {module} fail on the tree as it is", file=sys.stderr)
                return 1
        survivors = []
        for number, mutant in enumerate(sample, 1):
            caught = found(mutant, folder)
            survivors += [] if caught else [mutant]
            what = f"{mutant.module}:{mutant.line}: {mutant.before} -> {mutant.after}"
            print(f"[{number}/{len(sample)}] {'found' if caught else 'SURVIVES'}  {what}", flush=True)
            if given.out:
                score = {"possible": len(every), "seed": given.seed, "sample": number, "found": number - len(survivors)}
                rows = [mutant._asdict() | {"text": None} for mutant in survivors]
                given.out.write_text(json.dumps(score | {"survivors": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(sample) - len(survivors)} of {len(sample)} mutants found ({len(every)} possible)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
