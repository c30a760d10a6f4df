"""transformers' tensor and pipeline parallelism over two gloo processes: what each rank holds and computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from math import log2
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers.distributed", reason="transformers without its distributed module")

from parallel_rank import LENGTHS, OPTIONS  # noqa: E402
from runtime_tiny import SIZES  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from kvruntime.hf.models import layer_shapes  # noqa: E402
from kvsim.engines import Kvruntime  # noqa: E402
from kvsim.memory.sharding import Deployment, Sharding  # noqa: E402
from kvsim.methods import Kivi  # noqa: E402
from kvsim.models.load import load_model  # noqa: E402

SUPPORT = Path(__file__).parents[1] / "support"
SECONDS = 150
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A tiny model's folder, and what either rank saw; a rank that hangs is ended after ``SECONDS``."""
    folder = tmp_path_factory.mktemp("parallel")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES | HEADS, initializer_range=0.3)).save_pretrained(folder / "model")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own["PYTHONPATH"] = str(SUPPORT.parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | own
    command = [sys.executable, str(SUPPORT / "parallel_rank.py"), str(folder / "model"), str(folder / "seen")]
    logs = [(folder / f"log.{rank}").open("w+") for rank in range(2)]
    started = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(SECONDS) for process in started]
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    assert codes == [0, 0], "\n".join((folder / f"log.{rank}").read_text()[-1500:] for rank in range(2))
    return folder, [json.loads((folder / f"seen.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["tp", "pp"])
def test_a_rank_computes_what_one_process_does(kind: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Logits of left-padded prompts, single tokens and several; greedy, beam and compiled tokens."""
    for seen in ranks[1]:
        assert seen[kind]["apart"] < 1e-10
        for how in ("greedy", "beams", "compiled"):
            assert seen[kind][how] == seen["one"][how], how


@pytest.mark.parametrize("kind", ["tp", "pp"])
def test_a_rank_holds_what_kvsim_says(kind: str, ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, seen = ranks
    model = load_model(str(folder / "model" / "config.json"))
    method, tokens = Kivi(dtype="float32", **OPTIONS), max(LENGTHS) + 6
    name = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}[kind]
    deployed = Deployment(model, method, Kvruntime(), Sharding(**{name: 2}))
    assert [each[kind]["nbytes"] for each in seen] == [deployed.rank_nbytes(len(LENGTHS), tokens)] * 2
    assert seen[0]["one"]["nbytes"] == Deployment(model, method, Kvruntime()).rank_nbytes(len(LENGTHS), tokens)


def test_the_engine_has_its_ranks_heads_and_no_stages(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in ranks[1]:
        split, whole = seen["tp"]["engine"], seen["one"]["engine"]
        assert split["tokens"] == whole["tokens"]
        assert split["nbytes"] == split["after"]  # as many heads from the start as the first prompt brings
        assert whole["nbytes"] / 2 <= split["nbytes"] < whole["nbytes"] * 0.51
        assert "LlamaForCausalLM is split into pipeline stages" in seen["pp"]["engine"]["error"]


def test_what_ranks_measure(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """The same rows on both: an all-reduce a size; steps of stock and own caches, whose tokens and bytes are right."""
    first, second = (seen["ranks"] for seen in ranks[1])
    assert [row.get("seconds") for row in first] == [row.get("seconds") for row in second]
    reduces, steps = ([row for row in first if row["kind"] == kind] for kind in ("all_reduce", "step"))
    assert [row["nbytes"] for row in reduces] == [2048, 65536]
    ways = [(row["way"].split()[-1], row["method"]) for row in steps]
    own = ["fp32", "kivi-2bit-g32-r32"]
    assert ways == [("model", name) for name in ("DynamicCache", *own)] + [
        (way, name) for way in ("engine", "all-reduces") for name in own
    ]
    for row in steps:
        assert row["method"] == "DynamicCache" or row["nbytes"] == row["kvsim_nbytes"], row
        assert row["way"].endswith("all-reduces") or row["equal_tokens"], row


def test_a_curve_is_fitted_for_any_number_of_ranks() -> None:
    from validation.ranks.fit import fitted

    sizes = [2 << power for power in range(10, 26)]
    rows = [
        {"ranks": n, "nbytes": nbytes, "seconds": [3e-6 * log2(2 * n) + 2 * (n - 1) / n * nbytes / 2e11]}
        for n in (2, 4, 8)
        for nbytes in sizes
    ]
    assert fitted(rows) == pytest.approx((3e-6, 2e11))


def test_links_are_fitted_on_what_is_recorded(tmp_path: Path) -> None:
    """Both engines of NCCL get the curve's two numbers, and split models' steps are held against them."""
    from kvsim.latency.constants import constants
    from validation.latency.links import parts, reduced, study

    of = {"ranks": 2, "device": "NVIDIA H200"}
    rows: list[dict[str, Any]] = [
        of
        | {"kind": "all_reduce", "way": way, "nbytes": 2 << power, "seconds": [factor * (1e-5 + (2 << power) / 2e11)]}
        for way, factor in (("graph", 1), ("eager", 3))
        for power in range(10, 26)
    ]
    load = of | {"kind": "step", "model": "llama-3-70b", "num_layers": 20, "dtype": "bfloat16"}
    load |= {"method": "kivi-2bit-g64-r64", "batch_size": 8, "num_tokens": 32768}
    ways = (("engine", 0.01), ("engine without all-reduces", 0.009), ("model", 0.02))
    rows += [load | {"way": way, "seconds_per_step": [seconds]} for way, seconds in ways]
    assert study(constants(), tmp_path) == (constants(), {})
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "two.json").write_text(json.dumps({"rows": rows}))
    fixed, found = study(constants(), tmp_path)
    assert fixed.engine_link["kvruntime"] == fixed.engine_link["transformers"]
    assert fixed.engine_link["kvruntime"] == pytest.approx({"seconds": 5e-6, "efficiency": 2e11 / 4.5e11}, rel=1e-3)
    assert [each["num_rows"] for each in found.values()] == [16, 1, 1]
    assert next(iter(found.values()))["worst"] == pytest.approx(0, abs=1e-9)
    nbytes = 2 * 8 * 8192
    assert parts(rows[-3], fixed)["communication"] == pytest.approx(2 * 20 * (1e-5 + nbytes / 2e11), rel=1e-3)
    assert [(row["way"], round(seconds, 6)) for row, seconds in reduced(rows)] == [("engine", 0.001)]


def test_the_command_under_torchrun(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """The first rank prints what one process would, the other nothing."""
    (alone, first), (_, second) = (seen["command"] for seen in ranks[1])
    assert len(alone.split()) == 5
    assert first == alone
    assert second == ""


@pytest.mark.parametrize(("size", "why"), [(2, "2 in 1 process: start as many, `torchrun"), (0, "0 in 1 process")])
def test_the_command_without_torchrun(size: int, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    from kvruntime.cli import run

    assert run(["generate", "ab", "--model", "gpt2", "--device", "cpu", "--offline", "-tp", str(size)]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(("size", "heads"), [(1, 4), (2, 2), (4, 1)])
def test_shapes_of_a_rank(size: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | HEADS))
    monkeypatch.setattr(type(model), "tp_size", size)
    assert [shape.num_kv_heads for shape in layer_shapes(model)] == [heads] * 2


def test_ranks_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | HEADS))
    monkeypatch.setattr(type(model), "tp_size", 3)
    with pytest.raises(ValueError, match="not supported with tp_size 3: it does not divide 4 kv heads"):
        layer_shapes(model)
    monkeypatch.setattr(type(model), "tp_size", 2)
    monkeypatch.setattr(type(model), "supports_tp_plan", False)
    with pytest.raises(ValueError, match="not supported with tp_size 2: it has no tensor-parallel plan"):
        layer_shapes(model)
