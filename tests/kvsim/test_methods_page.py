"""docs/methods.md: every method that kvruntime runs has a section, and the formulas there are kvsim's bytes."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from kvsim.engines.kvruntime import names
from kvsim.layout import LayerShape, Method, nbytes
from kvsim.methods import make_method

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `([\w-]+)`$(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE))
SAME = {"bf16": "fp16", "fp32": "fp16", "fp8-e5m2-token-head": "fp8-token-head"}
"""Methods that stand in the section of another."""
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "fp16": ({},),
    "kivi": ({}, {"nbits": 4, "group_size": 64}, {"key_nbits": 3, "value_nbits": 8, "key_group_size": 96,
             "value_group_size": 16, "residual_length": 192, "sink_length": 4}),
    "kivi-seed": ({},),
    "kivi-boost": ({}, {"nbits": 3}, {"nbits": 4, "group_size": 128, "residual_length": 256, "sink_length": 0}),
    "int8": ({},),
    "fp8-token-head": ({},),
    "int4": ({},),
    "turboquant": ({}, {"nbits": 2.5}),
    "evict": ({"budget": 300}, {"budget": 300, "policy": "snapkv"},
              {"budget": 300, "policy": "h2o", "inner": "kivi-boost"}),
}  # fmt: skip


def formula(name: str) -> str:
    return re.findall(r"^    bytes = (.*)$", SECTIONS[name], re.MULTILINE)[0]


def letters(method: Method, heads: int, dim: int, num_tokens: int) -> dict[str, Any]:
    """What the page's letters stand for."""
    held = {"H": heads, "D": dim, "T": num_tokens, "ceil": ceil, "min": min, "b": getattr(method, "nbits", 0)}
    if hasattr(method, "residual_length"):
        sink, residual, group = method.sink_length, method.residual_length, method.k_group
        held |= {"S": sink, "R": residual, "bk": method.k_bits, "bv": method.v_bits, "bo": method.boost_nbits}
        if isinstance(group, str):
            return held | {"N": ceil(num_tokens / 32)}
        length = group
        while 2 * length <= 64 and residual % (2 * length) == 0:
            length *= 2
        held |= {"G": group, "Gv": method.value_group(dim), "L": length}
        held["N"] = ceil(max(0, num_tokens - sink - residual) / length)
    if hasattr(method, "inner"):
        inner, name = method.inner, method.inner.name.split("-")[0]
        block = getattr(inner, "residual_length", 1)
        held |= {"C": min(num_tokens, method.budget), "block": block, "scored": int(method.policy != "recent")}
        section = "kivi-boost" if name == "kivi" else name
        held["inner"] = lambda count: eval(formula(section), letters(inner, heads, dim, count))
    return held


def test_every_method_has_its_section() -> None:
    """With a picture, its bytes, and when to use and to leave it."""
    assert set(SECTIONS) == set(CASES)
    assert {SAME.get(name, name) for name in names()} == set(SECTIONS)
    for name, text in SECTIONS.items():
        assert all(f"`{other}`" in SECTIONS[same] for other, same in SAME.items() if same == name)
        for part in ("```text\ntoken ", "    bytes = ", "* **Use it**", "* **Leave it**"):
            assert part in text, (name, part)


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_the_bytes(name: str) -> None:
    for options in CASES[name]:
        method = make_method(name, **options)
        for heads, dim, num_tokens in ((8, 128, 1000), (3, 64, 4097), (1, 128, 20), (2, 64, 300)):
            said = eval(formula(name), letters(method, heads, dim, num_tokens))
            assert said == nbytes(method.buffers(LayerShape(heads, dim, dim), 1, num_tokens)), (options, num_tokens)
