"""Every byte accounted: the formulas' products are the sections' bytes, for every method."""

from dataclasses import dataclass

import pytest

from kvsim.analysis.explain import explain, model_numbers
from kvsim.layout import Buffer, LayerShape, parts
from kvsim.memory.estimate import estimate
from kvsim.methods import METHODS, Kivi, make_method
from kvsim.models.load import load_model
from kvsim.specs import parse_method

SETTINGS = [
    *(make_method(name) for name in METHODS),
    Kivi(nbits=3, group_size=64, residual_length=192, sink_length=7, dtype="float32"),
    Kivi(key_nbits=8, value_nbits=4, key_group_size="sequence", value_group_size=16, residual_length=64),
]


@pytest.mark.parametrize("method", SETTINGS, ids=lambda method: method.name)
@pytest.mark.parametrize("num_tokens", [1, 32, 127, 2048, 5000])
def test_products_are_the_bytes(method: Kivi, num_tokens: int) -> None:
    model = load_model("gpt2-medium")
    weighed = estimate(model, method, 3, num_tokens)
    explained = explain(model, method, 3, num_tokens)
    assert explained.nbytes == weighed.nbytes
    assert {formula.section: formula.nbytes for formula in explained.formulas if formula.nbytes} == {
        name: size for name, size in weighed.parts.items() if size
    }


def test_numbers_are_the_factors_of_their_name() -> None:
    """Where a product's factor is shown as a number with its origin too."""
    model, shown = load_model("gpt2-medium"), set()
    for name in METHODS:
        found = explain(model, make_method(name), 3, 2048)
        numbers = {number.name: number.value for number in found.numbers}
        factors = {label: value for formula in found.formulas for value, label in formula.factors}
        both = numbers.keys() & factors.keys() - {"bytes"}  # of numbers of several kinds
        assert {label: numbers[label] for label in both} == {label: factors[label] for label in both}, name
        shown |= {(label, numbers[label]) for label in both}
    assert {("rows", 24 * 3 * 16), ("boosted", 16), ("boost bits", 2)} <= shown


def test_numbers_name_their_config_keys() -> None:
    origins = {number.name: number.origin for number in model_numbers(load_model("llama-3-8b"), 2, 100)}
    assert origins == {
        "layers": "num_hidden_layers",
        "kv heads": "num_key_value_heads",
        "head dim": "head_dim",
        "batch": "--batch",
        "tokens": "--ctx",
    }


@dataclass(frozen=True)
class Halves:
    """A method that explain has no row for."""

    name: str = "halves"

    def buffers(self, layer: LayerShape, batch_size: int, num_tokens: int) -> list[Buffer]:
        return [
            Buffer("plain", (batch_size, num_tokens, layer.key_dim), "float8_e4m3fn"),
            Buffer("mixed", (batch_size, 10), "uint8", (("a", 4 * batch_size), ("b", 6 * batch_size))),
        ]

    def read_parts(self, layer: LayerShape, batch_size: int, num_tokens: int) -> dict[str, int]:
        return parts(self.buffers(layer, batch_size, num_tokens))


def test_a_new_method_is_explained_by_its_shapes() -> None:
    model = load_model("gpt2")
    explained = explain(model, Halves(), 2, 50)
    assert explained.nbytes == estimate(model, Halves(), 2, 50).nbytes == 12 * 2 * (50 * 64 + 10)


KINDS = (
    "google/gemma-3-27b-it",  # windows
    "openai/gpt-oss-20b",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",  # chunks
    "deepseek-ai/DeepSeek-V3.2",  # latents and index keys
    "deepseek-ai/DeepSeek-V4-Flash",  # compressed entries
    "Qwen/Qwen3-Next-80B-A3B-Instruct",  # states
    "moonshotai/Kimi-Linear-48B-A3B-Instruct",  # states and latents
    "nvidia/Nemotron-H-56B-Base-8K",
)
SPECS = (
    "fp16",
    "fp8",
    "int8",
    "nvfp4",
    "paged:inner=fp8",
    "evict:policy=h2o,ratio=25%,inner=int4",
    "mix:exact=bf16,inner=fp8",
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_is_accounted_for(name: str, spec: str) -> None:
    model, method = load_model(name), parse_method(spec, {})
    weighed = estimate(model, method, 3, 5000)
    explained = explain(model, method, 3, 5000)
    assert explained.nbytes == weighed.nbytes
    assert explained.apart_nbytes == weighed.state_nbytes + weighed.index_nbytes
    by_section: dict[str, int] = {}
    for formula in explained.formulas:
        by_section[formula.section] = by_section.get(formula.section, 0) + formula.nbytes
    stored = weighed.parts | weighed.state_parts | weighed.index_parts
    assert {key: size for key, size in by_section.items() if size} == {
        key: size for key, size in stored.items() if size
    }
    assert all(formula.layer for formula in explained.formulas if formula.apart)
    assert all(number.origin for number in model_numbers(model, 3, 5000) if "head dim" not in number.name)
