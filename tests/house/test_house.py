"""The house: who may import whom, lint and types, and one test command for the README and CI."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "kvsim": {"kvsim"},
    "kvruntime": {"kvruntime", "kvsim"},
    "validation": {"validation", "kvruntime", "kvsim"},
}
TEXTS = {"", ".css", ".js", ".json", ".md", ".py", ".sh", ".toml", ".yml"}
FORBIDDEN_NAMES = {"utils.py", "common.py", "base.py", "helpers.py", "misc.py"}


def imports(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_import_directions(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        mine = imports(path)
        assert mine & set(ALLOWED) <= ALLOWED[package], path
        if package == "kvsim":
            assert not mine & {"torch", "triton", "transformers"}, path


def test_only_hf_and_what_measures_it_know_transformers() -> None:
    """The layers and kernels know no transformers."""
    free = [*(ROOT / "kvruntime" / "kivi").rglob("*.py"), *(ROOT / "kvruntime").glob("full.py")]
    assert len(free) > 4
    for path in free:
        assert "transformers" not in imports(path), path


def test_no_drawers() -> None:
    found = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py") if path.name in FORBIDDEN_NAMES]
    assert not found


def test_no_text_file_holds_conflict_markers() -> None:
    """Every text file that git tracks; in a copy without git, every one that is no build product."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = git.stdout.split("\0") if git.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.*")]
    texts = [ROOT / name for name in names if Path(name).suffix in TEXTS and (ROOT / name).is_file()]
    assert ROOT / "CHANGELOG.md" in texts
    assert ROOT / "README.md" in texts
    assert len(texts) > 200
    assert not [(path.name, line) for path in texts for line in conflict_markers(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("marker", ["<" * 7 + " HEAD", "=" * 7, ">" * 7 + " plan", "|" * 7 + " base"])
def test_a_conflict_marker_is_found(marker: str) -> None:
    assert conflict_markers(f"one\n{marker}\ntwo\n") == [2]


def conflict_markers(text: str) -> list[int]:
    """Numbers of the lines that a merge left behind."""
    marker = re.compile(r"(<{7}|>{7}|\|{7})( .*)?|={7}")
    return [number for number, line in enumerate(text.splitlines(), 1) if marker.fullmatch(line)]


def test_one_test_command() -> None:
    command = "python -m pip install -q -e '.[test]' && python -m pytest -n auto"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == command


@pytest.mark.parametrize("arguments", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_lint_and_types(arguments: list[str]) -> None:
    pytest.importorskip(arguments[0], reason=f"{arguments[0]} is not installed")
    run = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def test_launches_say_whether_they_fuse() -> None:
    """Products with sums: Triton 3.9 warns where a launch leaves it open, and 3.10 will not where earlier ones do."""
    launches = 0
    for path in sorted((ROOT / "kvruntime").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            launch = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
            if launch and ast.unparse(node.func.value).endswith("_kernel"):
                launches += 1
                assert "enable_fp_fusion" in {word.arg for word in node.keywords}, (path, node.lineno)
    assert launches >= 17


RATIOS = {"test_config_fuzz.py", "test_model_files.py", "test_sweep.py"}
"""Tests that compare processor times of one machine and moment with each other."""


def test_no_test_is_a_stop_watch() -> None:
    """Nor gives up after some seconds: the tests pass on a slow, loaded machine."""
    clock = re.compile(r"\b(perf_counter|monotonic|time\.time|timeit|timeout=\d{1,2}\b|deadline=\d|\.wait\(\d)")
    for path in sorted((ROOT / "tests").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != Path(__file__).name:
            assert not clock.search(text), path.name
            assert "process_time" not in text or path.name in RATIOS, path.name


def test_examples_in_docstrings() -> None:
    """They print what they say."""
    pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")
    paths = [
        path for name in ALLOWED for path in (ROOT / name).rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")
    ]
    for path in paths:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed, path
    assert paths
