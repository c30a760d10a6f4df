"""Which kernel runs: only a Triton without Gluon gives the portable one, and every command says which it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from hf_models import prompt, tiny  # noqa: E402
from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime import make_cache, selfcheck  # noqa: E402
from kvruntime.cli import run  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.methods import LAYERS, kivi, make_layer  # noqa: E402
from kvruntime.methods.kivi import cache as room  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, PerTokenHead, TurboQuant  # noqa: E402

ABSENT = ModuleNotFoundError("No module named 'triton.experimental.gluon'", name="triton.experimental.gluon")
BROKEN = (
    ModuleNotFoundError("No module named 'kvruntime.methods.kivi.fast_pln'", name="kvruntime.methods.kivi.fast_pln"),
    ImportError("cannot import name 'plan_split' from 'kvruntime.methods.kivi.fast_plan'"),
    ImportError("cannot import name 'warp_group' from 'triton.experimental.gluon'", name="triton.experimental.gluon"),
    AttributeError("module 'triton' has no attribute 'jitt'"),
    SyntaxError("invalid syntax"),
)


def importing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The import of the tensor-core kernel ends in ``error``."""

    def kernels(name: str) -> object:
        assert name == "fast"
        raise error

    monkeypatch.setattr(room, "_kernels", kernels)


def test_a_triton_without_gluon_gives_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, ABSENT)
    assert room._fast.__wrapped__() is None


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_any_other_failure_to_import_it_is_raised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    importing(monkeypatch, error)
    with pytest.raises(type(error), match=str(error)[:20]):
        room._fast.__wrapped__()


@pytest.mark.parametrize(
    ("device", "there", "holds", "said"),
    [
        ("cpu", True, True, "PyTorch reference"),
        ("cuda", True, True, "Triton, tensor cores"),
        ("cuda", True, False, "Triton, portable"),
        ("cuda", False, True, "Triton, portable"),
    ],
)
def test_a_layer_says_which_kernel_attends(
    monkeypatch: pytest.MonkeyPatch, device: str, there: bool, holds: bool, said: str
) -> None:
    monkeypatch.setattr(room, "_fast", lambda: object() if there else None)
    monkeypatch.setattr(room, "_kernels", lambda name: SimpleNamespace(holds=lambda record: holds))
    layer = SimpleNamespace(device=torch.device(device), record=None)
    assert kivi.KiviLayer.kernel.fget(layer) == said


@pytest.mark.parametrize(
    ("method", "dim", "tokens", "said"),
    [
        (TurboQuant(3), 128, 4096, "Triton, whole numbers"),
        (TurboQuant(3), 128, 4097, "Triton (rows of 4,097 tokens: whole numbers take an even number)"),
        (PerTokenHead("int8"), 128, 4097, "Triton, whole numbers"),
        (TurboQuant(3), 64, 4096, "Triton"),
        (PerTokenHead("fp8"), 128, 4096, "Triton"),
    ],
)
def test_a_layer_of_coded_tokens_says_which_kernel_attends(method: Any, dim: int, tokens: int, said: str) -> None:
    layer = make_layer(method, LayerShape(1, dim, dim), 1, tokens, torch.device("cpu"))
    assert layer.kernel == "PyTorch reference"
    layer.device = torch.device("cuda")
    assert layer.kernel == said


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> str:
    """What layers say after a silent change of kernel."""
    monkeypatch.setattr(kivi.KiviLayer, "kernel", property(lambda layer: "Triton, portable"))
    return "Triton, portable"


def test_the_caches_repr_says_it(slow: str) -> None:
    model = tiny("Llama")
    cache = make_cache(model, "kivi")
    assert "kernel" not in repr(cache)
    with torch.no_grad():
        model(**prompt(1, 9), **argument(cache))
    assert f"kernel={slow}" in repr(cache)


def test_selfcheck_says_it(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "LAYERS", {Kivi: LAYERS[Kivi]._replace(examples=(Kivi(2, residual_length=64),))})
    said: list[str] = []
    selfcheck.selfcheck("cpu", said.append)
    assert any(f"({slow})" in line for line in said), said


def test_bench_says_it(slow: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    size = "--batch 1 --prompt-tokens 16 --decode-tokens 2 --warmup 0 --repeats 1"
    assert run(f"bench --model {tiny_directory(tmp_path)} --only speed {size} --out {out}".split()) == 0
    said = {row["method"]: row.get("kernel") for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert said["kivi-2bit-g32-r128"] == slow
    assert "PyTorch's scaled_dot_product_attention" in said["fp16"]
    assert f"kivi-2bit-g32-r128: {slow}" in capsys.readouterr().out
