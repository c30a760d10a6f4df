"""The oracle without a GPU: transformers' own classes on the ``meta`` device, byte for byte and weight for weight.

Every row of the catalogue against tests/support/oracle.json (recorded by ``python tests/support/oracle.py``), the
record against a live run, and every family against its class with the settings of tests/support/model_variants.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from model_variants import EARLIER, NO_CACHE, ON_CPU, SKIPPED, VARIANTS
from oracle import MISSES, NUM_TOKENS, RECORD, cache_of, measure, predicted, text_model, weighed

from kvsim import catalog
from kvsim.models.families import FAMILIES
from kvsim.models.model import Model

FACTS: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
ROWS = {row["id"]: row["config"] for row in catalog.rows("models")}


def first_of_each_type() -> list[str]:
    chosen: dict[str, str] = {}
    for name, config in ROWS.items():
        chosen.setdefault(config.get("text_config", config)["model_type"], name)
    return [name for name in chosen.values() if "parameters" in FACTS[name]]


def test_the_record_covers_the_catalogue_and_explains_its_misses() -> None:
    assert list(FACTS) == list(ROWS)
    missed = {name for name, fact in FACTS.items() if "miss" in fact}
    assert missed <= set(MISSES)
    assert all(MISSES[name] == FACTS[name]["miss"] for name in missed)
    assert len(missed) <= 3


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if "parameters" in fact])
def test_every_row_equals_the_record(name: str) -> None:
    model, fact = Model.from_config(ROWS[name]), FACTS[name]
    assert model.num_params in (fact["parameters"], None)
    assert model.num_params is not None or model.model_type == "mistral4"
    lengths = [key for key in fact if key.isdecimal()]
    assert len(lengths) == 2
    for num_tokens in lengths:
        ours = predicted(model, int(num_tokens))
        assert weighed(ours) == weighed(fact[num_tokens]), num_tokens
        assert ours.get("buffer", 0) >= fact[num_tokens].get("buffer", 0)


@pytest.mark.parametrize("name", first_of_each_type())
def test_the_record_equals_a_live_run(name: str) -> None:
    pytest.importorskip("torch", reason="the runtime extra (torch, transformers) is not installed")
    transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
    since, why = EARLIER.get(ROWS[name].get("text_config", ROWS[name])["model_type"], ((5, 0), ""))
    if tuple(map(int, transformers.__version__.split(".")[:2])) < since:
        pytest.skip(why)
    live, fact = measure(name, ROWS[name], long=False), FACTS[name]
    assert {"parameters", str(NUM_TOKENS)} <= set(live)
    ours, recorded = ({**facts, **facts[str(NUM_TOKENS)]} for facts in (live, fact))
    assert ours.pop("buffer", 0) <= recorded.pop("buffer", 0)  # before 5.24 a block's gates had 16 bits
    assert {key: recorded.get(key) for key in ours if not key.isdecimal()} == {
        key: value for key, value in ours.items() if not key.isdecimal()
    }


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in SKIPPED])
def test_every_family_equals_its_class(model_type: str) -> None:
    pytest.importorskip("torch", reason="the runtime extra (torch, transformers) is not installed")
    transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    since, why = EARLIER.get(model_type, ((5, 0), ""))
    if version < since:
        pytest.skip(why)
    if model_type not in CONFIG_MAPPING:
        older = version < NEWER.get(model_type, (5, 23))
        assert older or model_type in REMOTE, "a family with neither a class in transformers nor a place in REMOTE"
        return
    for settings in VARIANTS.get(model_type, [{}]):
        config, model, parameters = text_model(model_type, settings, "cpu" if model_type in ON_CPU else "meta")
        ours = Model.from_config(json.loads(json.dumps(config.to_dict(), default=str)))
        if ours.num_params is not None or (FAMILIES[model_type].countable and not FAMILIES[model_type].count_if):
            assert ours.num_params == parameters, settings
        if model_type not in NO_CACHE:
            assert weighed(predicted(ours, NUM_TOKENS)) == weighed(cache_of(model, NUM_TOKENS)), settings


ABSENT: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("deepseek_v3", {"num_hidden_layers": 4}, ("q_lora_rank",)),
    ("kimi_linear", {"num_hidden_layers": 6}, ("layer_types", "linear_attn_config")),
    ("mimo_v2_flash", {"num_hidden_layers": 3}, ("v_head_dim",)),
    ("falcon", {"num_hidden_layers": 2, "multi_query": None, "parallel_attn": None}, ()),
]
"""Configs with keys that are null, and without keys that the class fills in."""


@pytest.mark.parametrize(("model_type", "settings", "absent"), ABSENT)
def test_absent_and_null_keys_are_what_the_class_makes_of_them(
    model_type: str, settings: dict[str, Any], absent: tuple[str, ...]
) -> None:
    torch = pytest.importorskip("torch", reason="the runtime extra (torch, transformers) is not installed")
    transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
    given = transformers.AutoConfig.for_model(model_type, **settings).to_dict() | settings
    given = {key: value for key, value in given.items() if key not in absent}
    ours = Model.from_config(json.loads(json.dumps(given, default=str)))
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**given)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    assert ours.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert weighed(predicted(ours, NUM_TOKENS)) == weighed(cache_of(model, NUM_TOKENS))


REMOTE = {
    "mimo", "kimi_k2", "minimax_m3", "nemotron-nas", "internlm2", "internlm", "baichuan", "chatglm", "qwen",
    "minicpm", "deepseek", "orion", "kimi_k25_text", "minimax_text_01", "minimax_m1", "gpt-sw3", "openelm",
}  # fmt: skip
"""Families published with code of their own."""
NEWER = dict.fromkeys(("apertus1p5_text", "exaone", "sarvam_mla", "sarvam_moe"), (5, 24)) | {
    "deepseek_v41_text": (5, 25)
}
"""Families whose class came with 5.24, or after it; those that 5.17 lacks besides are in 5.23."""
CHANGED = {("mimo_v2_flash", "sliding_window")}
"""Defaults that are others in 5.17: its window of 128 did not count the query."""


def test_the_defaults_are_the_classes_own() -> None:
    transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
    from model_defaults import defaults

    recorded, live = catalog._defaults(), defaults()
    newer = set(recorded) - set(live)
    assert set(live) <= set(recorded)
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert all(version < NEWER.get(name, (5, 23)) for name in newer), newer
    for model_type, row in live.items():
        for key in set(row) & set(recorded[model_type]):
            assert row[key] == recorded[model_type][key] or (model_type, key) in CHANGED, (model_type, key)
