"""The house: who may import whom, lint and types, and one test command for the README and CI."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
import source_names

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "kvsim": {"kvsim"},
    "kvruntime": {"kvruntime", "kvsim"},
    "validation": {"validation", "kvruntime", "kvsim"},
}
TEXTS = {"", ".css", ".js", ".json", ".md", ".py", ".sh", ".toml", ".yml"}
FORBIDDEN_NAMES = {"utils.py", "common.py", "base.py", "helpers.py", "misc.py"}


FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "kvsim": (
        ("whole_numbers", "nearest", "layout", "vectorize", "search", "atomic", "install", "regular_files"),
        ("catalog",),
        ("hardware", "commandline", "finite_json"),
        ("methods", "models"),
        ("engines",),
        ("memory",),
        ("latency",),
        ("analysis",),
        ("specs",),
        ("output",),
        ("commands",),
        ("cli",),
        ("__main__",),
    ),
    "kvruntime": (
        ("kernels", "specs"),
        ("methods",),
        ("paged",),
        ("prefix_store",),
        ("hf",),
        ("engine", "checkpoints", "eval", "vllm"),
        ("kvruntime",),
        ("bench",),
        ("calibrate", "selfcheck", "commands"),
        ("cli",),
        ("__main__",),
    ),
    "validation": (
        ("scales", "recorded"),
        ("ranks",),
        ("claims",),
        ("latency",),
        ("documents", "planners"),
        ("report", "reliability", "run"),
        ("cli",),
        ("__main__",),
    ),
}
"""Package -> its folders and modules, the lowest floor first: each imports from floors below its own alone.

A package's own name is its ``__init__``; where it is not among them, that imports nothing of the package."""

NEVER: tuple[tuple[str, str, str], ...] = (
    (r"kvruntime\.kernels\b.*", r"kvruntime\.(?!kernels\b).*", "kernels know nothing of kvruntime"),
    (r"kvruntime\.methods\.(\w+)\..*", r"kvruntime\.methods\.(?!\1\b|rows\b|room\b)\w+.*", "a method knows no other"),
    (
        r"kvruntime\.(?!methods\b).*",
        r"kvruntime\.methods\.(?!rows\b|room\b)\w+.*",
        "methods are known, not one of them",
    ),
    (r"kvsim\b.*", r"(torch|triton|transformers|matplotlib\.pyplot)\b.*", "a planner needs none of them"),
    (
        r"kvruntime\.(?!(?:hf|engine\.decoders|checkpoints|eval|bench|selfcheck)\b).*",
        r"transformers\b.*",
        "what reads its models, or judges by them",
    ),
)
"""Modules (a pattern), what they never import, and why."""


def module_name(path: Path) -> str:
    """``kvsim.engines.vllm``; of a package's ``__init__.py`` the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file, of every folder that is a package."""
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if path.with_name("__init__.py").exists()]
    return {module_name(path): path for path in files}


