"""What is installed and shipped: files that git tracks are in a wheel where commands need them, and all in an sdist."""

from __future__ import annotations

import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kvsim", "kvruntime", "validation")
NOT_INSTALLED = ("validation/record.sh", "validation/experiments/*")
"""Files of a package that only a checkout uses."""


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("no checkout of git: its list of files is not known")
    return [name for name in git.stdout.split("\0") if name and (ROOT / name).is_file()]


def setuptools_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def matches(name: str, pattern: str) -> bool:
    """As setuptools globs: a star stays within a folder."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def test_a_wheel_holds_every_file_of_its_packages(tracked: list[str]) -> None:
    table = setuptools_table()
    assert table["include-package-data"] is table["packages"]["find"]["namespaces"] is False
    patterns = [f"{package}/{glob}" for package, globs in table["package-data"].items() for glob in globs]
    files = [name for name in tracked if name.startswith(tuple(f"{package}/" for package in PACKAGES))]
    data = [name for name in files if not name.endswith(".py")]
    left_out = [name for name in data if not any(matches(name, pattern) for pattern in patterns)]
    assert len(data) > 40
    assert [name for name in left_out if not any(matches(name, pattern) for pattern in NOT_INSTALLED)] == []
    assert [pattern for pattern in patterns if not any(matches(name, pattern) for name in data)] == []


def test_every_folder_with_code_is_a_package(tracked: list[str]) -> None:
    code = [name for name in tracked if name.endswith(".py") and name.startswith(PACKAGES)]
    folders = {name.rpartition("/")[0] for name in code if not matches(name, NOT_INSTALLED[-1])}
    assert [folder for folder in folders if f"{folder}/__init__.py" not in tracked] == []


def test_a_source_distribution_holds_every_file(tracked: list[str]) -> None:
    """Its tests run: they, the documents they read and the results are in it."""
    grafted = ["kvsim/", "kvruntime/"]
    named = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}  # these are in it by themselves
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        command, *words = line.split()
        if command == "graft":
            grafted += [f"{word}/" for word in words]
        elif command == "include":
            named |= set(words)
    assert [name for name in tracked if name not in named and not name.startswith(tuple(grafted))] == []


@pytest.mark.parametrize("package", ["kvsim", "kvruntime"])
def test_libraries_say_that_they_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in setuptools_table()["package-data"][package]
