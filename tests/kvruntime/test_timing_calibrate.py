"""A card measured in place of the stated constants: the runtime measures, kvsim reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvsim.cli import run
from kvsim.hardware import find_hardware
from kvsim.latency.calibrate import calibrate
from kvsim.latency.profile import PARTS, Profile, load_profile
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import decode_step, first_token, prefill, token_step
from kvsim.methods import make_method
from kvsim.models.load import load_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    lines: list[str] = []
    calibrate(path, "cpu", 1.0, say=lines.append)
    assert any(line.startswith("weight_bandwidth") for line in lines)
    return path


def test_the_profile_is_of_this_machine(measured: Path) -> None:
    found = json.loads(measured.read_text(encoding="utf-8"))
    assert found["seconds"] < 60
    assert found["runtime"] == load_profile(measured).runtime == "pytorch"
    assert found["parts"].keys() == {"kvruntime", "kvruntime:generate", "transformers", "transformers:new"}
    assert found["lacks"].keys() == {"kvruntime:compiled"}  # a CPU compiles no step
    assert "generate() compiles on CUDA alone, not on cpu" in found["lacks"]["kvruntime:compiled"]
    assert found["command"] == ["kvsim", "calibrate", "--device", "cpu", "--seconds", "1", "--out", measured.name]
    for name in ("read_bandwidth", "copy_bandwidth", "weight_bandwidth", "flops", "layer_seconds"):
        assert 0 < found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
    assert 1e8 < found["read_bandwidth"]["value"] < 1e12
    rows = found["attention"]["rows"]
    assert len(rows) >= 3
    small, large = min(rows, key=lambda row: row["nbytes"]), max(rows, key=lambda row: row["nbytes"])
    assert small["value"] < large["value"]
    assert list(measured.parent.iterdir()) == [measured]  # nothing half-written beside it


def test_a_profile_predicts_its_own_rows(measured: Path) -> None:
    """The kernel fitted to the measured shapes gives them back within what it says."""
    found, profile = json.loads(measured.read_text(encoding="utf-8")), load_profile(measured)
    fixed = profile.constants()
    kernel = fixed.kernels["fp16"]
    for row in found["attention"]["rows"]:
        stream = row["nbytes"] / (kernel.efficiency * profile.read_bandwidth)
        seconds = fixed.curve.seconds(kernel, row["batch_size"] * 8, row["num_tokens"], stream, 1)
        assert profile.low * 0.999 <= row["value"] / seconds <= profile.high * 1.001
    assert profile.high / profile.low < 25


def test_a_profile_takes_the_place_of_stated_constants(measured: Path) -> None:
    profile = load_profile(measured)
    model, method = load_model("gpt2"), make_method("fp16")
    mine = decode_step(model, method, profile.hardware, 1, 512, Serving(profile=profile.constants()))
    assert mine.parts["overhead"] == pytest.approx(12 * profile.layer_seconds)
    assert model.weights is not None
    read = 2 * (model.weights.dense + model.weights.embedding)
    assert mine.parts["weights"] == pytest.approx(read / profile.weight_bandwidth)
    with pytest.raises(ValueError, match="not a profile of this card"):
        profile.constants(find_hardware("b200"))


def test_a_part_predicts_the_steps_that_it_was_fitted_to(measured: Path) -> None:
    """Each runtime's steps come out within what its part says, and a part's engine takes nothing of PyTorch's."""
    found, profile = json.loads(measured.read_text(encoding="utf-8")), load_profile(measured)
    for name, part in profile.parts.items():
        ratios = [row["value"] / row["predicted"] for row in found["parts"][name]["rows"]]
        assert part.low == pytest.approx(min(ratios))
        assert part.high == pytest.approx(max(ratios))
    assert [line.partition(": ")[0] for line in profile.missing()] == ["kvruntime:compiled"]
    fixed, engine = profile.constants(), profile.parts["kvruntime"]
    assert engine.layouts
    assert fixed.engine_layer_seconds["kvruntime"] == engine.layer_seconds != profile.layer_seconds
    assert fixed.kernels["kvruntime/fp16"].efficiency * profile.read_bandwidth == pytest.approx(
        engine.kernels["fp16"].bandwidth
    )
    assert "whole steps of kvruntime measured" in profile.note("kvruntime")


