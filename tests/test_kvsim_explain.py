"""Every byte accounted: the formulas' products are the sections' bytes, for every method."""

from dataclasses import dataclass

import pytest

from kvsim.estimate import estimate
from kvsim.explain import explain, model_numbers
from kvsim.layout import Buffer, LayerShape, parts
from kvsim.load import load_model
from kvsim.methods import METHODS, Kivi, make_method

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
