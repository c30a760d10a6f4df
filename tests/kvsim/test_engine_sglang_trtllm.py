"""SGLang and TensorRT-LLM: bytes by their own rules, defaults by card, every command, boot logs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvsim.analysis import doctor
from kvsim.cli import run
from kvsim.engines import EngineChoice, Sglang, Trtllm, make_engine
from kvsim.hardware import find_hardware
from kvsim.layout import nbytes
from kvsim.memory.estimate import estimate
from kvsim.methods import make_method
from kvsim.models.load import load_model

GIB = 1 << 30
LLAMA = load_model("llama-3.1-8b")
BF16, FP8 = make_method("bf16"), make_method("fp8")
TOKEN = 131_072
"""Bytes of a token of Llama-3.1-8B in 16 bits."""


def answer(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, Any]:
    assert run([*command.split(), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_sglang_has_a_slot_a_token_and_a_spare_page() -> None:
    for page, tokens, held in ((1, 1000, 1000), (64, 1000, 1024), (64, 1024, 1024), (128, 1025, 1152)):
        found = estimate(LLAMA, BF16, 3, tokens, Sglang(page_size=page))
        assert found.nbytes == (3 * held + page) * TOKEN
        assert found.parts["spare_page"] == page * TOKEN
    assert Sglang().slot_nbytes(load_model("moonshotai/Kimi-K2.5"), BF16) == 70_272  # 160.63 GiB of 2,454,421 slots
    assert Sglang().slot_nbytes(load_model("zai-org/GLM-5"), BF16) == 78 * (1152 + 132)  # index keys beside latents
    with pytest.raises(ValueError, match="sglang does not store kivi"):
        estimate(LLAMA, make_method("kivi"), 1, 100, Sglang())


def test_sglangs_windows_have_a_pool_in_proportion() -> None:
    """MiMo-V2-Flash's log: 375,360 slots, 300,288 for windows. A long request is bound by full attention, a short one
    by the windows' smaller pool."""
    oss = load_model("openai/gpt-oss-120b")
    each = 18 * 2 * 8 * 64 * 2  # half of its layers
    long = estimate(oss, BF16, 1, 100_000, Sglang(chunked_prefill_size=2048)).nbytes
    assert long == pytest.approx(100_000 * (each + 0.8 * each), rel=1e-3)
    short = estimate(oss, BF16, 1, 100, Sglang()).nbytes
    assert short == pytest.approx(125 * (each + 0.8 * each), rel=0.03)
    sizes = [estimate(oss, BF16, 2, tokens, Sglang()).nbytes for tokens in range(1, 20_000, 37)]
    assert sizes == sorted(sizes)
    whole = load_model("mistralai/Mistral-7B-v0.1")  # windows alone: every token stays
    assert estimate(whole, BF16, 1, 32_768, Sglang()).nbytes == 32_769 * TOKEN


@pytest.mark.parametrize(
    ("card", "cards", "chunk", "fraction"),
    [
        ("h100", 1, 8192, 0.836),
        ("h100", 8, 8192, 0.818),
        ("h200", 8, 8192, 0.897),
        ("b200", 8, 16384, 0.852),
        ("t4", 1, 2048, 0.757),
    ],
)
def test_sglangs_defaults_are_the_cards(card: str, cards: int, chunk: int, fraction: float) -> None:
    engine = EngineChoice("sglang").on(find_hardware(card), cards)
    assert isinstance(engine, Sglang)
    assert (engine.chunked_prefill_size, engine.mem_fraction_static) == (chunk, pytest.approx(fraction, abs=2e-3))


def test_trtllm_has_blocks_in_a_share_of_what_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    for block, tokens, held in ((32, 1000, 1024), (64, 65, 128), (32, 1024, 1024)):
        assert estimate(LLAMA, BF16, 3, tokens, Trtllm(tokens_per_block=block)).nbytes == 3 * held * TOKEN
    oss = load_model("openai/gpt-oss-120b")
    each = 18 * 2 * 8 * 64 * 2
    assert estimate(oss, BF16, 1, 3200, Trtllm()).nbytes == (3200 + 128 + 32) * each
    out = answer(capsys, "estimate --model llama-3.1-8b --gpu h100 --engine trtllm --method bf16")["gpu"]
    left = out["memory_nbytes"] - out["weight_nbytes"] - out["overhead"]["activation"] - out["overhead"]["non_torch"]
    assert out["overhead"]["kept_free"] == pytest.approx(0.1 * left, rel=1e-6)
    whole = answer(
        capsys, "estimate --model llama-3.1-8b --gpu h100 --method bf16 --engine trtllm:free_gpu_memory_fraction=1"
    )
    assert "kept_free" not in whole["gpu"]["overhead"]


@pytest.mark.parametrize("name", ["sglang", "trtllm"])
def test_states_are_one_a_sequence(name: str) -> None:
    qwen = load_model("Qwen/Qwen3.5-397B-A17B")
    states = sum(nbytes(state.buffers(1)) for state in qwen.state_layers)
    parts = make_engine(name).parts(qwen, BF16, 4, 100)
    assert sum(size for part, size in parts.items() if part.startswith("state_")) == 4 * states


