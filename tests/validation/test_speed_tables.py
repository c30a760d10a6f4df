"""The documents' tables of speed: every figure comes from the recorded rows."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("torch")

from speed_rows import attention_rows, step_rows

from kvruntime.bench.engine import report as engine_report
from kvruntime.bench.kernels import report as kernel_report
from validation.documents import speed_tables


def generate_rows():
    same = {
        "kind": "generate",
        "model": "m",
        "weights": "random",
        "dtype": "bfloat16",
        "batch_size": 8,
        "num_tokens": 16384,
    }
    same |= {"repeats": 2, "first_call_seconds": 4.0, "first_token_seconds": [0.9] * 3, "tokens_per_second": 8.0}
    kinds = {
        "transformers-dynamic": ("", 40e-3),
        "transformers-static": ("compiled", 12e-3),
        "kivi-2bit-g64-r64": ("", 2e-3),
    }
    return [
        {**same, "method": name, "runs": runs, "seconds_per_step": [seconds, seconds * (1 if runs else 0.25), seconds]}
        for name, (runs, seconds) in kinds.items()
    ]


@pytest.fixture
def folder(tmp_path):
    header = {"schema": "kvruntime.bench/1", "device": {"name": "card"}, "commit": "0" * 40}
    header |= {
        "versions": {"torch": "2.11", "triton": "3.6", "transformers": "5.17"},
        "command": ["kvruntime", "bench"],
    }
    rows = attention_rows()
    for row in rows:
        if row["kind"] == "attend":
            row |= {"relative_error": 5e-4, "bandwidth": 2.6e12}
        if row["kind"] == "sdpa":
            row["bandwidth"] = 2.8e12
    rows.append({**rows[1], "method": "fp16-flash", "batch_size": 3, "failed": "RuntimeError: No available kernel."})
    for kind, found in (("kernels", rows), ("engine", step_rows()), ("generate", generate_rows())):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "card.json").write_text(json.dumps(header | {"rows": found}))
    return tmp_path


def test_short_tables_show_time_and_ratio(folder) -> None:
    text = speed_tables.block("kernels short", folder)
    lines = [line for line in text.splitlines() if line.startswith("| llama-3-8b 8 x 32k")]
    micros = 4096 * 8 * 32768 / 2.8e12 * 1e6
    ours = 4096 * 8 * 32768 / 6.4 / 2.6e12 * 1e6
    assert lines == [
        f"| llama-3-8b 8 x 32k | {micros:.1f} | – | {ours:.1f} ({micros / ours:.2f}x) | – | "
        f"{ours * 6.4 / 3.6:.1f} ({micros / ours * 3.6 / 6.4:.2f}x) |"
    ]
    assert "read 3,000 GB/s" in text
    assert "(validation/results/kernels/card.json)" in text
    text = speed_tables.block("engine short", folder)
    assert "| 1 x 16k | 6.655 ms, 150 | 6.244 ms, 160 (1.07x) |" in text
    assert "kivi-2bit-g64-r64: 25% of the 16-bit slope, break-even (tokens) 2,667" in text


def test_stock_generate_is_held_against_the_faster_stock_cache(folder) -> None:
    text = speed_tables.block("generate short", folder)
    assert "| m 8 x 16k | 10.00 (40.00) | 12.00 | 2.00 (5.00x) |" in text
    assert re.search(r"8 x 16k[ |]+kivi-2bit-g64-r64", speed_tables.block("generate", folder))


def test_full_tables_show_failures_too(folder) -> None:
    text = speed_tables.block("kernels", folder)
    assert "../validation/results/kernels/card.json" in text
    assert "failed: fp16-flash llama-3-8b 3 x 8k: RuntimeError" in text
    assert text.count("portable kernel") == 1
    assert "break-even" in speed_tables.block("engine", folder)


def test_nothing_recorded_and_wrong_words(folder, tmp_path) -> None:
    assert "Nothing is recorded yet" in speed_tables.block("kernels short", tmp_path / "empty")
    assert "Nothing is recorded yet" in speed_tables.block("packing", folder)
    with pytest.raises(ValueError, match="allowed are kernels, packing, engine"):
        speed_tables.block("kernel", folder)


@pytest.mark.parametrize(
    ("report", "kind", "base"), [(kernel_report, "attend", "sdpa"), (engine_report, "step", "step")]
)
def test_a_baseline_of_another_commit_is_none(report, kind, base) -> None:
    """A file that is measured anew, and stopped, holds rows of two kernels: no ratio goes across."""
    size = {"model": "gpt2", "num_q_heads": 12, "num_kv_heads": 12, "head_dim": 64, "batch_size": 1, "num_tokens": 1024}
    size |= {"dtype": "float16", "weights": "random (seed 0)", "package": "kvruntime"}
    row = {**size, "kind": kind, "method": "kivi-2bit-g64-r64", "seconds": [1.0] * 3, "commit": "new"}
    old = {**size, "kind": base, "method": "fp16", "seconds": [2.0] * 3, "commit": "old"}
    assert report.baseline(row, [row, old]) is None
    assert report.baseline(row, [row, {**old, "commit": "new"}]) is not None
