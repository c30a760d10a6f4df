"""The doctor: boot logs against prediction.  The lines are facts of published logs, each with its source."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvsim.cli import run
from kvsim.doctor import Diagnosis, diagnose, engine_of, model_of
from kvsim.hardware import find_hardware
from kvsim.layout import LayerShape
from kvsim.load import load_model

LLAMA = load_model("llama-3.1-8b")

BOOT_019 = """\
(EngineCore pid=243) INFO 04-22 01:47:25 [v1/engine/core.py:105] Initializing a V1 LLM engine (v0.19.0) with config: \
model='meta-llama/Llama-3.1-8B-Instruct', dtype=torch.bfloat16, max_seq_len=16384, tensor_parallel_size=1, \
pipeline_parallel_size=1, quantization=None, kv_cache_dtype=auto, device_config=cuda
(APIServer pid=1) INFO [config/scheduler.py:238] Chunked prefill is enabled with max_num_batched_tokens=8192.
(APIServer pid=1) DEBUG [engine/arg_utils.py:2242] Defaulting max_num_seqs to 1024 for OPENAI_API_SERVER usage context.
(APIServer pid=1) INFO [entrypoints/utils.py:233] non-default args: {'max_model_len': 16384, \
'gpu_memory_utilization': 0.95, 'enable_prefix_caching': False}
DEBUG [v1/worker/gpu_worker.py:284] worker init memory snapshot: free_memory=78.68GiB, total_memory=79.19GiB
INFO [v1/worker/gpu_model_runner.py:4820] Model loading took 14.99 GiB memory and 21.3 seconds
DEBUG [v1/worker/gpu_worker.py:435] Total non KV cache memory: 17.12GiB; torch peak memory increase: 1.89GiB; \
non-torch forward increase memory: 0.25GiB; weights memory: 14.99GiB.
INFO 04-22 01:47:55 [v1/worker/gpu_worker.py:436] Available KV cache memory: 58.11 GiB
INFO 04-22 01:47:55 [v1/core/kv_cache_utils.py:1319] GPU KV cache size: 476,016 tokens
INFO 04-22 01:47:55 [v1/core/kv_cache_utils.py:1324] Maximum concurrency for 16,384 tokens per request: 29.05x
INFO 04-22 01:47:59 [v1/worker/gpu_model_runner.py:6046] Graph capturing finished in 3 secs, took 0.91 GiB
"""
"""llm-d-incubation/llm-d-planner, accuracy/results/v0.19.0/logs, Llama-3.1-8B on an H100."""


def figures(diagnosis: Diagnosis) -> dict[str, tuple[float | None, float, float | None]]:
    return {each.what: (each.predicted, each.reported, each.error) for each in diagnosis.findings}


def test_a_vllm_boot_line_by_line() -> None:
    assert engine_of(BOOT_019) == "vllm"
    assert model_of(BOOT_019) == "meta-llama/Llama-3.1-8B-Instruct"
    diagnosis = diagnose(BOOT_019, LLAMA)
    assert (diagnosis.engine, diagnosis.version) == ("vllm", "0.19.0")
    assert [each.line for each in diagnosis.findings] == sorted(each.line for each in diagnosis.findings)
    found = figures(diagnosis)
    assert found["weights"][1:] == (14.99, pytest.approx(0.0022, abs=1e-3))
    assert found["KV cache memory"][1:] == (58.11, pytest.approx(0.0, abs=1e-3))
    assert found["KV cache size"][1:] == (476_016, pytest.approx(0.0, abs=1e-4))
    assert found["concurrency at 16,384 tokens"][1:] == (29.05, pytest.approx(0.0, abs=1e-3))
    assert found["peak activations"][1:] == (1.89, pytest.approx(0.03, abs=0.01))
    assert found["not PyTorch's"][1] == 0.25
    assert found["CUDA graphs"][1] == 0.91
    assert all("within its band" in each.cause for each in diagnosis.findings if "estimate" in each.cause)


def test_a_pool_that_other_settings_explain() -> None:
    fp8 = BOOT_019.replace("476,016", "952,032").replace("29.05x", "58.11x")
    causes = {each.what: each.cause for each in diagnose(fp8, LLAMA).findings}
    assert causes["KV cache size"] == "fits with a fp8 cache"
    told = fp8.replace("kv_cache_dtype=auto", "kv_cache_dtype=fp8")
    assert figures(diagnose(told, LLAMA))["KV cache size"][2] == pytest.approx(0.0, abs=1e-4)
    odd = BOOT_019.replace("476,016", "300,000")
    causes = {each.what: each.cause for each in diagnose(odd, LLAMA).findings}
    assert causes["KV cache size"].startswith("not explained")


def test_quantized_weights_and_ranks() -> None:
    """8.49 GiB with --quantization fp8, 7.51 on two ranks (the same logs)."""
    fp8 = BOOT_019.replace("quantization=None", "quantization=fp8").replace("took 14.99", "took 8.49")
    assert figures(diagnose(fp8, LLAMA))["weights"][2] == pytest.approx(0.0, abs=0.01)
    two = BOOT_019.replace("tensor_parallel_size=1", "tensor_parallel_size=2").replace("took 14.99", "took 7.51")
    two = two.replace("memory: 58.11", "memory: 63.76").replace("476,016", "1,044,688").replace("29.05x", "63.76x")
    found = figures(diagnose(two, LLAMA))
    assert found["weights"][2] == pytest.approx(0.0, abs=0.01)
    assert found["KV cache size"][2] == pytest.approx(0.0, abs=1e-4)


def test_hybrid_groups_in_a_log() -> None:
    """gemma-3-27b-it, the same source: 8 padding layers, 36,560 tokens, 4.46 requests of 8192."""
    model = load_model("google/gemma-3-27b-it")
    text = """Initializing a V1 LLM engine (v0.19.0) with config: model='google/gemma-3-27b-it', dtype=torch.bfloat16
    Chunked prefill is enabled with max_num_batched_tokens=8192.
    WARNING Add 8 padding layers, may waste at most 15.38% KV cache memory
    Available KV cache memory: 19.53 GiB
    GPU KV cache size: 36,560 tokens
    Maximum concurrency for 8,192 tokens per request: 4.46x"""
    found = figures(diagnose(text, model))
    assert found["padding layers"] == (8, 8, 0)
    assert found["KV cache size"][2] == pytest.approx(0.0, abs=1e-3)
    assert found["concurrency at 8,192 tokens"][2] == pytest.approx(0.0, abs=2e-3)
    full = text.replace("36,560", "41,280").replace("4.46x", "5.04x")
    causes = {each.what: each.cause for each in diagnose(full, model).findings}
    assert causes["concurrency at 8,192 tokens"] == "fits without the hybrid cache manager (windows as full attention)"


def test_blocks_lengthened_for_states() -> None:
    """Qwen3.5-27B with an fp8 cache (aivrar/vllm-windows-build#17)."""
    text = """Initializing a V1 LLM engine (v0.30.0) with config: model='Qwen/Qwen3.5-27B', dtype=torch.bfloat16, \
kv_cache_dtype=fp8
    Setting attention block size to 1568 tokens to ensure that attention page size is >= mamba page size."""
    assert figures(diagnose(text, load_model("Qwen/Qwen3.5-27B")))["block size"] == (1568, 1568, 0)


def test_older_vllm_lines() -> None:
    """Llama-3.1-8B on an RTX 3090 (vllm#10517), and the wording of 0.8 (vllm#14447)."""
    text = """Initializing an LLM engine (v0.6.4) with config: model='m', dtype=torch.bfloat16, max_seq_len=20000
    Loading model weights took 14.9888 GB
    Memory profiling results: total_gpu_memory=23.58GiB non_torch_memory=0.35GiB kv_cache_size=3.81GiB \
gpu_memory_utilization=0.90
    GPU blocks: 1952, # CPU blocks: 2048
    Maximum concurrency for 20000 tokens per request: 1.56x"""
    found = figures(diagnose(text, LLAMA))
    assert found["weights"][2] == pytest.approx(0.0, abs=0.003)
    assert found["GPU blocks"] == (1950, 1952, pytest.approx(0.001, abs=1e-3))
    assert found["concurrency at 20,000 tokens"][2] == pytest.approx(0.0, abs=1e-2)
    wording = """model weights take 21.21GiB; non_torch_memory takes 0.20GiB; PyTorch activation peak memory takes \
0.37GiB; the rest of the memory reserved for KV Cache is 1.57GiB."""
    assert {"weights", "not PyTorch's", "peak activations", "KV cache memory"} == figures(
        diagnose(wording, LLAMA)
    ).keys()


GEMMA4 = replace(
    LLAMA,
    layers=(LayerShape(8, 256, 256, window=1024),) * 40 + (LayerShape(1, 512, 512),) * 8,
)
LLAMA_CPP = """\
llama_context: n_seq_max     = 2
llama_context: n_ctx         = 8192
llama_context: n_ctx_seq     = 4096
llama_context: n_ubatch      = 512
llama_kv_cache_iswa: creating non-SWA KV cache, size = 4096 cells
llama_kv_cache: size =  128.00 MiB ( 4096 cells,   8 layers,  2/2 seqs), K (f16):   64.00 MiB, V (f16):   64.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = 1536 cells
llama_kv_cache: size =  960.00 MiB ( 1536 cells,  40 layers,  2/2 seqs), K (f16):  480.00 MiB, V (f16):  480.00 MiB
"""
"""llama-server -c 8192 -np 2, gemma-4-12B, as its users' notes give it."""


def test_a_llama_cpp_log_line_by_line() -> None:
    assert engine_of(LLAMA_CPP) == "llama.cpp"
    found = figures(diagnose(LLAMA_CPP, GEMMA4))
    assert found == {
        "cells": (4096, 4096, 0),
        "keys, f16 (full)": (64, 64, 0),
        "values, f16 (full)": (64, 64, 0),
        "cells with a window": (1536, 1536, 0),
        "keys, f16 (window)": (480, 480, 0),
        "values, f16 (window)": (480, 480, 0),
    }
    quantized = """llama_kv_cache_iswa: creating non-SWA KV cache, size = 16384 cells
llama_kv_cache: size =  136.00 MiB ( 16384 cells,   8 layers,  1/1 seqs), K (q8_0):   68.00 MiB, V (q8_0):   68.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = 1536 cells
llama_kv_cache: size =  255.00 MiB ( 1536 cells,  40 layers,  1/1 seqs), K (q8_0):  127.50 MiB, V (q8_0):  127.50 MiB"""
    assert figures(diagnose(quantized, GEMMA4)) == {
        "keys, q8_0 (full)": (68, 68, 0),
        "values, q8_0 (full)": (68, 68, 0),
        "keys, q8_0 (window)": (127.5, 127.5, 0),
        "values, q8_0 (window)": (127.5, 127.5, 0),
    }


def test_llama_cpp_by_its_own_metadata() -> None:
    """28 layers, 512 wide, 2048 cells: KV self size 112.00 MiB (JamePeng/llama-cpp-python#1)."""
    text = """llm_load_print_meta: n_layer          = 28
llm_load_print_meta: n_embd_k_gqa     = 512
llm_load_print_meta: n_embd_v_gqa     = 512
llama_init_from_model: n_ctx         = 2048
llama_init_from_model: KV self size  =  112.00 MiB, K (f16):   56.00 MiB, V (f16):   56.00 MiB"""
    assert figures(diagnose(text, None)) == {"keys, f16": (56, 56, 0), "values, f16": (56, 56, 0)}
    bare = text.splitlines()[-1]
    (keys, _) = diagnose(bare, None).findings
    assert keys.predicted is None
    assert "give --model" in keys.cause


def test_llama_cpp_buffers() -> None:
    """Llama-3-8B and Qwen2.5-3B as llama.cpp prints them (SciSharp/LLamaSharp#1099 for the second)."""
    text = """llama_kv_cache_init:      CUDA0 KV buffer size =  1024.00 MiB
llama_context: n_ctx         = 8192
llama_kv_cache: size = 1024.00 MiB (  8192 cells,  32 layers,  1/1 seqs), K (f16):  512.00 MiB, V (f16):  512.00 MiB
llama_context:      CUDA0 compute buffer size =   258.50 MiB"""
    found = figures(diagnose(text, LLAMA))
    assert found["KV buffers"] == (1024, 1024, 0)
    assert found["compute buffer"] == (258.5, 258.5, 0)
    small = """llama_kv_cache_init:      CUDA0 KV buffer size =   144.00 MiB
llama_init_from_model: KV self size  =  144.00 MiB, K (f16):   72.00 MiB, V (f16):   72.00 MiB
llama_init_from_model: n_ctx         = 4096
llama_init_from_model:      CUDA0 compute buffer size =   300.75 MiB"""
    shape = replace(LLAMA, layers=(LayerShape(2, 128, 128),) * 36, hidden_size=2048, vocab_size=151936)
    found = figures(diagnose(small, shape))
    assert found["KV buffers"] == (144, 144, 0)
    assert found["keys, f16"] == (72, 72, 0)
    assert found["compute buffer"] == (300.75, 300.75, 0)
    alone = diagnose(small.splitlines()[0], None).findings
    assert [(each.what, each.predicted, each.reported) for each in alone] == [("KV buffers", None, 144)]


def test_llama_cpp_states() -> None:
    model = load_model("Qwen/Qwen3-Next-80B-A3B-Instruct")
    mebibytes = 36 * 4 * (8192 * 3 + 32 * 128 * 128) / (1 << 20)
    text = f"llama_memory_recurrent: size = {mebibytes:.2f} MiB (     1 cells,  48 layers,  1 seqs), R (f32): 3.38 MiB"
    found = figures(diagnose("llama_context: n_ctx = 4096\n" + text, model))
    assert found["states"][2] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line of a vLLM or llama.cpp boot log"),
        ("Traceback (most recent call last):", "no line of a vLLM or llama.cpp boot log"),
        ("GPU KV cache size: 1,000 tokens", "does not name its model"),
        ("llama_context: n_ctx         = 2048", "none with a size of its cache"),
    ],
)
def test_logs_that_say_nothing(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(text, None)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(BOOT_019.replace("Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"))
    assert run(["doctor", "--log", str(log)]) == 0
    text = capsys.readouterr().out
    assert "| KV cache size                | tokens   |   476,032 |  476,016 | -0.00% |" in text
    assert text.strip().split("\n\n")[-1].startswith("Not modelled:")
    assert run(["doctor", "--log", str(log), "--json", "--model", "llama-3.1-8b", "--gpu", "h100"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["schema"], out["engine"], out["version"]) == ("kvsim.doctor/1", "vllm", "0.19.0")
    assert {row["what"] for row in out["rows"]} >= {"weights", "KV cache size"}


def test_a_tuned_name_is_taken_for_its_base(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(BOOT_019.replace("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B-Chat"))
    assert run(["doctor", "--log", str(log), "--json"]) == 0
    assert "taken for Qwen/Qwen3-8B" in json.loads(capsys.readouterr().out)["notes"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "no line of a vLLM or llama.cpp boot log in it"),
        ("GPU KV cache size: 1,000 tokens", "does not name its model: give --model"),
        (None, "cannot be read"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(
    text: str | None, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "engine.log"
    if text is not None:
        log.write_text(text)
    assert run(["doctor", "--log", str(log)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


def test_a_card_serves_where_the_log_has_no_memory() -> None:
    text = BOOT_019.replace("total_memory=79.19GiB", "")
    assert figures(diagnose(text, LLAMA))["KV cache memory"][0] is None
    with_card = figures(diagnose(text, LLAMA, find_hardware("h100-sxm")))["KV cache memory"]
    assert with_card[2] == pytest.approx(0.0, abs=0.02)
