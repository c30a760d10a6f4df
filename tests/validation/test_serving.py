"""Serving as recorded: rows of a log of vLLM, what is held of loads, and the documents' tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from validation.claims import serving
from validation.cli import run
from validation.documents import serving_tables
from validation.report.claims import verdicts
from validation.report.points import collect

LOG = """\
INFO 11-30 19:26:41 [api_utils.py:273] non-default args: {'max_model_len': 33280, 'block_size': 64, \
'max_num_batched_tokens': 16384, 'max_num_seqs': 64, \
'additional_config': {'kvruntime': {'method': 'kivi', 'nbits': 2}}, 'model': 'llama'}
INFO 11-30 19:26:41 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='llama', \
dtype=torch.bfloat16, max_seq_len=33280, tensor_parallel_size=1, kv_cache_dtype=auto, device_config=cuda
INFO 11-30 19:27:11 [gpu_worker.py:560] Available KV cache memory: 108.69 GiB
INFO 11-30 19:27:11 [kv_cache_utils.py:2177] GPU KV cache size: 4,530,781 tokens
INFO 11-30 19:27:11 [kv_cache_utils.py:2178] Maximum concurrency for 33,280 tokens per request: 136.14x
INFO 11-30 19:27:13 [gpu_worker.py:793] CUDA graph pool memory: 0.06 GiB (actual), 0.06 GiB (estimated), difference: \
0.0 GiB (0.0%).
INFO 11-30 19:27:13 [gpu_worker.py:857] Replace gpu_memory_utilization config with `--kv-cache-memory=116544790528` \
(108.54 GiB) to fit into requested memory, or `--kv-cache-memory=131003375616` (122.01 GiB).
{"blocks": 74197}
{"requests": 8, "prompt": 8192, "new": 64, "real": true, "seconds": 2.8132, "at_once": 8, "step_ms": 5.6637}
{"requests": 8, "prompt": 8192, "new": 64, "real": true, "seconds": 2.05, "at_once": 8, "step_ms": 5.7}
"""
ABOUT = {
    "device_name": "NVIDIA H200",
    "versions": {"vllm": "0.26.0"},
    "commit": "0" * 40,
    "command": "python vllm-decode.py",
}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A run of two engines, as the command takes their logs; of the second the plugin's name is gone."""
    plain = LOG.replace("'kvruntime'", "'another'").replace("2.05", "2.15").replace("5.7}", "7.2}")
    plain = plain.replace("--kv-cache-memory=116544790528", "--other").replace("4,530,781", "890,352")
    for name, text in (("kivi2.log", LOG), ("bf16.log", plain)):
        (tmp_path / name).write_text(text)
    out = tmp_path / "card.json"
    logs = [str(tmp_path / name) for name in ("kivi2.log", "bf16.log")]
    for _ in range(2):  # what is there is replaced
        assert run(["serving", "--run", "one", "--about", json.dumps(ABOUT), "--out", str(out), *logs]) == 0
    return out