def test_a_profile_that_is_there_stays_until_another_is_whole(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvruntime.calibrate import card
    from kvruntime.calibrate.steps import CPU, Step
    from kvsim.methods import method_named
    from kvsim.models.model import Model

    def stopped(plan: object, place: object, say: object, wanted: object, keep: Any) -> None:
        keep(of_first)
        raise KeyboardInterrupt

    of_first: dict[str, list[Step]] = {}
    before = json.loads(measured.read_text(encoding="utf-8"))
    names = ("read_bandwidth", "copy_bandwidth", "weight_bandwidth", "flops", "layer_seconds", "attention")
    monkeypatch.setattr(card, "figures", lambda *_: {name: before[name] for name in names})
    monkeypatch.setattr(card, "measure", stopped)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(before), encoding="utf-8")
    for path in (old, new):
        with pytest.raises(KeyboardInterrupt):
            card.calibrate(path, "cpu", 1.0)
    assert json.loads(old.read_text(encoding="utf-8")) == before
    assert not load_profile(new).parts  # of a card that had none, its own figures at least
    rows = [row for row in before["parts"]["transformers"]["rows"] if row["shape"] == "wide"]
    model = Model.from_config(CPU.subjects["wide"].shape.config(CPU.positions))
    for row in rows * 2:
        about = "transformers", "wide", model, method_named(row["method"]), row["batch_size"], row["num_tokens"]
        of_first.setdefault("transformers", []).append(Step(*about, row["value"], row["low"], row["high"]))
    with pytest.raises(KeyboardInterrupt):
        card.calibrate(tmp_path / "cut.json", "cpu", 1.0)
    cut = load_profile(tmp_path / "cut.json")
    assert list(cut.parts) == ["transformers"]  # and what the first shape tells
    assert cut.missing()[0] == "kvruntime: the calibration was cut"


