"""The plugin without vLLM: its options, what it refuses, and that nothing imports vLLM before vLLM asks for it.

``tests/kvruntime/test_vllm_engine.py`` has what needs vLLM itself.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")

import kvruntime.vllm  # noqa: E402
from kvruntime import paged  # noqa: E402
from kvruntime.vllm import settings  # noqa: E402
from kvruntime.vllm.windows import attend_pages  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Full, Kivi, PerTokenHead, TurboQuant  # noqa: E402

ROOT = Path(__file__).parents[2]


def config(**changed: object) -> SimpleNamespace:
    """As much of a ``VllmConfig`` as is read."""
    parts = {
        "cache_config": {"cache_dtype": "auto"},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
        "parallel_config": {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1},
        "model_config": {"is_hybrid": False, "is_encoder_decoder": False},
    }
    made = {name: SimpleNamespace(**fields) for name, fields in parts.items()}
    out = SimpleNamespace(**made, speculative_config=None, kv_transfer_config=None)
    for path, value in changed.items():
        *owner, name = path.split("__")
        setattr(getattr(out, owner[0]) if owner else out, name, value)
    return out


def test_the_entry_point_is_there_and_imports_no_vllm() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, path),) = project["entry-points"]["vllm.general_plugins"].items()
    module, function = path.split(":")
    assert name == "kvruntime"
    assert getattr(import_module(module), function) is kvruntime.vllm.register
    assert any(want.startswith("vllm>=0.26") for want in project["optional-dependencies"]["vllm"])
    assert "vllm" not in sys.modules


def test_options() -> None:
    given = {"kvruntime": {"method": "kivi", "nbits": 4, "residual_length": 64}, "another": 1}
    assert settings.method_of(given, "bfloat16") == Kivi(4, residual_length=64, dtype="bfloat16")
    assert given["kvruntime"] == {"method": "kivi", "nbits": 4, "residual_length": 64}
    assert settings.method_of({}, "float16", "kivi2") == Kivi(2)
    assert settings.method_of({"kvruntime": {"residual_length": 64}}, "float16", "kivi4") == Kivi(4, residual_length=64)
    assert settings.method_of({}, "bfloat16", "turboquant3") == TurboQuant(3)
    assert settings.method_of({"kvruntime": {"method": "int8"}}, "bfloat16") == PerTokenHead("int8")
    for name in ("kivi2", "turboquant3"):
        settings.refuse(config(cache_config__cache_dtype=name))
    with pytest.raises(ValueError, match=r"--kv-cache-dtype kivi2 is .*, the additional config says {'nbits': 4}"):
        settings.method_of(given, "float16", "kivi2")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "attention backend CUSTOM is kvruntime's: give --additional-config '{\"kvruntime\": "),
        ({"kvruntime": {"nbits": 2}}, "attention backend CUSTOM is kvruntime's: give"),
        ({"kvruntime": {"method": "kivvi"}}, "kvruntime: unknown method 'kivvi'"),
        ({"kvruntime": {"method": "kivi", "bits": 2}}, "kvruntime: method 'kivi' does not take bits"),
        ({"kvruntime": {"method": "kivi", None: 5}}, "kvruntime: option None: allowed are names of options"),
        ({"kvruntime": {"method": "kivi", "nbits": 5}}, "kvruntime: nbits 5: allowed are"),
        ({"kvruntime": {"method": "fp8"}}, "kvruntime does not run the method fp8"),
        ({"kvruntime": {"method": "kivi", "sink_length": 4}}, "in pages: sink_length 4, allowed is 0"),
        ({"kvruntime": {"method": "kivi", "dtype": "float16"}}, "dtype 'float16' of exact tokens, allowed"),
    ],
)  # fmt: skip
def test_options_that_are_refused(given: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        settings.method_of(given, "bfloat16")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cache_config__cache_dtype": "fp8"}, "not in vLLM with --kv-cache-dtype fp8"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "with disable_hybrid_kv_cache_manager"),
        ({"kv_transfer_config": object()}, "with a KV connector"),
        ({"parallel_config__decode_context_parallel_size": 2}, "with context parallelism"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "speculative decoding by 'eagle', allowed are ngram"),
        ({"model_config__is_hybrid": True}, "a hybrid model of attention and states"),
        ({"model_config__is_encoder_decoder": True}, "an encoder-decoder model"),
    ],
)  # fmt: skip
def test_what_is_refused_at_start(changed: dict[str, object], why: str) -> None:
    settings.refuse(config())
    settings.refuse(config(speculative_config=SimpleNamespace(method="ngram")))
    with pytest.raises(ValueError, match=r"^kvruntime: ") as error:
        settings.refuse(config(**changed))
    assert why in str(error.value)


def test_layers_and_blocks_that_are_refused() -> None:
    settings.refuse_layer(logits_soft_cap=None, attention_sinks=False, attention_type="")
    with pytest.raises(ValueError, match=r"not in vLLM with a layer's logits soft cap 50"):
        settings.refuse_layer(logits_soft_cap=50.0)
    layer, method = LayerShape(8, 128, 128), Kivi(dtype="bfloat16")
    assert settings.check_block_size(method, layer, 64).exact_tokens == 8
    with pytest.raises(ValueError, match="--block-size 16, allowed is 64, the tokens of a kivi-2bit-g32-r128 record"):
        settings.check_block_size(method, layer, 16)
    assert settings.check_block_size(TurboQuant(3), layer, 64) == (64, 64 * 8 * (2 * 48 + 2 * 2), 0, 0, 0)
    with pytest.raises(ValueError, match="--block-size 16, allowed is 64, the tokens of a turboquant-3bit record"):
        settings.check_block_size(TurboQuant(3), layer, 16)
    with pytest.raises(ValueError, match="fp16 in vLLM: its tokens are exact, another attention backend has it"):
        settings.check_block_size(Full(), layer, 64)


def test_pages_of_one_size() -> None:
    shapes = [settings.check_block_size(Kivi(), LayerShape(heads, 128, 128), 64) for heads in (8, 8, 4)]
    assert settings.check_pages(shapes[:2]) == shapes[0].record_nbytes
    with pytest.raises(ValueError, match="a model of records of 24,576 to 49,152 bytes in vLLM: allowed are layers"):
        settings.check_pages(shapes)
    with pytest.raises(ValueError, match="a model of sliding windows alone in vLLM"):
        settings.check_pages([])


@pytest.mark.parametrize("window", [3, 40, 500])
def test_a_window_reads_pages(window: int) -> None:
    """A chunk, a single token and a row that rests, over pages in any order; what has left the window is no page."""
    heads, groups, dim, size = 2, 2, 16, 4
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, heads, 64, dim, generator=generator) for _ in range(2))
    lengths, counts = [64, 41, 0], [20, 1, 0]
    table = torch.randperm(48, generator=generator).view(3, 16).int()
    pool = torch.full((48, heads, size, 2 * dim), float("nan"))
    for row in range(2):
        for token in range(max(0, lengths[row] - counts[row] - window + 1), lengths[row]):
            place = pool[table[row, token // size], :, token % size]
            place.copy_(torch.cat([key[row, :, token], value[row, :, token]], -1))
    starts = torch.tensor([0, *counts]).cumsum(0)
    query = torch.randn(sum(counts), heads * groups, dim, generator=generator)
    pages = paged.Pages(None, *pool.split(dim, 3))
    length = torch.tensor(lengths)
    batch = paged.Batch(starts, length, length, length, None, table, torch.zeros(21), 20)
    out = torch.empty_like(query)
    attend_pages(query, pages, batch, window, 0.25, out)
    for row in range(2):
        first, last = starts[row], starts[row + 1]
        t, newest = torch.arange(lengths[row]), torch.arange(lengths[row] - counts[row], lengths[row])[:, None]
        seen = (t <= newest) & (t > newest - window)
        k, v = (x[row, :, : lengths[row]].repeat_interleave(groups, 0) for x in (key, value))
        score = (query[first:last].transpose(0, 1) @ k.mT * 0.25).masked_fill(~seen, float("-inf"))
        torch.testing.assert_close(out[first:last], (score.softmax(-1) @ v).transpose(0, 1))