def test_a_log_becomes_rows(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, load, other, base = serving.rows_of([record])
    assert (pool["kind"], pool["num_gpu_blocks"], pool["memory_nbytes"]) == ("pool", 74_197, 116_702_076_928)
    assert serving.pools(pool) == (74_197, 4_530_781)
    assert (other["method"]["name"], other["memory_nbytes"], other["memory_gib"]) == ("bf16", None, 108.69)
    assert load["seconds"] == [2.8132, 2.05]
    assert serving.gain(load, base) == pytest.approx(2.15 / 2.05)
    capsys.readouterr()
    assert run(["serving", "--run", "x", "--out", str(record), str(record.parent / "bf16.log")]) == 2
    assert "neither the log nor --about says device_name, versions, commit, command" in capsys.readouterr().err
    (record.parent / "bf16.log").write_text(LOG.replace('"blocks": 74197', '"ranks": 2, "blocks": 74197'))
    assert run(["serving", "--run", "x", "--out", str(record), str(record.parent / "bf16.log")]) == 2
    assert "2 ranks, allowed is 1" in capsys.readouterr().err
    (record.parent / "bf16.log").write_text("nothing")
    assert run(["serving", "--run", "x", "--out", str(record), str(record.parent / "bf16.log")]) == 2
    assert run(["serving", "--run", "x", "--about", "[", "--out", str(record), str(record.parent / "kivi2.log")]) == 2
    assert "--about '[': allowed is a JSON object" in capsys.readouterr().err


def test_loads_are_held_to_bf16_of_their_run(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = serving.rows_of([record])
    assert not serving.broken(rows)
    assert serving.kept(rows).startswith("All 1 loads served beside bf16")
    assert run(["report", "--check", str(record)]) == 0
    slow = json.loads(record.read_text())
    slow["rows"][1] |= {"seconds": [2.1, 2.2], "step_seconds": [7e-3, 7.3e-3]}
    record.write_text(json.dumps(slow))
    assert [line.partition(": ")[2] for line in serving.broken(serving.rows_of([record]))] == [
        "kivi-2bit-g32-r128, 8 x 8,192 tokens: 0.98 times bf16's tokens a second, the least allowed is 1",
        "kivi-2bit-g32-r128, 8 x 8,192 tokens: a step takes 7.30 ms, in bf16 7.20",
    ]
    capsys.readouterr()
    assert run(["report", "--check", str(record)]) == 1
    assert "Serving FAILS in 2 figures of 1 loads" in capsys.readouterr().out
    slow["rows"][3]["run"] = "another"
    assert not serving.broken(slow["rows"])  # of other runs nothing is said


def test_a_load_without_a_step_of_decoding_has_no_step(record: Path) -> None:
    log = record.parent / "kivi2.log"
    log.write_text(LOG.replace('"at_once": 8, "step_ms": 5.7', '"at_once": 0, "step_ms": null'))
    words = ["serving", "--run", "one", "--about", json.dumps(ABOUT), "--out", str(record), str(log)]
    assert run(words) == 0
    rows = serving.rows_of([record])
    assert (rows[1]["at_once"], rows[1]["step_seconds"], len(rows[1]["seconds"])) == (0, [], 2)
    assert not serving.broken(rows)
    assert run(["report", "--check", str(record)]) == 0
    assert "load of vLLM" in [left.what for left in collect([record]).uncovered]


def test_pools_are_predicted_from_the_memory_that_is_printed(record: Path) -> None:
    found = collect([record])
    (pool,) = (each for each in verdicts(found.points) if each.claim.name == "vLLM's pool")
    assert pool.holds
    assert [left.what for left in found.uncovered] == ["pool of vLLM"]  # the log of the other gives GiB
    steps = [point for point in found.points if point.claim == "vLLM"]
    assert [point.measured for point in steps] == [5.7e-3, 7.2e-3]
    assert max(abs(point.error) for point in steps) < 0.1
    changed = json.loads(record.read_text())
    changed["rows"][0]["num_tokens"] += 61  # a block
    record.write_text(json.dumps(changed))
    assert not next(each for each in verdicts(collect([record]).points) if each.claim.name == "vLLM's pool").holds


def test_tables_show_what_is_recorded() -> None:
    rows = serving.rows_of()
    loads = [row for row in rows if row["kind"] == "load"]
    assert len({row["run"] for row in loads}) == serving_tables.loads(rows).count("| --- |")
    shown = serving_tables.agreement(rows).splitlines()[2:]
    assert len(shown) == sum(row["kind"] == "agreement" for row in rows)
    other = rows[0] | {"device_name": "another"}
    said = serving_tables.circumstances([rows[0], other, rows[0]])
    assert said.startswith("NVIDIA H200, vllm")
    assert said.count("NVIDIA H200") == said.count("; another, vllm") == 1
    with pytest.raises(ValueError, match="serving table 'all': allowed are loads, pools, agreement"):
        serving_tables.block("all")
