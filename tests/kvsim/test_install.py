"""Hints name the extra that holds what is missing, and a command that installs it from where this install came."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvsim import install

ROOT = Path(__file__).parents[2]
PACKAGES = ("kvsim", "kvruntime", "validation")
DISTRIBUTION = {"optimum": "optimum-quanto", "tiny_turboquant": "tiny-turboquant", "lm_eval": "lm-eval"}
DISTRIBUTION |= dict.fromkeys(("huggingface_hub", "tokenizers", "tqdm"), "transformers")
"""Module -> the distribution that brings it, where they differ."""

SUPPORT = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
"""What scripts of experiments take from the tests."""
PLANNERS = {"fitcheck", "hf_mem", "hf_vram_calc", "kvfit", "llm_analysis", "planner", "ridgepoint"}
PLANNERS |= {"servcalc", "vramcalc"}
"""What validation.planners.compare installs for itself."""


def extras() -> dict[str, set[str]]:
    """Extra -> the distributions that it names itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        extra: {re.split(r"[\[<>=!; ]", each)[0] for each in needed}
        for extra, needed in project["optional-dependencies"].items()
    }


@pytest.mark.parametrize("module", install.EXTRA)
def test_an_extra_holds_what_it_is_named_for(module: str) -> None:
    assert DISTRIBUTION.get(module, module) in extras()[install.EXTRA[module]]


def test_every_package_that_is_imported_has_its_extra() -> None:
    imported = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    others = imported - sys.stdlib_module_names - set(PACKAGES) - {"click", "vllm"} - PLANNERS - SUPPORT
    assert others <= set(install.EXTRA)


def test_no_hint_points_at_an_index_or_at_an_extra_that_is_not_there() -> None:
    known = extras()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "pip install 'kvsim" not in text, path
        for extra in re.findall(r"""install_hint\(["'](\w+)["']\)""", text):
            assert extra in known, path


def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: dict[str, object] | None) -> None:
    """An installation outside a clone, with what pip recorded of where it came from."""
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "kvsim" / "install.py"))
    text = None if url is None else json.dumps(url)
    monkeypatch.setattr(install, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))


def test_a_clone_is_named() -> None:
    assert install.install_hint("plan") == f"python -m pip install -e {install.shlex.quote(f'{ROOT}[plan]')}"


def test_a_clone_in_a_folder_with_spaces_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "my clone"
    (clone / "kvsim").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(install, "__file__", str(clone / "kvsim" / "install.py"))
    assert install.install_hint("plan").endswith(f"-e '{clone.resolve()}[plan]'")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ({"url": "file:///w/kvsim-1-py3-none-any.whl", "archive_info": {}}, "'kvsim[plan] @ file:///w/kvsim-1-"),
        ({"url": "file:///w/clone", "dir_info": {}}, "'kvsim[plan] @ file:///w/clone'"),
        (
            {"url": "https://x.org/kvsim", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "'kvsim[plan] @ git+https://x.org/kvsim@abc'",
        ),
        (None, "-e '.[plan]' in a clone of kvsim"),
    ],
)
def test_any_other_install_is_repeated_with_the_extra(
    url: dict[str, object] | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch, tmp_path, url)
    assert install.install_hint("plan").startswith(f"python -m pip install {said}")


@pytest.mark.parametrize(
    ("module", "extra"),
    [("scipy.optimize", "validation"), ("torch", "runtime"), ("huggingface_hub", "runtime"), ("hqq", "peers")],
)
def test_a_missing_module_names_its_extra(module: str, extra: str) -> None:
    assert install.missing_hint(module) == f": install it with {install.install_hint(extra)}"


@pytest.mark.parametrize("module", [None, "", "nothing", "kvsim.x"])
def test_a_module_of_no_extra_is_no_hint(module: str | None) -> None:
    assert install.missing_hint(module) == ""


def test_validation_time_without_scipy() -> None:
    pytest.importorskip("numpy", reason="numpy is not installed")
    script = "import sys; sys.modules['scipy'] = None; from validation import cli; sys.exit(cli.run(['time']))"
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert install.install_hint("validation") in child.stderr
    assert child.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["numpy", "matplotlib", "torch", "scipy"])
def test_a_command_of_validation_names_the_extra_that_holds_all_it_needs(module):
    assert install.missing_hint(module, "validation") == f": install it with {install.install_hint('validation')}"


def test_what_validation_does_not_hold_keeps_its_own_extra():
    assert install.missing_hint("hqq", "validation") == install.missing_hint("hqq")
