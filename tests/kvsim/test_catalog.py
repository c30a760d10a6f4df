"""Every row of the catalogue against literal figures, and against the wider catalogue where it lies beside."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kvsim import catalog
from kvsim.cli import run
from kvsim.hardware import Hardware, find_hardware, plain
from kvsim.memory.estimate import cache_nbytes
from kvsim.methods import Full
from kvsim.models.load import ASIDE, load_model
from kvsim.models.model import Model

FIGURES = json.loads(Path(__file__).parents[1].joinpath("support", "kvsim_figures.json").read_text())
BESIDE = Path(__file__).parents[3] / "shared" / "catalogue"
ROWS = {row["id"]: row for row in catalog.rows("models")}


def test_the_figures_cover_the_catalogue() -> None:
    assert list(ROWS) == list(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_bytes_and_parameters_of_every_row(name: str) -> None:
    model = load_model(name)
    figures = FIGURES[name]
    assert cache_nbytes(model, Full(), 1, 1) == figures["bytes_per_token"]
    for num_tokens in (1024, 8192, 32768, 131072):
        assert cache_nbytes(model, Full(), 1, num_tokens) == figures[str(num_tokens)]
    assert model.num_params == figures["parameters"]
    assert sum(buffer.nbytes for layer in model.state_layers for buffer in layer.buffers(1)) == figures.get("state", 0)


@pytest.mark.parametrize("name", FIGURES)
def test_a_row_holds_only_keys_that_are_read(name: str) -> None:
    config = ROWS[name]["config"]
    read = Model.from_config(config).read
    nested = config.get("text_config", {})
    assert set(config) - {"text_config", "dtype"} <= read | ({"model_type", "torch_dtype"} if nested else set())
    assert set(nested) <= read


@pytest.mark.parametrize("kind", ["models", "hardware"])
def test_every_row_has_a_source_and_names_of_its_own(kind: str) -> None:
    owners = Counter(name for row in catalog.rows(kind) for name in catalog.names(row))
    assert [name for name, count in owners.items() if count > 1] == []
    assert all(row["source"].strip() for row in catalog.rows(kind))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("LLAMA-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B"),
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("QwQ-32B", "Qwen/Qwen2.5-32B"),
        ("DeepSeek-R1-0528", "deepseek-ai/DeepSeek-V3"),
        ("Qwen3-Coder-480B", "Qwen/Qwen3-Coder-480B-A35B-Instruct"),
        ("GLM-4.5-Air", "zai-org/GLM-4.5-Air"),
        ("Mistral-Small-3.2-24B", "mistralai/Mistral-Small-3.2-24B-Instruct-2506"),
        ("llama3.1:8b", "meta-llama/Meta-Llama-3.1-8B"),
        ("qwen3:32b", "Qwen/Qwen3-32B"),
        ("gemma3:27b", "google/gemma-3-27b-it"),
        ("deepseek-r1:70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("phi4", "microsoft/phi-4"),
        ("gpt_oss_20b", "openai/gpt-oss-20b"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen/Qwen3-235B-A22B"),
        ("moonshotai/Kimi-K2-Thinking", "moonshotai/Kimi-K2.5"),
        ("zai-org/GLM-4.6", "zai-org/GLM-4.5"),
    ],
)
def test_names_that_people_type(name: str, row: str) -> None:
    assert load_model(name).name == row


def test_hardware_units_and_lookup() -> None:
    card = find_hardware("H100")
    assert card.id == "h100-sxm"
    assert card.memory_nbytes == 81559 * 2**20
    assert card.bandwidth == 3350e9
    assert card.fp16_flops == 989e12
    assert find_hardware("a30").memory_nbytes == 24 * 10**9  # only the marketed size is known
    assert find_hardware("apple-m5-pro").memory_nbytes is None
    with pytest.raises(LookupError, match="did you mean h100"):
        find_hardware("h1000")


def test_hardware_rows_all_parse() -> None:
    cards = [Hardware.from_row(row) for row in catalog.rows("hardware")]
    assert len(cards) == 67
    assert all(card.bandwidth for card in cards)


def test_multiprocessors_and_caches_say_where_they_come_from() -> None:
    cards = [Hardware.from_row(row) for row in catalog.rows("hardware")]
    stated = [card for card in cards if card.num_sms or card.l2_nbytes]
    assert len(stated) == 40
    assert all(card.sms_source for card in stated)
    assert find_hardware("mi300x").sms_source.startswith("AMD ROCm documentation")
    assert "an estimate" in find_hardware("b300-sxm").sms_source


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        *(("mi300x", 191.984), ("mi325x", 255.984), ("mi350x", 287.984), ("mi355x", 287.984), ("mi210", 63.984)),
        *(("rx-7900-xtx", 23.984), ("a10", 22.488), ("h100-sxm", 79.647), ("b200-sxm", 179.062)),
        *(("apple-m1", 10.667), ("apple-m1-max", 48.0), ("apple-m2-ultra", 144.0)),
    ],
)
def test_memory_is_what_a_driver_reports(name: str, gib: float) -> None:
    """AMD's gives the size in GiB less 16 MiB, Metal two thirds or three quarters of it; llama.cpp logs 11,453.25 MB
    on an M1 of 16 GiB, 51,539.61 MB on one of 64."""
    card = find_hardware(name)
    assert card.memory_nbytes / 2**30 == pytest.approx(gib, abs=1e-3)
    assert card.memory_source != "marketed size"
    assert "recalled" not in card.memory_source


def test_no_figure_is_recalled() -> None:
    """Every card has sources that a reader can look at: a page, an issue, a file at a commit, a driver's own words."""
    for row in catalog.rows("hardware"):
        told = [row["source"], row.get("memory_usable_source"), row.get("sms_source")]
        assert not [text for text in told if text and re.search(r"recall|not verified", text)], row["id"]
    assert find_hardware("mi300x").memory_source.endswith("ROCm/legacy-rocm-build issue 4750")


