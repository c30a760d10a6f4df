"""Whether a model's layers work on what the cache gives before they attend, read from their source.

A kvruntime cache gives no tensors, so that a layer which slices, repeats or mixes what it is given cannot run.  Only
what is sure to run is told here, before any weight is used; the rest is refused by
:class:`kvruntime.hf.cache.PendingUpdate` where it does run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

READ = frozenset(("shape", "dtype", "device"))
"""What may be read of keys and values that the cache gave."""

TORCH = frozenset(("torch", "F", "nn"))
"""What a model's source calls PyTorch's modules, whose functions take tensors."""

MAYBE = {
    ast.If: ("body", "orelse"),
    ast.IfExp: ("body", "orelse"),
    ast.For: ("body", "orelse"),
    ast.While: ("body", "orelse"),
    ast.Try: ("body", "handlers", "orelse"),
    ast.Match: ("cases",),
    ast.BoolOp: ("values",),
    ast.Lambda: ("body",),
    ast.FunctionDef: ("body",),
}
"""What may run or not, by node: the names of its fields."""


def touched(model: Any) -> str:
    """Which layer of ``model`` is sure to work on what the cache gives, and how, in words; empty where none is, as
    where a class has no source or a module's ``forward`` was replaced."""
    for kind in dict.fromkeys(type(each) for each in model.modules() if "forward" not in vars(each)):
        if found := _touches(inspect.unwrap(kind.forward)):
            return f"{kind.__name__} works on what the cache gives before it attends ({found})"
    return ""


@lru_cache(maxsize=1024)
def _touches(function: Any) -> str:
    """The first expression sure to work on keys or values that a cache's ``update`` gave; empty where none is."""
    if "update" not in getattr(getattr(function, "__code__", None), "co_names", ()):
        return ""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return ""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for given in (node for node in ast.walk(tree) if _is_update(node)):
        names, branches = {each.id for each in _targets(given)}, _branches(given, parents)
        for read in (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names):
            if _is_work(read, parents) and _branches(read, parents) <= branches and _follows(read, given, tree):
                return _shown(read, parents)
    return ""


def _is_update(node: ast.AST) -> bool:
    """Whether it is ``key, value = past_key_values.update(key, value, ...)``, or a ``cache``'s."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and len(node.value.args) > 1):
        return False
    called = node.value.func
    if not (isinstance(called, ast.Attribute) and called.attr == "update" and len(_targets(node)) == 2):
        return False
    return any(word in ast.unparse(called.value).lower() for word in ("past", "cache"))


def _targets(node: Any) -> list[ast.Name]:
    """The names that an assignment gives values to."""
    return [each for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _branches(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> set[tuple[ast.AST, str]]:
    """The parts of a function around ``node`` that may run or not."""
    found = set()
    while node in parents:
        child, node = node, parents[node]
        for name in MAYBE.get(type(node), ()):
            part = getattr(node, name)
            if child is part or (isinstance(part, list) and child in part):
                found.add((node, name))
    return found


def _follows(read: ast.Name, given: Any, tree: ast.AST) -> bool:
    """Whether what is ``read`` is sure to be what ``given`` assigned: nothing returned or gave the name another value
    between the two."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and given.end_lineno < node.lineno and (node.end_lineno or 0) < read.lineno:
            if isinstance(node, ast.Return | ast.Raise | ast.Break | ast.Continue):
                return False
            stored = (each for each in ast.walk(node) if isinstance(each, ast.Name) and each.id == read.id)
            if any(isinstance(each.ctx, ast.Store | ast.Del) for each in stored):
                return False
    return read.lineno > given.end_lineno


def _is_work(name: ast.Name, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a key or value is calculated with, sliced or asked for what only a tensor has.  A function that it is
    given to may be the one that attends."""
    parent = parents[name]
    if isinstance(parent, ast.Attribute):
        return parent.attr not in READ
    parent = parents[parent] if isinstance(parent, ast.keyword) else parent
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute):
        return ast.unparse(parent.func).partition(".")[0] in TORCH
    return isinstance(parent, ast.BinOp) or (isinstance(parent, ast.Subscript) and parent.value is name)


def _shown(name: ast.Name, parents: dict[ast.AST, ast.AST]) -> str:
    """The expression around a name, as far as one line holds it."""
    node: ast.AST = name
    while isinstance(parents[node], ast.expr | ast.keyword) and len(ast.unparse(parents[node])) < 60:
        node = parents[node]
    return ast.unparse(node)
