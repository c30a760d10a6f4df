"""docs/plans.md names exactly the keys that the commands' rows have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")

from kvsim.analysis.plan import site
from kvsim.cli import run
from kvsim.hardware import find_hardware
from kvsim.memory.capacity import largest_batch, room
from kvsim.memory.estimate import cache_nbytes
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import make_method
from kvsim.models.load import load_model
from kvsim.specs import parse_serving

TEXT = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
MODEL = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm:1", "--json"]
COMMANDS = {
    "kvsim.plan/1": ["plan", *MODEL, "--users", "20"],
    "kvsim.goodput/1": ["goodput", *MODEL, "--rate", "2", "--requests", "20"],
    "kvsim.offload/1": ["offload", *MODEL, "--ctx", "4k"],
    "kvsim.breakeven/1": ["breakeven", *MODEL, "--batch", "8", "--ctx", "4k"],
    "kvsim.sweep/1": ["sweep", "--model", "gpt2", "--ctx", "1k", "--json"],
    "kvsim.page/1": ["report", *MODEL],
}


@pytest.mark.parametrize("schema", COMMANDS)
def test_the_rows_hold_what_the_document_says(schema: str, capfd) -> None:
    assert run(COMMANDS[schema]) == 0
    document = json.loads(capfd.readouterr().out)
    line = re.search(rf"^\| `{schema}` \| (.+) \|$", TEXT, re.MULTILINE)[1]
    assert document["schema"] == schema
    assert {"schema", "inputs", "notes", "not_modelled", "rows"} <= set(document)
    for row in document["rows"]:
        assert list(row) == re.findall(r"`(\w+)`", line)


GIB = 1 << 30


def test_the_questions_figures_are_explained_as_they_come() -> None:
    """What the prose of the three questions says of bytes is what the planner weighs."""
    words = " ".join(TEXT.split())
    qwen, card = load_model("qwen3-32b"), find_hardware("h100-sxm")
    engine = parse_serving("vllm", card, 4)
    place, four = site(qwen, card, 4, engine=engine), Sharding(4)
    fits = [
        largest_batch(Deployment(qwen, make_method(name), engine, four), 32768, place.cache_nbytes)
        for name in ("fp16", "fp8")
    ]
    token = cache_nbytes(qwen, make_method("fp16"), 1, 1)
    assert f"x 2 bytes = {token:,} B, so a request of 32,768 tokens is {token * 32768 // GIB} GiB" in words
    assert (
        f"200 of them {200 * token * 32768 / (1 << 40):.1f} TiB. The weights are {2 * qwen.num_params / GIB:.0f}"
        in words
    )
    assert f"leave {4 * place.cache_nbytes / GIB:.0f} GiB" in words
    assert f"{fits[0]} requests in 16 bits, {fits[1]} in fp8" in words

    latent, eight = load_model("deepseek-v3"), Sharding(data_parallel_size=8, enable_expert_parallel=True)
    h200 = find_hardware("h200-sxm")
    weights, routed = room(latent, h200, sharding=eight).weight_nbytes, latent.weights.routed / GIB
    assert f"holds {weights / GIB:.1f} GiB of weights ({weights / GIB - routed / 8:.1f} of attention" in words
    assert f"an eighth of {routed:.0f} GiB of experts) of {h200.memory_nbytes / GIB:.1f} GiB" in words
    assert f"= {cache_nbytes(latent, make_method('fp16'), 1, 1):,} B and is one vector" in words

    small, laptop = load_model("llama-3.2-1b"), find_hardware("apple-m2")
    cpp = parse_serving("llama.cpp", laptop)
    bits = room(small, laptop, 4.85, overhead=cpp.overhead(small, laptop))
    cache = cpp.parts(small, make_method("fp16"), 1, 8192)
    beside = sum(bits.overhead.values())
    assert f"weights ({bits.weight_nbytes / GIB:.2f} GiB at the 4.85 bits" in words
    assert f"llama.cpp's buffers ({beside / GIB:.2f}) and a cache of {sum(cache.values()) >> 20} MiB" in words
    assert f"take {(bits.weight_nbytes + beside + sum(cache.values())) / GIB:.1f} GiB of them" in words
    assert f"x 2 x 2 bytes = {cache_nbytes(small, make_method('fp16'), 1, 1):,} B a token" in words
