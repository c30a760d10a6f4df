"""The doctor on vLLM boots that failed."""

import pytest
from boot_logs import LLAMA, V0_PROFILE, engine_line, figures, needs

from kvsim.analysis.doctor import diagnose
from kvsim.models.load import load_model


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
