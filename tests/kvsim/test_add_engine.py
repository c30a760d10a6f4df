"""An engine is one file and one row: a toy with pages of its own serves every command that takes an engine."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import kvsim.commands
from kvsim.cli import run
from kvsim.engines import ENGINES, Engine, EngineChoice, Ideal, make_engine
from kvsim.engines.engine import Group, Pool
from kvsim.hardware import Hardware
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import decode_step
from kvsim.layout import Method
from kvsim.memory.estimate import estimate
from kvsim.methods import Full, Kivi, make_method
from kvsim.models.load import load_model
from kvsim.models.model import Model

for module in pkgutil.iter_modules(kvsim.commands.__path__):
    import_module(f"kvsim.commands.{module.name}")  # help names the engines there are when it is written: not the toy

PAGE = 48
LLAMA = load_model("llama-3.1-8b")


@dataclass(frozen=True)
class Toy(Engine):
    """What a new engine's file holds: pages of ``page_size`` tokens a sequence, larger ones on cards of 100 GB."""

    label = "TOY"
    own_flags = ()
    cache_methods = ("fp8",)

    page_size: int = PAGE
    eager: bool = False
    mode: str = "plain"

    @property
    def name(self) -> str:
        return "toy"

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        exact = Ideal().parts(model, method, batch_size, num_tokens)
        paged = Ideal().parts(model, method, batch_size, -(-num_tokens // self.page_size) * self.page_size)
        return exact | {"padding": sum(paged.values()) - sum(exact.values())}

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        return (f"pages of {self.page_size}",)

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        return {"workspace": 1 << 30}

    def pool(self, model: Model, method: Method, available: int, max_model_len: int) -> Pool | None:
        page = sum(self.parts(model, method, 1, self.page_size).values())
        group = Group("full", len(model.layers), self.page_size, page)
        return Pool(available // page, page, max_model_len, -(-max_model_len // self.page_size), (group,))

    @classmethod
    def on(cls, card: Hardware | None, num_cards: int) -> dict[str, Any]:
        return {"page_size": 2 * PAGE} if card is not None and (card.memory_nbytes or 0) > 10**11 else {}


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "toy", Toy)


def answer(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, Any]:
    assert run([*command.split(), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def pages(tokens: int, method: str = "fp16", size: int = PAGE) -> int:
    return estimate(LLAMA, make_method(method), 1, -(-tokens // size) * size).nbytes


def test_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "estimate --model llama-3.1-8b --ctx 1000 --engine toy --gpu h100")
    assert [row["method"] for row in out["rows"]] == ["fp16", "fp8"]  # its cache_methods
    assert [row["nbytes"] for row in out["rows"]] == [pages(1000), pages(1000, "fp8")]
    assert out["rows"][0]["pool"]["block_size"] == PAGE
    assert out["gpu"]["overhead"] == {"workspace": 1 << 30}
    assert out["inputs"]["engine_options"] == {"page_size": PAGE, "eager": False, "mode": "plain"}
    assert "toy: pages of 48" in out["notes"]
    spec = "toy:page_size=64,eager=on,mode=fast"
    out = answer(capsys, f"estimate --model llama-3.1-8b --ctx 1000 --engine {spec} --gpu h200")
    assert out["rows"][0]["nbytes"] == pages(1000, size=64)
    assert out["inputs"]["engine_options"] == {"page_size": 64, "eager": True, "mode": "fast"}
    out = answer(capsys, "estimate --model llama-3.1-8b --ctx 1000 --engine toy --gpu h200")
    assert out["rows"][0]["nbytes"] == pages(1000, size=2 * PAGE)  # its default on that card


def test_a_screen_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "--model", "llama-3.1-8b", "--engine", "toy", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "GPU blocks" in out
    assert "(10%, --reserve)" in out


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "compare --model llama-3.1-8b --ctx 1000 --engines --method fp16")
    row = next(row for row in out["rows"] if row["engine"] == "toy")
    assert row["nbytes"] == pages(1000)
    assert {reason["engine"] for reason in out["engines"]} == set(ENGINES)


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpy", reason="the plan extra (numpy) is not installed")
    command = "plan --model llama-3.1-8b --gpu h100:1 --users 8 --method fp16 --input-len 900 --output-len 100"
    (toy,), (ideal,) = (answer(capsys, f"{command} --engine {name}")["rows"] for name in ("toy", "ideal"))
    assert toy["fits"]
    assert toy["max_batch"] < ideal["max_batch"]  # a GiB of workspace, and rounding


def test_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("numpy", reason="the plan extra (numpy) is not installed")
    out = answer(capsys, "sweep --model llama-3.1-8b --method fp16 --ctx 1,1000 --engine toy --gpu h100 --gpu h200")
    found = [(row["gpu"], row["ctx"], row["nbytes"]) for row in out["rows"]]
    assert found == [
        (card, tokens, pages(tokens, size=size))
        for card, size in (("h100-sxm", PAGE), ("h200-sxm", 2 * PAGE))
        for tokens in (1, 1000)
    ]


def test_report_and_breakeven(capsys: pytest.CaptureFixture[str]) -> None:
    out = answer(capsys, "report --model llama-3.1-8b --gpu h100 --engine toy --ctx 1000 --batch 1")
    assert next(row for row in out["rows"] if row["method"] == "fp16")["nbytes"] == pages(1000)
    answer(capsys, "breakeven --model llama-3.1-8b --gpu h100 --engine toy --batch 1 --ctx 4k --method fp8")


def test_what_it_does_not_have_it_is_refused_for(capsys: pytest.CaptureFixture[str]) -> None:
    def error(command: str) -> str:
        assert run(command.split()) == 2
        return capsys.readouterr().err.strip()

    assert "toy does not share prefixes: allowed are ideal and vllm" in error(
        "estimate --model gpt2 --engine toy --shared-prefix 8"
    )
    assert "engine toy has no --block-size: it is vllm's" in error("estimate --model gpt2 --engine toy --block-size 8")
    assert "engine toy has no --block-size: it is vllm's" in error(
        "plan --model gpt2 --gpu t4 --users 1 --engine toy --block-size 8"
    )
    assert "is not one of eager, mode, page_size" in error("estimate --model gpt2 --engine toy:pages=8")


def test_an_engine_says_no_more_than_its_name_and_its_parts() -> None:
    @dataclass(frozen=True)
    class Least(Engine):
        @property
        def name(self) -> str:
            return "least"

        def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
            return {"key": batch_size * num_tokens}

    engine = Least()
    assert isinstance(engine, Engine)
    assert engine.held(LLAMA) is LLAMA
    assert engine.overhead(LLAMA, Hardware("", "", "", None, "", None, None, None, None, None, None, "")) == {}
    assert engine.pool(LLAMA, Full(), 10**9, 100) is None
    assert (engine.gpu_memory_utilization, engine.max_seq_len, engine.cache_methods) == (None, 0, None)
    assert estimate(LLAMA, Kivi(), 2, 3, engine).parts == {"key": 6}


def test_a_choice_is_refused_where_the_engine_would_be() -> None:
    with pytest.raises(LookupError, match="unknown engine 'vlm': did you mean vllm"):
        EngineChoice("vlm")
    with pytest.raises(ValueError, match="does not take pages"):
        EngineChoice("toy", (("pages", 1),))
    assert EngineChoice("toy", (("page_size", 8),)).on(None) == Toy(8)


def test_times_read_the_windows_that_the_engine_applies() -> None:
    """llama.cpp runs Mistral's layers whole: steps over long contexts read all of them, as its bytes do."""
    from kvsim.hardware import find_hardware

    model, card = load_model("mistralai/Mistral-7B-v0.1"), find_hardware("h100")
    assert any(layer.window for layer in model.cache_layers)
    llama_cpp = make_engine("llama.cpp")
    whole = llama_cpp.held(model)
    for tokens in (32768, 131072):
        own = decode_step(model, Full(), card, 4, tokens, Serving(engine=llama_cpp))
        assert own == decode_step(whole, Full(), card, 4, tokens, Serving(engine="llama.cpp"))
        assert own.parts["kv"] > 2 * decode_step(model, Full(), card, 4, tokens).parts["kv"]