@pytest.mark.parametrize("engine", ["sglang", "trtllm"])
@pytest.mark.parametrize(
    "command",
    [
        "estimate --model llama-3.1-8b --gpu h100:2 --batch 4 --input-len 1000 --output-len 100",
        "estimate --model deepseek-ai/DeepSeek-V3 --gpu h200:8 --ctx 1000",
        "estimate --model gpt2 --shared-prefix 100 --ctx 1000 --batch 4",
        "breakeven --model llama-3.1-8b --gpu h100 --batch 1 --ctx 4k --method fp8",
        "plan --model llama-3.1-8b --gpu h100:1 --users 8 --method fp16 --input-len 900 --output-len 100",
        "sweep --model llama-3.1-8b --method fp16 --ctx 1000 --gpu h100",
        "report --model llama-3.1-8b --gpu h100 --ctx 1000 --batch 1",
    ],
)
def test_every_command_takes_it(capsys: pytest.CaptureFixture[str], command: str, engine: str) -> None:
    if command.split()[0] in ("plan", "sweep"):
        pytest.importorskip("numpy", reason="the plan extra (numpy) is not installed")
    assert answer(capsys, f"{command} --engine {engine}")["rows"]


def test_compare_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "compare --model llama-3.1-8b --ctx 1000 --engines --method fp16")["rows"]
    found = {row["engine"]: row["nbytes"] for row in rows}
    assert (found["sglang"], found["trtllm"]) == (1001 * TOKEN, 1024 * TOKEN)


@pytest.mark.parametrize("options", [{"page_size": 0}, {"mem_fraction_static": 1.5}, {"swa_full_tokens_ratio": 0.0}])
def test_sglangs_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        Sglang(**options)
    with pytest.raises(ValueError, match="allowed are"):
        Trtllm(free_gpu_memory_fraction=0.0)


SGLANG_LOG = """\
[2026-02-04 11:30:28] server_args=ServerArgs(model_path='llama-3.1-8b', mem_fraction_static=0.836, page_size=1)
[2026-02-04 11:30:28] Load weight begin. avail mem=78.43 GB
[2026-02-04 11:30:29] Load weight end. elapsed=0.38 s, type=LlamaForCausalLM, avail mem=63.44 GB, mem usage=14.99 GB.
[2026-02-04 11:30:29] Using KV cache dtype: torch.bfloat16
[2026-02-04 11:30:29] KV Cache is allocated. #tokens: 414341, K size: 25.29 GB, V size: 25.29 GB
"""


def test_sglangs_boot_log() -> None:
    found = doctor.diagnose(SGLANG_LOG, LLAMA)
    assert (found.engine, doctor.model_of(SGLANG_LOG)) == ("sglang", "llama-3.1-8b")
    by = {each.what: each for each in found.findings}
    assert by["weights"].error == pytest.approx(0, abs=0.005)
    assert by["slots"].predicted == int((63.44 - 78.43 * (1 - 0.836)) * GIB // TOKEN)
    assert by["slots"].error == pytest.approx(0, abs=1e-3)
    assert by["cache"].predicted == pytest.approx(414342 * TOKEN / GIB)
    assert by["cache"].error == pytest.approx(0, abs=1e-3)
    halved = doctor.diagnose(SGLANG_LOG.replace("414341", "200000").replace("25.29", "12.21"), LLAMA)
    (slots,) = (each for each in halved.findings if each.what == "slots")
    assert "fewer slots" in slots.cause
    other = doctor.diagnose(SGLANG_LOG, load_model("Qwen/Qwen3-32B"))
    assert any("other layers than this model's" in each.cause for each in other.findings)


def test_a_latent_boot_log_of_eight_cards() -> None:
    """Kimi-K2.5's figures as published."""
    log = "\n".join(
        (
            "[02-26 16:41:18 TP6] server_args=ServerArgs(model_path='moonshotai/Kimi-K2.5', tp_size=8)",
            "[02-26 16:41:18 TP6] KV Cache is allocated. #tokens: 2454421, KV size: 160.63 GB",
        )
    )
    findings = doctor.diagnose(log, load_model("moonshotai/Kimi-K2.5")).findings
    (cache,) = (each for each in findings if each.what == "cache")
    assert cache.predicted == pytest.approx(160.63, abs=0.005)


def test_sglangs_windows_in_a_log() -> None:
    log = "[12:00:00 TP0] Use sliding window memory pool. full_layer_tokens=375360, swa_layer_tokens=300288"
    (found,) = doctor.diagnose(log, load_model("openai/gpt-oss-120b")).findings
    assert found.predicted == found.reported == 300_288


TRTLLM_LOG = """\
[TensorRT-LLM][INFO] Memory usage when calculating max tokens in paged kv cache: total: 31.84 GiB, available: 17.83 GiB
[TensorRT-LLM][INFO] Number of blocks in KV cache primary pool: 8219
[TensorRT-LLM][INFO] Number of tokens per block: 32.
[TensorRT-LLM][INFO] [MemUsageChange] Allocated 16.05 GiB for max tokens in paged KV cache (263008)
kv_cache_quant_algo: FP8
"""
"""Llama-3.1-8B with an FP8 cache on an RTX 5090, the figures as published."""


def test_trtllms_boot_log() -> None:
    found = doctor.diagnose(TRTLLM_LOG, LLAMA)
    assert found.engine == "trtllm"
    by = {each.what: each for each in found.findings}
    assert by["blocks"].predicted == pytest.approx(8219, abs=3)
    assert by["cache"].predicted == pytest.approx(16.05, abs=0.01)
    assert "max_tokens" not in by["blocks"].cause
    assert any("taken as 0.9" in note for note in found.notes)
    wide = {each.what: each for each in doctor.diagnose(TRTLLM_LOG.replace("FP8", "BF16"), LLAMA).findings}
    assert "another type of cache" in wide["cache"].cause
    with pytest.raises(ValueError, match="give --model"):
        doctor.diagnose(TRTLLM_LOG, None)
