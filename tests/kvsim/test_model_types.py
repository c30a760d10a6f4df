"""Every model type of transformers that generates text: taken or refused as tests/support/model_types.json records it.

The figures of the newer families are those of their own classes in transformers 5.24 (recorded by
``python tests/support/model_types.py``), so that they hold where an older transformers has no such class.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from model_types import RECORD, VERDICTS
from model_variants import RECORDED
from oracle import predicted, weighed

from kvsim.models.families import FAMILIES, REFUSED, WRAPPERS
from kvsim.models.model import Model

TOLD = json.loads(RECORD.read_text(encoding="utf-8"))
TYPES: dict[str, dict[str, Any]] = TOLD["types"]
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 4096,
}  # fmt: skip


def test_every_verdict_is_one_that_the_document_explains() -> None:
    assert {row["verdict"] for row in TYPES.values()} <= set(VERDICTS)
    assert {name for name, row in TYPES.items() if row["verdict"] in ("refused", "not causal")} <= set(REFUSED)
    assert {name for name in RECORDED if "config" in TYPES[name]} >= set(RECORDED) - WITHOUT_CACHE


WITHOUT_CACHE = {"glm_image_text", "granite4_vision_text", "xlstm"}
"""Recorded families whose forward pass does not run on the ``meta`` device."""


def test_the_installed_transformers_has_no_type_without_a_verdict() -> None:
    transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
    from model_types import names

    if tuple(map(int, transformers.__version__.split(".")[:2])) > tuple(map(int, TOLD["transformers"].split(".")[:2])):
        pytest.skip(f"transformers {transformers.__version__} is newer than the record's {TOLD['transformers']}")
    assert set(names()) <= set(TYPES)


@pytest.mark.parametrize("name", [name for name, row in TYPES.items() if "config" in row])
def test_a_newer_family_equals_its_recorded_class(name: str) -> None:
    row = TYPES[name]
    model = Model.from_config(row["config"])
    assert model.num_params == row["parameters"]
    for num_tokens in filter(str.isdecimal, row):
        assert weighed(predicted(model, int(num_tokens))) == row[num_tokens]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_taken_is_refused_by_its_reason(name: str) -> None:
    with pytest.raises(ValueError, match="model_type is"):
        Model.from_config({**LLAMA, "model_type": name})
    with pytest.raises(ValueError, match="model_type") as told:
        Model.from_config({**LLAMA, "model_type": name, "text_config": LLAMA})
    assert str(told.value).endswith(REFUSED[name])


def test_any_wrapper_of_a_known_decoder_is_taken() -> None:
    plain = Model.from_config(LLAMA)
    for key in ("text_config", "llm_config", "language_config"):
        model = Model.from_config({"model_type": "newest_vision", key: LLAMA, "vision_config": {"hidden_size": 8}})
        assert model.layers == plain.layers
        assert any("newest_vision" in note for note in model.notes)


@pytest.mark.parametrize("key", ["sliding_window", "kv_lora_rank", "layer_types", "cross_attention_layers"])
def test_an_unknown_wrapper_whose_own_key_smells_of_the_cache_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"config key {key} is 4096"):
        Model.from_config({"model_type": "newest_vision", "text_config": LLAMA, key: 4096})


def test_an_unknown_decoder_is_refused_in_one_short_line_that_points_on() -> None:
    with pytest.raises(ValueError, match=r"text_config\.model_type is 'hyena'") as told:
        Model.from_config({"model_type": "newest_vision", "text_config": {**LLAMA, "model_type": "hyena"}})
    assert "docs/models.md" in str(told.value)
    assert "kvsim models" in str(told.value)
    assert "did you mean" not in str(told.value)
    assert len(str(told.value)) < 200
    with pytest.raises(ValueError, match="did you mean gpt_neox"):
        Model.from_config({**LLAMA, "model_type": "gpt_neo_x"})


def test_a_wrapper_says_what_it_keeps_beside_its_decoder() -> None:
    text = {**LLAMA, "model_type": "voxtral_realtime_text", "head_dim": 16, "sliding_window": 8}
    model = Model.from_config({"model_type": "voxtral_realtime", "text_config": text})
    assert any("audio encoder keeps a sliding cache" in note for note in model.notes)


def test_prompts_that_are_kept_whole_are_said_to_be() -> None:
    model = Model.from_config(TYPES["unlimited_ocr_text"]["config"])
    assert dict(model.kinds) == {"full": 2}
    assert any("the prompt is kept whole" in note for note in model.notes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dory", {"n_recurrent_layers": 5}, "n_recurrent_layers"),
        ("dory", {"recurrent_kv_cache_mode": "some"}, "recurrent_kv_cache_mode is 'some'"),
        ("dory", {"layer_types": ["full_attention", "mlp"] * 7 + ["mlp", "mlp"]}, "mlp|layer_types"),
        ("hrm_text", {"H_cycles": 10**6}, "H_cycles is 1000000"),
        ("inkling2_loop_text", {"loop_num_passes": 10**6}, "loop_num_passes"),
        ("inkling2_loop_text", {"loop_layer_index_end": 99}, "loop_layer_index_end is 99"),
        ("mistral_large4_text", {"kv_source_layers": [0, 1, 2, 3, 4, 5, 6, 9]}, "kv_source_layers"),
        ("mistral_large4_text", {"no_rope_layers": [2] * 8}, "no_rope_layers"),
        ("qwen4_exp_text", {"ple_layer_ids": [4]}, "ple_layer_ids"),
        ("qwen4_exp_text", {"indexer_kv_heads": 2}, "indexer_kv_heads is 2"),
        ("dots3_note_text", {"per_layer_config": {"2": {"kv_lora_rank": 8}}}, "per_layer_config"),
        ("dots3_note_text", {"per_layer_config": {"2": {"hidden_size": 8}}}, "hidden_size is not known"),
        ("mllama_text_model", {"cross_attention_layers": [77]}, "cross_attention_layers"),
        ("zaya", {"layer_types": ["hybrid", "full_attention"] * 2}, "'full_attention'"),
        ("ernie4_5_vl_moe_text", {"moe_intermediate_size": [1, 2, 3]}, "moe_intermediate_size"),
    ],
)
def test_what_a_class_does_not_allow_is_refused_by_its_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model.from_config({**TYPES[name]["config"], **change})


def test_window_layers_latents_of_their_own_in_the_words_of_the_checkpoint() -> None:
    """dots3-note publishes its decoder's keys at the top, its window layers' as ``swa_*``."""
    given = {key: value for key, value in TYPES["dots3_note_text"]["config"].items() if key != "per_layer_config"}
    flat = {**given, "model_type": "dots3_note", "layer_types": None, "swa_kv_lora_rank": 256, "vision_config": {}}
    shapes = {(layer.kind, layer.key_dim) for layer in Model.from_config(flat).cache_layers}
    assert shapes == {("mla", 512 + 64), ("sliding", 256 + 64)}


def test_deepseek_v2_without_latents_has_keys_and_values_of_every_head() -> None:
    """As DeepSeek-OCR publishes its decoder: ``use_mla`` off, every size of a latent null or 0."""
    text = {
        "model_type": "deepseek_v2", "use_mla": False, "kv_lora_rank": None, "q_lora_rank": None, "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 0, "v_head_dim": 0, "hidden_size": 1280, "num_hidden_layers": 12, "num_attention_heads": 10,
        "num_key_value_heads": 10, "intermediate_size": 6848, "moe_intermediate_size": 896, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 129280,
    }  # fmt: skip
    model = Model.from_config({"model_type": "deepseek_ocr", "language_config": text})
    assert dict(model.kinds) == {"full": 12}
    assert {(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in model.cache_layers} == {(10, 128, 128)}
    assert model.num_params == Model.from_config(TYPES["unlimited_ocr_text"]["config"] | {
        "num_hidden_layers": 12, "layer_types": None, "mlp_layer_types": ["dense"] + ["sparse"] * 11,
    }).num_params  # fmt: skip


def test_wrappers_and_refused_types_are_apart() -> None:
    assert not set(REFUSED) & (set(FAMILIES) | set(WRAPPERS))
