"""Paths, modules and names that documents and docstrings mention are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import source_names

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "validation" / "experiments" / "README.md")
FOLDERS = ("kvsim/", "kvruntime/", "validation/", "tests/", "docs/", ".ci/")
EXAMPLES = {"kvsim/methods/x.py", "kvruntime/methods/x/", "kvsim/methods/int6.py", "kvruntime/methods/int6/"}
"""Files of the method that docs/next-owner.md adds."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_path_and_module_that_a_document_names_is_there(page: Path) -> None:
    """Those between backticks; a bare name of a Python, shell or Markdown file is that of some file.

    A patch of an experiment has files of its own.
    """
    curves = json.loads((ROOT / "kvsim" / "catalog" / "timing.json").read_text(encoding="utf-8"))["kernels"]
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    for said in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        for word in re.split(r"[\s(),;:=]+", said):
            if word.startswith(FOLDERS) and word not in EXAMPLES | curves.keys():
                assert list(ROOT.glob(re.sub("<[^>]*>", "*", word))), word
            elif re.fullmatch(r"[a-z]\w+\.(py|sh|md)", word) and page.parent.name != "experiments":
                assert word in files, word
            elif re.fullmatch(r"(kvsim|kvruntime|validation)(\.[A-Za-z_]\w*)+", word):
                assert source_names.resolves(word), word


@pytest.mark.parametrize("package", source_names.PACKAGES)
def test_every_name_that_a_docstring_refers_to_is_there(package: str) -> None:
    """``:func:`` and its kin, dotted names of modules, and paths."""
    roles = 0
    for module, path in source_names.modules().items():
        if module.split(".")[0] != package:
            continue
        text = path.read_text(encoding="utf-8")
        for role, name in re.findall(r":(mod|func|class|meth|attr|data|exc):`~?([\w.]+)`", text):
            roles += 1
            assert source_names.resolves_in(module, role, name), (module, role, name)
        for name in re.findall(r"``((?:kvsim|kvruntime|validation)(?:\.[A-Za-z_]\w*)+)``", text):
            assert source_names.resolves(name), (module, name)
        for name in re.findall(r"\b((?:kvsim|kvruntime|validation|tests)/[\w/]+\.(?:py|sh|md|json))\b", text):
            assert (ROOT / name).exists(), (module, name)
    assert roles > 10


NOUNS = {"Speed", "Timing", "Finding", "Sharding", "Serving", "Lightning", "Paged", "Stored"}
"""Names of classes that end like participles: words of the field, a method's name, and what a kernel is handed."""


def test_a_class_is_named_by_a_noun() -> None:
    """Not by a participle alone: ``LoadedModel``, not ``Loaded``."""
    classes = {name for module in source_names.modules() for name in source_names.classes(module)}
    assert len(classes) > 200
    alone = {name for name in classes if re.fullmatch(r"_?[A-Z][a-z]*(ed|ing)", name)}
    irregular = {
        "Chosen",
        "Drawn",
        "Found",
        "Given",
        "Held",
        "Kept",
        "Made",
        "Seen",
        "Shown",
        "Taken",
        "Told",
        "Written",
    }
    assert alone | classes & irregular == NOUNS
