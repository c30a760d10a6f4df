"""The doctor's causes: they hold for every figure or are not given; ranks, stages and pools that are fixed."""

import pytest
from boot_logs import BOOT_019, LLAMA, engine_line, figures

from kvsim.analysis.doctor import diagnose
from kvsim.engines import Vllm
from kvsim.hardware import find_hardware
from kvsim.memory.sharding import Deployment, Sharding
from kvsim.methods import make_method
from kvsim.methods.slot import PRESETS
from kvsim.models.load import load_model
from kvsim.models.quantization import KV_DTYPES


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


def test_a_card_serves_where_the_log_has_no_memory() -> None:
    text = BOOT_019.replace("total_memory=79.19GiB", "")
    assert figures(diagnose(text, LLAMA))["KV cache memory"][0] is None
    with_card = figures(diagnose(text, LLAMA, find_hardware("h100-sxm")))["KV cache memory"]
    assert with_card[2] == pytest.approx(0.0, abs=0.02)


def test_weights_that_the_log_does_not_explain() -> None:
    half = BOOT_019.replace("took 14.99", "took 8.49")
    causes = {each.what: each.cause for each in diagnose(half, LLAMA).findings}
    assert causes["weights"] == "fits weights of 8 bits"
    odd = BOOT_019.replace("took 14.99", "took 16.50")
    causes = {each.what: each.cause for each in diagnose(odd, LLAMA).findings}
    assert causes["weights"].startswith("not explained")


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