needs_catalogue = pytest.mark.skipif(
    not (BESIDE / "models.json").is_file(), reason="no shared/catalogue/ beside the checkout to compare with"
)


@needs_catalogue
def test_every_row_of_the_wider_catalogue_from_its_own_config() -> None:
    """Bytes, parameters, layer kinds and constant state, from the published config with all its keys."""
    rows = json.loads((BESIDE / "models.json").read_text())
    assert len(rows) == 86
    for row in rows:
        model, expected = Model.from_config(row["config"]), row["expected_ideal_kv"]
        assert cache_nbytes(model, Full(), 1, 1) == expected["bytes_per_token_first"], row["id"]
        for num_tokens in (1024, 8192, 32768, 131072):
            assert cache_nbytes(model, Full(), 1, num_tokens) == expected[f"bytes_at_{num_tokens}"], row["id"]
        per_token = cache_nbytes(model, Full(), 1, 2**24 + 128) - cache_nbytes(model, Full(), 1, 2**24)
        assert per_token == 128 * expected["bytes_per_token_asymptotic"], row["id"]
        assert row["params_total"] in (None, model.num_params), row["id"]
        assert kinds(model) == row["layer_kinds"], row["id"]
        state = row.get("recurrent_state")
        assert len(model.state_layers) == (state["layers"] if state else 0), row["id"]
        for layer in model.state_layers:
            tensors = [[1, *shape] for _, shape, _ in layer.tensors]
            assert tensors == [shape for _, shape, _ in state["tensors_per_layer"]], row["id"]
            assert sum(buffer.nbytes for buffer in layer.buffers(1)) == state["bytes_per_layer"], row["id"]
        assert load_model(row["id"]).layers == model.layers


def kinds(model: Model) -> dict[str, int]:
    """Layers by kind, in the wider catalogue's words."""
    words = {"mamba2": "mamba_state", "gated_delta_net": "linear_state", "kda": "linear_state", "mla+indexer": "mla"}
    words["full+indexer"] = "full"
    out: Counter[str] = Counter()
    for kind, count in model.kinds:
        out["dsv4" if model.model_type == "deepseek_v4" else words.get(kind, kind)] += count
    return dict(out)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", "mi300x"),
        ("b200_sxm", "b200-sxm"),
    ],
)
def test_cards_as_drivers_and_people_spell_them(name: str, card: str) -> None:
    assert find_hardware(name).id == card


def test_no_two_cards_answer_to_one_spelling() -> None:
    owners = [(plain(name), row["id"]) for row in catalog.rows("hardware") for name in catalog.names(row)]
    assert len(dict(owners)) == len(dict.fromkeys(owners))
    for nothing in ("", "-", "NVIDIA"):
        with pytest.raises(LookupError, match="unknown GPU"):
            find_hardware(nothing)


@needs_catalogue
def test_cards_equal_the_wider_catalogue() -> None:
    beside = json.loads((BESIDE / "hardware.json").read_text())["accelerators"]
    cards = [Hardware.from_row(row) for row in catalog.rows("hardware")]
    others = [Hardware.from_row(row) for row in beside]
    apart = dict.fromkeys(("num_sms", "l2_nbytes", "sms_source", "memory_nbytes", "memory_source", "note", "source"))
    apart |= {"host_cards": 8}
    mended = {"tpu-v7-ironwood": {"bandwidth": 7380e9}}  # its vendor's page since
    theirs = [replace(card, **apart, **mended.get(card.id, {})) for card in others]
    assert theirs == [replace(card, **apart) for card in cards]
    for theirs, ours in zip(others, cards, strict=True):  # where a driver's figure stands beside, it is ours
        assert theirs.memory_source == "marketed size" or theirs.memory_nbytes == ours.memory_nbytes
        if theirs.memory_nbytes and ours.memory_nbytes and ours.vendor != "apple":
            assert ours.memory_nbytes == pytest.approx(theirs.memory_nbytes, rel=0.08)


