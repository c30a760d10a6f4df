"""The config parser: what is read from which key, and what is refused."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import catalog
from kvsim.layout import LayerShape
from kvsim.models.model import Model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


def test_numbers_and_the_keys_they_came_from() -> None:
    model = Model.from_config(LLAMA | {"torch_dtype": "bfloat16"}, "tiny")
    assert model.layers == (LayerShape(2, 32, 32),) * 4
    assert (model.num_q_heads, model.max_positions, model.dtype, model.weight_bits) == (8, 2048, "bfloat16", 16)
    assert (
        dict(model.sources).items()
        >= {
            "num_layers": "num_hidden_layers",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "hidden_size / num_attention_heads",
            "max_positions": "max_position_embeddings",
            "dtype": "torch_dtype",
        }.items()
    )


def test_an_explicit_head_dim_wins() -> None:
    model = Model.from_config(LLAMA | {"head_dim": 64})
    assert model.layers[0].key_dim == 64
    assert model.source("head_dim") == "head_dim"


def test_absent_kv_heads_mean_all_heads_only_where_the_class_says_so() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert Model.from_config(config).layers[0].num_kv_heads == 8
    with pytest.raises(ValueError, match="num_key_value_heads is absent"):
        Model.from_config(config | {"model_type": "qwen2"})


def test_a_size_that_only_the_parameter_count_needs_may_be_absent() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
    model = Model.from_config(config)
    assert model.num_params is None
    assert model.layers == Model.from_config(LLAMA).layers


def test_multi_query() -> None:
    config = {"model_type": "gpt_bigcode", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64}
    assert Model.from_config(config).layers[0] == LayerShape(1, 16, 16)
    assert Model.from_config(config | {"multi_query": False}).layers[0] == LayerShape(4, 16, 16)


def test_falcon_has_three_ways_to_say_its_heads() -> None:
    config = {"model_type": "falcon", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8}
    assert Model.from_config(config).layers[0].num_kv_heads == 1
    assert Model.from_config(config | {"num_kv_heads": 8}).layers[0].num_kv_heads == 1  # multi_query by default
    assert Model.from_config(config | {"multi_query": False}).layers[0].num_kv_heads == 8
    new = Model.from_config(config | {"new_decoder_architecture": True, "num_kv_heads": 2})
    assert new.layers[0].num_kv_heads == 2
    assert "broadcast to all 8 query heads" in new.notes[0]
    with pytest.raises(ValueError, match="num_key_value_heads is absent"):
        Model.from_config(config | {"new_decoder_architecture": True})


@pytest.mark.parametrize(
    ("change", "full"),
    [
        ({"model_type": "mistral"}, True),  # a note says that transformers fills in 4096
        ({"model_type": "mistral", "sliding_window": None}, True),
        ({"model_type": "mistral", "sliding_window": 1024}, False),
        ({"model_type": "mistral", "sliding_window": 2048}, True),  # as long as the positions: never bites
        ({"model_type": "mixtral"}, True),
        ({"model_type": "mixtral", "sliding_window": 1024}, False),
        ({"model_type": "phi3", "sliding_window": 1024}, False),
        ({"model_type": "phi3"}, True),
        ({"model_type": "starcoder2", "sliding_window": 1024}, False),
        ({"model_type": "starcoder2"}, True),
        ({"model_type": "qwen2", "sliding_window": 1024}, True),  # switched off by default
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False}, True),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 0}, False),
        ({"model_type": "qwen2", "sliding_window": None, "use_sliding_window": True}, True),
    ],
)
def test_sliding_windows(change: dict[str, Any], full: bool) -> None:
    if full:
        assert {layer.window for layer in Model.from_config(LLAMA | change).layers} == {None}
    else:
        assert {layer.window for layer in Model.from_config(LLAMA | change).cache_layers} == {1024}


REFUSED = {
    "mla": ({"kv_lora_rank": 512}, "kv_lora_rank is 512"),
    "chunked": ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192"),
    "nas": ({"block_configs": [{"attention": {"no_op": True}}]}, "block_configs"),
    "hybrid": ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
    "linear": ({"full_attention_interval": 4}, "full_attention_interval is 4"),
    "mamba": ({"mamba_num_heads": 128}, "mamba_num_heads"),
    "shared": ({"num_kv_shared_layers": 15}, "num_kv_shared_layers is 15"),
    "sparse": ({"index_topk": 2048}, "index_topk"),
    "cross": ({"add_cross_attention": True}, "add_cross_attention is True"),
    "layer types": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types has 'sliding_attention'",
    ),
    "layer count": ({"layer_types": ["full_attention"]}, "layer_types .* 1 entries for 4 layers"),
    "nested": ({"text_config": LLAMA, "model_type": "mllama"}, "text_config of model_type 'mllama'"),
    "nested mla": (
        {"text_config": LLAMA | {"kv_lora_rank": 512}, "model_type": "llava"},
        "text_config.kv_lora_rank is 512",
    ),
    "unknown": ({"model_type": "lama"}, "model_type is 'lama': did you mean llama"),
    "a window that the class does not know": ({"sliding_window": 512}, "sliding_window is 512"),
    "both ways": ({"model_type": "gemma2", "head_dim": 32, "use_bidirectional_attention": True}, "both|bidirectional"),
    "a kind without its window": (
        {"model_type": "mistral", "layer_types": ["sliding_attention"] * 4, "sliding_window": None},
        "sliding_window is None",
    ),
    "no model type": ({"model_type": None}, "model_type is None"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "text for a number": ({"hidden_size": "big"}, "hidden_size is 'big'"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "uneven heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3: allowed are divisors of the 8"),
    "uneven hidden": ({"hidden_size": 250}, "num_attention_heads is 8: allowed are divisors of hidden_size 250"),
    "no head_dim": ({"model_type": "gemma"}, "head_dim is absent"),
    "number for a switch": ({"attention_bias": 1}, "attention_bias is 1: allowed are true and false"),
    "odd dtype": ({"torch_dtype": "int3"}, "torch_dtype is 'int3'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_key_in_one_line(kind: str) -> None:
    change, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        Model.from_config(LLAMA | change)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_config_object() -> None:
    with pytest.raises(ValueError, match="JSON object, not list"):
        Model.from_config([LLAMA])  # type: ignore[arg-type]


def test_a_vision_wrapper_of_a_plain_decoder() -> None:
    inner = LLAMA | {"model_type": "ministral3", "head_dim": 32}
    model = Model.from_config({"model_type": "mistral3", "dtype": "bfloat16", "text_config": inner})
    assert model.layers == (LayerShape(2, 32, 32),) * 4
    assert model.source("num_layers") == "text_config.num_hidden_layers"
    assert model.dtype == "bfloat16"
    assert "vision" in model.notes[0]


def test_quantized_weights() -> None:
    assert Model.from_config(LLAMA | {"quantization_config": {"quant_method": "fp8"}}).weight_bits == 8
    assert Model.from_config(LLAMA | {"quantization_config": {"quant_method": "gptq"}}).weight_bits is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
READ = sorted({key for row in catalog.rows("models") for key in Model.from_config(row["config"]).read})


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(catalog.rows("models")), st.dictionaries(st.sampled_from(READ), JSON, max_size=3))
def test_any_value_under_any_key_is_read_or_refused(row: catalog.Row, change: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        model = Model.from_config(row["config"] | change)
        assert model.layers
        assert all(layer.num_kv_heads > 0 and layer.key_dim > 0 for layer in model.cache_layers)
