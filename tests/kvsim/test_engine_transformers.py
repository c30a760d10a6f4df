"""The transformers engine: against the caches recorded for the catalogue, and the rules one by one."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvsim.engines.transformers import Transformers
from kvsim.methods import Full, Kivi
from kvsim.models.load import load_model
from kvsim.models.model import Model

BESIDE = Path(__file__).parents[3] / "shared" / "catalogue" / "models.json"
BF16 = Full("bfloat16")


@pytest.mark.skipif(not BESIDE.is_file(), reason="no shared/catalogue/ beside the checkout to compare with")
def test_every_recorded_cache() -> None:
    compared = 0
    for row in json.loads(BESIDE.read_text()):
        model = Model.from_config(row["config"])
        for num_tokens, recorded in row["transformers_5_23_cache"].items():
            if num_tokens == "error":
                continue
            parts = Transformers().parts(model, BF16, 1, int(num_tokens))
            assert parts["key"] + parts["value"] == recorded["kv_bytes_bf16"], (row["id"], num_tokens)
            state = sum(size for name, size in parts.items() if name.startswith("state_"))
            assert state == row.get("recurrent_state", {}).get("bytes_total_per_sequence", 0), row["id"]
            compared += 1
    assert compared == 164


def test_a_window_keeps_one_token_less_and_says_so() -> None:
    model = load_model("google/gemma-2-2b")
    parts = Transformers().parts(model, BF16, 2, 5000)
    assert parts["key"] == 2 * 13 * 4 * 256 * (4095 + 5000) * 2
    assert "window - 1 tokens between steps (window 4,096)" in Transformers().notes(model, BF16)[0]
    static = Transformers("static").parts(model, BF16, 2, 5000)
    assert static["key"] == 2 * 13 * 4 * 256 * (4096 + 5000) * 2


def test_falcon_caches_every_query_head_and_says_so() -> None:
    model = load_model("tiiuae/falcon-40b")
    parts = Transformers().parts(model, BF16, 1, 100)
    assert parts["key"] == 60 * 128 * 64 * 100 * 2
    assert "broadcast to all 128 query heads before they are cached: 8 heads" in Transformers().notes(model, BF16)[0]


def test_compressed_entries_and_their_buffers() -> None:
    """DeepSeek-V4's cache after 133 tokens, as its class leaves it (an unfilled block counts at its most)."""
    model = load_model("deepseek-ai/DeepSeek-V4-Flash")
    parts = Transformers().parts(model, BF16, 1, 133)
    assert parts["key"] == parts["value"] == 43 * 127 * 512 * 2
    assert parts["compressed"] == (21 * 33 + 20 * 1) * 512 * 2
    assert parts["index_compressed"] == 21 * 33 * 128 * 2
    csa = 2 * 3 * (1024 + 256) + (1 + 2) * 4 * (512 + 128)  # the gates of the last block: float32
    assert parts["buffer"] == (21 * csa + 20 * 2 * 127 * 512) * 2


def test_index_keys_and_states_stand_apart() -> None:
    parts = Transformers().parts(load_model("deepseek-ai/DeepSeek-V3.2"), BF16, 1, 8)
    assert parts["index_key"] == 61 * 8 * 128 * 2
    parts = Transformers().parts(load_model("Qwen/Qwen3-Next-80B-A3B-Instruct"), BF16, 3, 8)
    assert parts["state_conv"] == 3 * 36 * 8192 * 4 * 2
    assert parts["state_recurrent"] == 3 * 36 * 32 * 128 * 128 * 4


def test_what_it_does_not_have() -> None:
    model = load_model("gpt2")
    with pytest.raises(ValueError, match="not kivi"):
        Transformers().parts(model, Kivi(), 1, 8)
    with pytest.raises(ValueError, match="cache_implementation 'paged': allowed are dynamic, static"):
        Transformers("paged")
    with pytest.raises(ValueError, match="no static cache"):
        Transformers("static").parts(load_model("deepseek-ai/DeepSeek-V4-Flash"), BF16, 1, 8)


@pytest.mark.parametrize("name", ["gpt2", "google/gemma-2-2b", "deepseek-ai/DeepSeek-V4-Flash", "tiiuae/falcon-40b"])
def test_it_never_shrinks(name: str) -> None:
    model = load_model(name)
    sizes: list[dict[str, Any]] = [Transformers().parts(model, BF16, 1, tokens) for tokens in range(1, 300, 7)]
    totals = [sum(size.values()) for size in sizes]
    assert totals == sorted(totals)
