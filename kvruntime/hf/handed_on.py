"""Whether a model's layers hand on what the cache gives to the attention function as it is, read from their source.

A kvruntime cache gives no tensors, so that a layer which slices, repeats or mixes what it is given cannot run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
"""transformers' table of attention functions: what is taken from it attends."""

KNOWN = frozenset(("expand_kv", "_upcast_and_reordered_attn"))
"""Methods that may be given them: of latents (:mod:`kvruntime.hf.latents`), and one of eager attention alone."""

READ = frozenset(("shape", "dtype", "device"))
"""What may be read of them."""


def touched(model: Any) -> str:
    """Which layer of ``model`` does not hand on what the cache gives, and what it does instead, in words; empty where
    all do, or where a class has no source."""
    for kind in dict.fromkeys(map(type, model.modules())):
        for function in _methods(kind):
            if found := _touches(function):
                return f"{kind.__name__} works on what the cache gives before it attends ({found})"
    return ""


def _methods(kind: type) -> Iterator[Any]:
    """The methods of a class that call ``update``."""
    for name in dict.fromkeys(name for base in kind.__mro__ for name in vars(base)):
        function = inspect.unwrap(method) if inspect.isfunction(method := getattr(kind, name, None)) else None
        if "update" in getattr(getattr(function, "__code__", None), "co_names", ()):
            yield function


@lru_cache(maxsize=1024)
def _touches(function: Any) -> str:
    """The first expression that works on keys or values that the ``update`` of a cache gave; empty where none does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return ""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    attends = {each.id for node in ast.walk(tree) if _takes_function(node) for each in _targets(node)}
    for given in (node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_update(node)):
        names, end = {each.id for each in _targets(given)}, given.end_lineno or given.lineno
        read = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
        for node in read:
            if node.id in names and node.lineno > end and not _is_handed_on(node, parents, attends):
                return _shown(node, parents)
    return ""


def _takes_function(node: ast.AST) -> bool:
    """Whether it is ``attention_interface = ALL_ATTENTION_FUNCTIONS...``."""
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    return value is not None and any(isinstance(each, ast.Name) and each.id == FUNCTIONS for each in ast.walk(value))


def _is_update(node: ast.Assign) -> bool:
    """Whether it is ``key, value = cache.update(key, value, ...)``."""
    if not (isinstance(node.value, ast.Call) and len(node.value.args) > 1):
        return False
    called = node.value.func
    return isinstance(called, ast.Attribute) and called.attr == "update" and len(_targets(node)) == 2


def _targets(node: Any) -> list[ast.Name]:
    """The names that an assignment gives values to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _is_handed_on(name: ast.Name, parents: dict[ast.AST, ast.AST], attends: set[str]) -> bool:
    """Whether a key or value is read of, kept for a later layer, or given to what attends."""
    parent = parents[name]
    parent = parents[parent] if isinstance(parent, ast.keyword) else parent
    if isinstance(parent, ast.Attribute):
        return parent.attr in READ
    if isinstance(parent, ast.Call):
        called = parent.func
        is_attention = isinstance(called, ast.Name) and called.id in attends
        return is_attention or (isinstance(called, ast.Attribute) and called.attr in KNOWN)
    is_kept = isinstance(parent, ast.Tuple) and isinstance(parents[parent], ast.Assign)
    return is_kept or (isinstance(parent, ast.Compare) and isinstance(parent.ops[0], ast.Is | ast.IsNot))


def _shown(name: ast.Name, parents: dict[ast.AST, ast.AST]) -> str:
    """The expression around a name, as far as one line holds it."""
    node: ast.AST = name
    while isinstance(parents[node], ast.expr | ast.keyword) and len(ast.unparse(parents[node])) < 60:
        node = parents[node]
    return ast.unparse(node)