def imported(path: Path, known: Collection[str] = ()) -> set[str]:
    """Dotted names of every module that a file imports, anywhere in it; of ``from a import b`` the module ``a.b`` where
    it is among ``known``."""
    names: set[str] = set()
    for node in ast.walk(source_names.tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= full & set(known) | ({node.module} if full - set(known) else set())
    return names


def imports(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, anywhere in it."""
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("package", ALLOWED)
def test_import_directions(package: str) -> None:
    files = modules(package)
    assert files
    for path in files.values():
        assert imports(path) & set(ALLOWED) <= ALLOWED[package], path


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_runs_up(package: str) -> None:
    """A folder imports floors below its own, not those above and not its neighbours."""
    floor = {name: level for level, names in enumerate(FLOORS[package]) for name in names}
    files = modules(package)
    assert {name.split(".")[1] for name in files if "." in name} == floor.keys() - {package}
    wrong = []
    for name, path in files.items():
        own = name.split(".")[1] if "." in name else package
        for other in imported(path, files):
            at = other.split(".")[1] if other.startswith(f"{package}.") else package if other == package else own
            if at != own and floor.get(at, -1) >= floor.get(own, 0):
                wrong.append(f"{name} -> {other}")
    assert not wrong


@pytest.mark.parametrize(("importer", "never", "why"), NEVER, ids=[why for _, _, why in NEVER])
def test_what_is_never_imported(importer: str, never: str, why: str) -> None:
    wrong, matching = [], 0
    for package in ALLOWED:
        files = modules(package)
        for name, path in files.items():
            match = re.fullmatch(importer, name)
            matching += match is not None
            pattern = "" if match is None else never.replace(r"\1", match[1] if match.groups() else "")
            wrong += [f"{name} -> {each}" for each in imported(path, files) if match and re.fullmatch(pattern, each)]
    assert matching
    assert not wrong, why


@pytest.mark.parametrize("package", ALLOWED)
def test_no_modules_import_each_other(package: str) -> None:
    """Not in a circle either, wherever in a file the import stands."""
    files = modules(package)
    arrows = {name: sorted(imported(path, files) & files.keys() - {name}) for name, path in files.items()}
    done: set[str] = set()

    def circle(name: str, way: tuple[str, ...]) -> tuple[str, ...]:
        if name in way:
            return (*way[way.index(name) :], name)
        if name not in done:
            for other in arrows[name]:
                if found := circle(other, (*way, name)):
                    return found
            done.add(name)
        return ()

    assert not [" -> ".join(found) for name in files if (found := circle(name, ()))]


MAX_COMMAND = 80
"""Lines of a command's function."""


def test_what_a_process_says_need_not_be_text() -> None:
    """What drivers, compilers and pip print in whatever encoding does not end a command: ``errors="replace"``."""
    strict = []
    for path in source_names.modules().values():
        for node in ast.walk(source_names.tree(path)):
            names = {word.arg for word in node.keywords} if isinstance(node, ast.Call) else set()
            if "text" in names and "errors" not in names and re.search(r"\.(run|Popen)$", ast.unparse(node.func)):
                strict.append(f"{path.relative_to(source_names.ROOT)}:{node.lineno}")
    assert not strict


def test_no_command_is_a_whole_program() -> None:
    lengths = {}
    for package in ALLOWED:
        for path in modules(package).values():
            for node in ast.walk(source_names.tree(path)):
                if isinstance(node, ast.FunctionDef) and any(map(_is_command, node.decorator_list)):
                    assert node.end_lineno is not None
                    lengths[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert len(lengths) > 30
    assert not {name: length for name, length in lengths.items() if length > MAX_COMMAND}


def _is_command(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func).rpartition(".")[2] in ("command", "group")


MAX_POSITIONAL = 10
"""Positional parameters of a function of kvruntime that launches kernels, or calls one that does; what travels together
is a named tuple."""


HANDED = ("kvruntime/vllm/",)
"""Where another library says the signature: vLLM's attention backends."""


def test_no_kernel_wrapper_takes_a_row_of_parameters() -> None:
    """Every function of kvruntime but the kernels themselves, whose parameters are pointers and strides."""
    numbers, kernels = {}, 0
    for path in modules("kvruntime").values():
        for node in ast.walk(source_names.tree(path)):
            if isinstance(node, ast.FunctionDef) and not path.relative_to(ROOT).as_posix().startswith(HANDED):
                if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                    kernels += 1
                else:
                    own = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
                    numbers[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = len(own) - (own[:1] == ["self"])
    assert kernels > 20
    assert max(numbers.values()) > 5
    assert not {name: number for name, number in numbers.items() if number > MAX_POSITIONAL}


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


MAX_LINE = 120
"""Characters of a line, as ``line-length`` in pyproject.toml; ruff lets a line pass whose end is ``# type: ignore``."""


def test_no_line_is_too_long() -> None:
    files = [path for folder in (*ALLOWED, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    long = {str(path.relative_to(ROOT)): long_lines(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: numbers for name, numbers in long.items() if numbers}


@pytest.mark.parametrize("tail", ["", "  # type: ignore", "  # noqa: E501", "é"])
def test_a_line_that_is_too_long_is_found(tail: str) -> None:
    assert long_lines(f"{'x' * (MAX_LINE - len(tail))}{tail}\n{'x' * (MAX_LINE + 1 - len(tail))}{tail}\n") == [2]


def long_lines(text: str) -> list[int]:
    """Numbers of the lines of more than ``MAX_LINE`` characters."""
    return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > MAX_LINE]


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
        for node in ast.walk(source_names.tree(path)):
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
    for path in sorted((ROOT / "tests").rglob("*.py")):
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