def test_a_part_is_measured_anew_and_the_rest_stays(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of transformers' own caches that take ten times as long: their parts follow, nothing else does."""
    from kvruntime.calibrate import card
    from kvruntime.calibrate.steps import CPU, Step
    from kvsim.methods import method_named
    from kvsim.models.model import Model

    path, before = tmp_path / "profile.json", json.loads(measured.read_text(encoding="utf-8"))
    path.write_text(json.dumps(before), encoding="utf-8")
    own = ("transformers", "transformers:new")

    def slower(
        plan: object, place: object, say: object, wanted: tuple[str, ...], keep: object
    ) -> tuple[dict[str, list[Step]], dict]:
        assert wanted == own  # one call has the lengths of both
        found: dict[str, list[Step]] = {}
        for name in wanted:
            for row in before["parts"][name]["rows"]:
                model = Model.from_config(CPU.subjects[row["shape"]].shape.config(CPU.positions))
                about = name, row["shape"], model, method_named(row["method"]), row["batch_size"], row["num_tokens"]
                found.setdefault(name, []).append(
                    Step(*about, *(10 * row[value] for value in ("value", "low", "high")))
                )
        return found, {}

    monkeypatch.setattr(card, "measure", slower)
    after = card.calibrate(path, "cpu", 1.0, only=("transformers:new",))
    assert after == json.loads(path.read_text(encoding="utf-8"))
    for name, part in after["parts"].items():
        rows, held = ([row["predicted"] for row in each["parts"][name]["rows"]] for each in (after, before))
        assert (sum(rows) > 1.5 * sum(held)) if name in own else part["fitted"] == before["parts"][name]["fitted"]
        assert part["code"]
    assert {name: after[name] for name in ("attention", "lacks", "read_bandwidth")} == {
        name: before[name] for name in ("attention", "lacks", "read_bandwidth")
    }
    with pytest.raises(LookupError, match="unknown part 'vllm': allowed are kvruntime, "):
        card.calibrate(path, "cpu", 1.0, only=("vllm",))
    assert card.chosen((), ("kvruntime:compiled",)) == tuple(name for name in PARTS if name != "kvruntime:compiled")
    assert card.chosen(("transformers",), ("transformers:new",)) == ("transformers",)
    with pytest.raises(ValueError, match="no part is left to measure: kvruntime left out"):
        card.chosen(("kvruntime",), ("kvruntime",))
    path.write_text(json.dumps(before | {"device": {"name": "another"}}), encoding="utf-8")
    with pytest.raises(ValueError, match="is of another, this is"):
        card.calibrate(path, "cpu", 1.0, only=("transformers",))


def test_a_fit_finds_the_constants_that_made_the_steps() -> None:
    """Steps made by known constants, on a card of another bandwidth: what is fitted to some predicts the others."""
    pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
    from kvruntime.calibrate import fit
    from kvruntime.calibrate.steps import CUDA, ENGINE, Step
    from kvsim.latency.constants import constants
    from kvsim.latency.profile import Rates
    from kvsim.models.model import Model

    hardware, start = find_hardware("h200"), fit.first_guess(4.4e12)
    made = replace(start, weight_bandwidth=3.3e12, layer_seconds=1.2e-5)
    made = replace(made, wide={"rows": 1.0, "layer_seconds": 6e-6, "row_seconds": 2e-7})
    packed = replace(start.kernels["packed"], bandwidth=4.0e12, code_ops=3.0, scale_ops=10.0)
    made = replace(made, kernels={"fp16": replace(start.kernels["fp16"], bandwidth=4.0e12), "packed": packed})
    steps = []
    for name, subject in CUDA.subjects.items():
        model = Model.from_config(subject.shape.config(65536))
        for method in (make_method("bf16"), *CUDA.packed):
            for size in subject.plain if method == make_method("bf16") else subject.packed:
                steps.append(Step(ENGINE, name, model, method, *size, 0.0, 0.0, 0.0))
    seconds = fit.predicted(ENGINE, made, steps, constants(), hardware)
    steps = [step._replace(seconds=float(each)) for step, each in zip(steps, seconds, strict=True)]
    found = fit.fit(ENGINE, steps, constants(), hardware, start)
    assert found.weight_bandwidth == pytest.approx(3.3e12, rel=0.01)
    assert found.layer_seconds == pytest.approx(1.2e-5, rel=0.1)
    assert 0.98 < found.low <= found.high < 1.02
    assert isinstance(found.kernels["packed"], Rates)
    llama = load_model("llama-3-8b")
    for method in (make_method("bf16"), *CUDA.packed):
        for size in ((1, 2048), (1, 32768), (8, 8192), (64, 4096)):
            unseen = [Step(ENGINE, "", llama, method, *size, 0.0, 0.0, 0.0)]
            one, other = (fit.predicted(ENGINE, part, unseen, constants(), hardware)[0] for part in (found, made))
            assert one == pytest.approx(other, rel=0.03)
    with pytest.raises(ValueError, match="3 steps were measured, 4 and more are needed"):
        fit.fit(ENGINE, steps[:3], constants(), hardware, start)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"vllm": {}}, "part 'vllm', allowed are kvruntime"),
        ({"kvruntime": 3}, "kvruntime is 3, not an object"),
        ({"kvruntime": {"fitted": {"layer_seconds": 1.0}}}, "part kvruntime: missing 1 required"),
        (
            {"kvruntime": {"fitted": {"layer_seconds": -1.0, "weight_bandwidth": 1.0}}},
            "kvruntime.layer_seconds is -1.0",
        ),
        ({"kvruntime": {"fitted": {"layer_seconds": 1, "weight_bandwidth": 1, "x": 1}}}, "unexpected"),
    ],
)
def test_a_broken_part_names_the_field(tmp_path: Path, parts: dict[str, object], said: str) -> None:
    path = tmp_path / "profile.json"
    found = json.loads(PROFILE.read_text(encoding="utf-8")) | {"schema": "kvsim.profile/2", "parts": parts}
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        load_profile(path)


def card() -> Profile:
    numbers = (3.0e12, 2.9e12, 2.8e12, 6e14, 3e-5, 8e-6, 3e-6, 2.9e12, 0.9, 1.1)
    return Profile("NVIDIA H100 80GB HBM3", 85017493504, *numbers, source="test")


@pytest.mark.parametrize("engine", ["kvruntime", "vllm", "sglang", "trtllm", "llama.cpp", "never-heard-of"])
def test_a_profile_is_of_the_runtime_it_was_measured_with(engine: str) -> None:
    """PyTorch's launches, products and attention are not another engine's: its times are refused, not misled."""
    hardware, model, method = find_hardware("h100"), load_model("llama-3.1-8b"), make_method("fp16")
    fixed = card().constants(hardware)
    with pytest.raises(ValueError, match=f"engine {engine}: the profile was not measured with its kernels"):
        decode_step(model, method, hardware, 1, 2048, Serving(engine=engine, profile=fixed))
    with pytest.raises(ValueError, match=f"engine {engine}"):
        token_step(model, method, hardware, 1, 2048, 16, Serving(engine=engine, profile=fixed))
    with pytest.raises(ValueError, match=f"engine {engine}"):
        prefill(model, hardware, 1, 2048, Serving(engine=engine, profile=fixed))
    with pytest.raises(ValueError, match=f"engine {engine}"):
        first_token(model, method, hardware, 1, 2048, 16, Serving(engine=engine, profile=fixed))


