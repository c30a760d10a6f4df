"""Names that the sources define, read without importing them: what a docstring or a document may refer to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("kvsim", "kvruntime", "validation")
Names = dict[str, "Names"]
"""A name, and those inside it (a class's)."""


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    out = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        *folders, name = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(folders if name == "__init__" else [*folders, name])] = path
    return out


@cache
def tree(path: Path) -> ast.Module:
    """A source, parsed once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def defined(module: str) -> Names:
    return dict(_bound(tree(modules()[module]).body))


def classes(module: str) -> list[str]:
    """Names of the classes that a module defines, at its top or within another."""
    return [node.name for node in ast.walk(tree(modules()[module])) if isinstance(node, ast.ClassDef)]


def _bound(body: list[ast.stmt]) -> Iterator[tuple[str, Names]]:
    """What statements bind, in every branch of theirs; a class binds what its methods give ``self``, too."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            given = {
                inner.attr: {}
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "self"
            }
            yield node.name, given | dict(_bound(node.body))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, {}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, {}) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((name.id, {}) for to in targets for name in ast.walk(to) if isinstance(name, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            branches = [node.body, node.orelse, getattr(node, "finalbody", [])]
            for branch in [*branches, *(handler.body for handler in getattr(node, "handlers", ()))]:
                yield from _bound(branch)


def resolves(name: str) -> bool:
    """Whether a full dotted name is a module's, or leads from a module to what it defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in modules():
            names, rest = defined(module), parts[length:]
            while rest and rest[0] in names:
                names, rest = names[rest[0]], rest[1:]
            return not rest
    return False


def resolves_in(module: str, role: str, name: str) -> bool:
    """Whether a docstring of ``module`` may say ``:role:`name```.

    The module's own, a full dotted name, or a member of some class of the package (its class may be left out).
    """
    if resolves(name) or resolves(f"{module}.{name}"):
        return True
    if role not in {"meth", "attr"}:
        return False
    *owner, member = name.split(".")
    return any(
        member in members and owner in ([], [known])
        for other in modules()
        if other.split(".")[0] == module.split(".")[0]
        for known, members in defined(other).items()
    )