@pytest.mark.parametrize(
    ("name", "row", "bits"),
    [
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "meta-llama/Meta-Llama-3.1-8B", 8),
        ("RedHatAI/Qwen2.5-32B-Instruct-FP8-dynamic", "Qwen/Qwen2.5-32B", 8),
        ("nvidia/Llama-3.3-70B-Instruct-FP4", "meta-llama/Llama-3.3-70B-Instruct", 4.5),
        ("qwen2.5-7b-instruct-awq", "Qwen/Qwen2.5-7B", 4 + 20 / 128),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "Qwen/Qwen2.5-7B", 8 + 24 / 128),
        ("nvidia/DeepSeek-R1-0528-FP4", "deepseek-ai/DeepSeek-V3", 4.5),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "meta-llama/Llama-3.2-1B", 4.127),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B", None),
        ("unsloth/Qwen3-32B-GGUF", "Qwen/Qwen3-32B", None),
        ("zai-org/GLM-4.5-Air-FP8", "zai-org/GLM-4.5-Air", 8),
        ("unsloth/Qwen3-8B", "Qwen/Qwen3-8B", 16),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "meta-llama/Meta-Llama-3.1-8B", 8),
        ("RedHatAI/gemma-3-27b-it-quantized.w4a16", "google/gemma-3-27b-it", 4.125),
        ("amd/Llama-3.1-70B-Instruct-FP8-KV", "meta-llama/Meta-Llama-3.1-70B", 8),
        ("amd/Llama-3.3-70B-Instruct-MXFP4-Preview", "meta-llama/Llama-3.3-70B-Instruct", 4.25),
        ("hugging-quants/Meta-Llama-3.1-405B-Instruct-AWQ-INT4", "meta-llama/Meta-Llama-3.1-405B", 4 + 20 / 128),
        ("TheBloke/Llama-2-7B-Chat-GGUF", "meta-llama/Llama-2-7b-hf", None),
        ("unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF:Q4_K_M", "Qwen/Qwen3-30B-A3B", None),
        ("google/gemma-3-27b-it-qat-q4_0-gguf", "google/gemma-3-27b-it", None),
        ("mlx-community/Qwen3-8B-4bit", "Qwen/Qwen3-8B", 4.5),
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-8bit", "meta-llama/Meta-Llama-3.1-8B", 8.5),
        ("Intel/Qwen3-30B-A3B-int4-AutoRound", "Qwen/Qwen3-30B-A3B", 4 + 20 / 128),
        ("turboderp/Llama-3.1-8B-Instruct-exl3", "meta-llama/Meta-Llama-3.1-8B", None),
        ("nvidia/DeepSeek-R1-0528-NVFP4-v2", "deepseek-ai/DeepSeek-V3", 4.5),
    ],
)
def test_a_quantized_checkpoint_has_its_models_layers(name: str, row: str, bits: float | None) -> None:
    quantized, plain = load_model(name), load_model(row)
    assert quantized.layers == plain.layers
    assert quantized.num_params == plain.num_params
    assert quantized.weight_bits == bits
    assert any(row in note and name in note for note in quantized.notes)


def test_the_models_command_answers_the_names_that_model_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "unsloth/gpt-oss-20b-GGUF"]) == 0
    assert "id           openai/gpt-oss-20b\n" in (out := capsys.readouterr().out)
    assert "by the name unsloth/gpt-oss-20b-GGUF" in out
    assert run(["models", "llama-9-8b-fp8"]) == 2


def test_no_two_rows_answer_to_one_spelling_without_dashes() -> None:
    owners = {(ASIDE.sub("", name), row["id"]) for row in catalog.rows("models") for name in catalog.names(row)}
    assert len(dict(owners)) == len(owners)


@pytest.mark.parametrize("name", ["llama-9-8b-fp8", "fp8", "-fp8", "gpt-oss-20b-fp8"])
def test_a_quantized_checkpoint_of_nothing_known_is_unknown(name: str) -> None:
    with pytest.raises(LookupError, match="unknown model"):
        load_model(name)


def test_every_row_is_shown_alone(capsys) -> None:
    """Also those whose layers are a pattern, without a key for their number."""
    for kind in ("models", "hardware"):
        for row in catalog.rows(kind):
            assert run([kind, row["id"]]) == 0, row["id"]
            assert row["id"] in capsys.readouterr().out