def test_stock_generate_waits_for_the_host_with_a_profile_too() -> None:
    """A layer in a CUDA graph is not what the host takes to launch it, which stays as stated."""
    hardware = find_hardware("h100")
    fixed = card().constants(hardware)
    step = decode_step(
        load_model("gpt2"), make_method("fp16"), hardware, 1, 512, Serving(engine="transformers", profile=fixed)
    )
    stated = decode_step(load_model("gpt2"), make_method("fp16"), hardware, 1, 512, Serving(engine="transformers"))
    assert step.seconds.value == pytest.approx(stated.seconds.value, rel=0.2)
    assert step.parts["weights"] < 0.2e-3


PROFILE = Path(__file__).parents[2] / "validation/results/profiles/nvidia-h100-80gb-hbm3.json"


def test_a_recorded_profile_is_of_its_runtime_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A file that does not say its runtime was measured with PyTorch's."""
    assert "runtime" not in json.loads(PROFILE.read_text(encoding="utf-8"))
    ask = ["estimate", "--model", "llama-3-8b", "--gpu", "h100", "--method", "fp16", "--profile", str(PROFILE)]
    for engine in ("kvruntime", "vllm", "llama.cpp", "kvruntime:steps=generate"):
        assert run([*ask, "--engine", engine]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        name = engine.replace("steps=", "")
        assert said.err.startswith(f"kvsim: error: engine {name}: the profile was not measured with its kernels")
        assert len(said.err.splitlines()) == 1
    assert run([*ask, "--engine", "kvruntime", "--tp", "2"]) == 2
    split = "engine kvruntime:generate, whose times kvruntime has where cards share every layer: the profile was not"
    assert split in capsys.readouterr().err
    for engine in ([], ["--engine", "transformers"]):
        assert run([*ask, *engine]) == 0
        assert "note: times are those of pytorch's 16-bit kernels, measured on NVIDIA H100" in capsys.readouterr().out


def test_a_faster_profile_is_faster() -> None:
    hardware, model, method = find_hardware("h100"), load_model("llama-3.1-8b"), make_method("fp16")
    one = decode_step(model, method, hardware, 8, 8192, Serving(profile=card().constants(hardware)))
    fast = replace(card(), weight_bandwidth=3.1e12, bandwidth=3.0e12)
    two = decode_step(model, method, hardware, 8, 8192, Serving(profile=fast.constants(hardware)))
    assert two.parts["weights"] < one.parts["weights"]
    assert two.parts["kv"] < one.parts["kv"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "other"}, "is not a profile"),
        ({"flops": {"value": 0}}, "flops.value is 0"),
        ({"weight_bandwidth": {"value": "fast"}}, "weight_bandwidth.value is 'fast'"),
        ({"attention": {}}, "attention.fixed is None"),
        ({"device": {}}, "device.name is missing"),
        ({"runtime": "vllm"}, "runtime is 'vllm', allowed are pytorch"),
        ({"runtime": ["pytorch"]}, "runtime is .*, allowed are pytorch"),
        ({"flops": {"value": 10**400}}, "flops.value is 1000.*, allowed are numbers above 0 to 1e"),
        ({"flops": {"value": float("inf")}}, "flops.value is inf"),
        ({"flops": {"value": float("nan")}}, "flops.value is nan"),
    ],
)
def test_a_broken_profile_names_the_field(tmp_path: Path, change: dict[str, object], said: str) -> None:
    figure = {"value": 1.0}
    names = ("read_bandwidth", "copy_bandwidth", "weight_bandwidth", "flops", "layer_seconds")
    good = {"schema": "kvsim.profile/1", "device": {"name": "x"}, **dict.fromkeys(names, figure)}
    good["attention"] = dict.fromkeys(("fixed", "item", "bandwidth", "low", "high"), 1.0)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(good), encoding="utf-8")
    assert load_profile(path).device == "x"
    assert load_profile(path).runtime == "pytorch"
    path.write_text(json.dumps({**good, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        load_profile(path)


def test_the_answer_as_json(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvsim.latency.calibrate.calibrate", lambda *_, **__: load_profile(measured))
    assert run(["calibrate", "--out", str(tmp_path / "p.json"), "--device", "cpu", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out.keys() == {"schema", "inputs", "notes", "not_modelled", "path", "rows"}
    assert out["schema"] == "kvsim.calibrate/1"
    assert out["rows"][0]["device"] == load_profile(measured).device
    assert run(["calibrate", "--out", str(tmp_path / "p.json")]) == 0
    said = capsys.readouterr().out
    assert "measured with pytorch's own kernels: for --engine ideal and transformers" in said
    assert "Not modelled:\n" in said
    assert "its steps within" in said
    assert said.splitlines()[-1].startswith(load_profile(measured).device)  # a CPU has no data sheet


def test_the_last_line_is_what_a_card_does_of_its_data_sheet() -> None:
    from kvsim.commands.calibrate import of_data_sheet

    assert of_data_sheet(load_profile(PROFILE)) == (
        "this card does 91% of the bandwidth (3,046 of 3,350 GB/s) and 69% of the arithmetic (681 of 989 TFLOP/s) of "
        "its data sheet (h100-sxm)"
    )


def test_estimate_says_whose_attention_a_profile_does_not_measure(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens coded one by one have kernels of their own, which calibration does not time."""
    path = PROFILE.with_name("nvidia-h200.json")
    ask = ["estimate", "--model", "llama-3-8b", "--gpu", "h200", "--engine", "kvruntime", "--json"]
    told = {}
    for methods in (("kivi",), ("kivi", "int8", "turboquant")):
        given = [word for name in methods for word in ("--method", name)]
        assert run([*ask, *given, "--profile", str(path)]) == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        told[methods] = [note for note in notes if "no profile has it" in note]
    assert [len(notes) for notes in told.values()] == [0, 1]
    assert told["kivi", "int8", "turboquant"][0].startswith("int8, turboquant-4bit: ")


def test_estimate_takes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half the measured bandwidth, twice the time of the weights' stream."""
    figures = {"read_bandwidth": 3e12, "copy_bandwidth": 2.9e12, "flops": 6e14, "layer_seconds": 1e-9}
    ask = ["estimate", "--model", "llama-3.1-8b", "--gpu", "h100", "--batch", "1", "--ctx", "128", "--json"]
    seconds = []
    for rate in (2.8e12, 1.4e12):
        found = {"schema": "kvsim.profile/1", "device": {"name": "card"}, "weight_bandwidth": {"value": rate}}
        found |= {name: {"value": value} for name, value in figures.items()}
        found["attention"] = {"fixed": 1e-9, "item": 1e-9, "bandwidth": 2.9e12, "low": 0.9, "high": 1.1}
        path = tmp_path / f"{rate:g}.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        assert run([*ask, "--method", "fp16", "--profile", str(path)]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["rows"][0]["tpot_seconds"]["value"])
    assert seconds[1] / seconds[0] == pytest.approx(2, rel=0.01)
    assert run(["estimate", "--model", "gpt2", "--profile", str(path)]) == 2
    assert "give --gpu too" in capsys.readouterr().err
    assert run([*ask[:4], "b200", "--profile", str(path)]) == 2
    assert "not a profile of this card" in capsys.readouterr().err


def test_without_the_runtime_it_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("kvsim.latency.calibrate.find_spec", lambda name: None)
    assert run(["calibrate", "--out", str(tmp_path / "p.json")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "needs the runtime" in said[0]
    assert "pip install" in said[0]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
    assert run(["calibrate", "--out", str(tmp_path / "p.json"), "--device", "tpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_card_is_timed_long_enough_and_not_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
    import torch

    from kvruntime.calibrate import pytorch as calibrate

    counts: list[int] = []

    def passes(run: object, count: int, warm: int = 0) -> list[float]:
        counts.append(count)
        return [each] * count

    monkeypatch.setattr(calibrate, "timed_passes", passes)
    monkeypatch.setattr(calibrate.Clock, "_graph", lambda self, function: function)
    for share, each, repeats in ((3.0, 2e-3, 500), (0.5, 2e-3, 250), (3.0, 1e-6, 2000), (0.1, 1.0, 3)):
        taken = calibrate.Clock(torch.device("cuda"), share)(lambda: None, inner=4)
        assert taken == [each / 4] * repeats
    assert counts == [3, 500, 3, 250, 3, 2000, 3, 3]
