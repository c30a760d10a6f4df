"""The doctor on single lines: numbers and units, what carries a log, and which boot and engine a line is of."""

from collections.abc import Callable

import pytest
from boot_logs import BOOT_019, LLAMA, engine_line, figures, needs

from kvsim.analysis.doctor import diagnose


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


def test_a_line_without_an_end_is_looked_at_in_part() -> None:
    text = "Graph capturing finished in " * 100_000 + "\n" + BOOT_019
    assert figures(diagnose(text, LLAMA))["KV cache size"][2] == pytest.approx(0.0, abs=1e-4)


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
