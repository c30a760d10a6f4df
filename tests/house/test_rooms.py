"""One method or one engine is known in its own room, in the tables, and in few places more; others ask the object."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import source_names

from kvsim.engines import ENGINES
from kvsim.methods import METHODS

PLACES = {
    "kvsim/methods/__init__.py": "the table of methods",
    "kvsim/methods/defaults.py": "the table of what a command takes where no method is named",
    "kvsim/methods/layer_mix.py": "what a mix holds unless told otherwise",
    "kvsim/engines/": "the table of engines; an engine says which methods it stores",
    "kvsim/analysis/doctor/": "the table of readers; a reader says which method a log means",
    "kvsim/models/quantization.py": "the table of names of --kv-cache-dtype",
    "kvsim/models/gguf_model.py": "GGUF is the format of llama.cpp",
    "kvruntime/methods/__init__.py": "the table of rooms",
    "kvruntime/vllm/settings.py": "the table of names of --kv-cache-dtype",
    "validation/latency/serving.py": "the table of fitted constants: a row an engine whose loads were measured",
    "validation/claims/serving.py": "the logs of one engine that was measured, and the method whose loads are held",
    "kvsim/install.py": "the table of packages, one of them a program that serves",
    "validation/documents/extras_table.py": "the table of extras, one of them for a program that serves",
    "validation/reliability/mutant_subjects.py": "the files that are mutated, and their tests",
    "validation/latency/attention.py": "the kernels of engines that were measured",
    "validation/claims/quality_bars.py": "what holds methods as published beside ours",
}
"""Where a method or an engine may be named outside its own room, and why."""

TYPES = re.compile(r"(fp|bf|int|nvfp|q)\d.*")
"""Methods that are called as the type that they store: that word says no method."""
PLAIN = {"Full", "Ideal"}
"""The method and the engine that stand for none: what others are compared with."""
PACKAGES = {"ideal", "kvruntime", "transformers"}
"""Engines whose names mean other things too."""


def rooms() -> dict[str, str]:
    """Every name of a method or an engine, and of its class -> the name of the file or folder that is its room."""
    out = {name: type(make()).__module__ for name, make in METHODS.items() if not TYPES.fullmatch(name)}
    out |= {name: kind.__module__ for name, kind in ENGINES.items() if name not in PACKAGES}
    out |= {kind.__name__: kind.__module__ for kind in ENGINES.values()}
    for make in METHODS.values():
        out |= {each.__name__: each.__module__ for each in (type(make()), make)}
    return {name: module.rpartition(".")[2] for name, module in out.items() if name not in {*PLAIN, "<lambda>"}}


ROOMS = rooms()
SPECS = METHODS.keys() | ENGINES.keys()
"""What a user types: looked for in strings, since a module or an argument may be called so."""
WORD = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, sorted(ROOMS, key=len, reverse=True)))})(?!\w)")


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and names in a source's strings, docstrings and comments aside, and among its names and imports."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from ((node.lineno, word) for word in WORD.findall(node.value))
        elif isinstance(node, ast.Name | ast.Attribute | ast.alias):
            word = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}[type(node)]
            yield from ((node.lineno, each) for each in [getattr(node, word)] if each in ROOMS.keys() - SPECS)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("isinstance(method, Kivi)", ["Kivi"]),
        ("isinstance(method, kvsim.methods.Evict)", ["Evict"]),
        ("from kvsim.methods import kivi_seed as seed", ["kivi_seed"]),
        ("short = row['name'] in ('fp16', 'kivi-8bit-g32-r128', 'kivi-seed')", ["kivi", "kivi-seed"]),
        ("if engine == 'vllm': pass", ["vllm"]),
        ("key = f'routed/{x} of sglang'", ["sglang"]),
        ('"""As vllm has it."""\nx: int\n"""kivi"""\nPAGED = "a mixture, evicted; vLLM"  # Vllm', []),
    ],
)
def test_a_name_is_found(source: str, words: list[str]) -> None:
    assert [word for _, word in named(ast.parse(source))] == words


def test_one_method_or_engine_is_known_in_its_room() -> None:
    """And no place is let off that names none."""
    unknown, used = [], set()
    for path in source_names.modules().values():
        file = path.relative_to(source_names.ROOT)
        own = {*file.parts[:-1], file.stem, file.stem.removesuffix("_lines")}
        foreign = [(line, word) for line, word in named(source_names.tree(path)) if ROOMS[word] not in own]
        place = next((place for place in PLACES if file.as_posix().startswith(place)), None)
        if place is None:
            unknown += [f"{file}:{line}: {word}" for line, word in foreign]
        elif foreign:
            used.add(place)
    assert not unknown
    assert used == PLACES.keys()


def test_no_method_and_no_engine_is_told_by_its_class() -> None:
    """``isinstance`` of one stands in methods' and engines' rooms; others ask the object.

    In kvsim of the plain ones too; elsewhere a place may ask whether nothing is compressed.
    """
    wrong = []
    for path in source_names.modules().values():
        file = path.relative_to(source_names.ROOT).as_posix()
        for node in ast.walk(source_names.tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                told = set(re.findall(r"\w+", ast.unparse(node.args[1]))) & (
                    ROOMS.keys() | (PLAIN if file.startswith("kvsim/") else set())
                )
                if told and not file.startswith(("kvsim/methods/", "kvsim/engines/", "kvruntime/methods/")):
                    wrong.append(f"{file}:{node.lineno}: {told}")
    assert not wrong


def test_kvsim_imports_no_one_engine() -> None:
    """Outside the engines' rooms: their table gives them."""
    for name, path in source_names.modules().items():
        if name.startswith("kvsim.") and not name.startswith(("kvsim.engines", "kvsim.analysis.doctor")):
            found = set(re.findall(r"kvsim\.engines\.(\w+) import", path.read_text(encoding="utf-8"))) - {"engine"}
            assert not found, name
