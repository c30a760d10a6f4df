"""What kvsim says of every model type of the installed transformers that generates text, held to its own classes.

``python tests/support/model_types.py`` builds each on the ``meta`` device and writes tests/support/model_types.json:
verdict and reason of each, and of the newer families a config with its class's figures, which hold where an older
transformers lacks the class.  tests/kvsim/test_model_types.py compares the parser and docs/models.md with it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("model_types.json")
LENGTHS = (8, 300)
EXACT, WEIGHTS, TEXT, PART = (
    "cache and parameters equal its class",
    "cache equals its class; parameters are not counted",
    "taken by its text side, which equals its class",
    "parameters equal its class, whose cache does not run without data or lies elsewhere",
)
OWN = "read by its row; its class does not start alone, or its defaults are no model"
VERDICTS = ("exact", "in part", "by its row", "refused", "not causal")

SETTINGS: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "glm4v_moe": {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 8}},
    "qwen3_omni_moe": {"thinker_config": {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 4}}},
    "qwen3_omni_moe_thinker": {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 4}},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256,
                                  "indexer_budget": 2048, "indexer_compress_ratio": 16}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "head_dim": 128,
              "num_key_value_heads": 8, "first_k_dense_replace": 1},
    "glm4_moe": {"head_dim": 128, "num_attention_heads": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "bamba": {"attn_layer_indices": [1, 4]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 6, "topk_group": 1, "n_group": 1},
}  # fmt: skip
"""What the defaults of a class lack to be a model."""

NOT_CAUSAL = ("an encoder", "a diffusion model", "a draft model", "a model of images")
"""Beginnings of the reasons for which a type is no causal language model of its own."""


def names() -> list[str]:
    """The model types in question: those of the automatic classes that generate, and every text side."""
    from oracle import MAPPINGS
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from kvsim.models.families import FAMILIES, WRAPPERS

    generating = [getattr(modeling_auto, f"{name}_NAMES", {}) for name in MAPPINGS if name != "MODEL_MAPPING"]
    return sorted(
        name
        for name in CONFIG_MAPPING_NAMES
        if name in FAMILIES
        or name in WRAPPERS
        or any(name in each for each in generating)
        or (name.endswith("_text") and name != "sam3_lite_text")  # which reads words for images
    )


def judged(model_type: str) -> dict[str, Any]:
    """``verdict`` and ``reason`` of one type; raises ``AssertionError`` where a figure is not its class's."""
    from model_variants import NO_CACHE, ON_CPU, SKIPPED, VARIANTS
    from oracle import cache_of, predicted, text_model, weighed
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from kvsim.models.families import FAMILIES, REFUSED, WRAPPERS
    from kvsim.models.model import Model

    if model_type in REFUSED:
        reason = REFUSED[model_type]
        return {"verdict": "not causal" if reason.startswith(NOT_CAUSAL) else "refused", "reason": reason}
    small = VARIANTS.get(model_type, [{}])[0]
    settings = (
        small if model_type in (*ON_CPU, *SMALL) else SETTINGS.get(model_type, {} if model_type in WRAPPERS else small)
    )
    if model_type in WRAPPERS and model_type not in FAMILIES:
        config = CONFIG_MAPPING[model_type](**settings)
        inner = config.get_text_config(decoder=True).model_type
        told = Model.from_config(plain(config)).model_type
        assert told == inner, (told, inner)
        return {
            "verdict": "exact",
            "reason": whole(model_type, settings, Model.from_config(plain(config))),
            "text": inner,
        }
    if model_type in SKIPPED and model_type not in SETTINGS:
        return {"verdict": "by its row", "reason": OWN}
    try:
        config, model, parameters = text_model(model_type, settings, "cpu" if model_type in ON_CPU else "meta")
    except (KeyError, StopIteration):
        return {"verdict": "by its row", "reason": OWN}
    ours = Model.from_config(plain(config))
    assert ours.num_params in (parameters, None), (ours.num_params, parameters)
    out = (
        {"verdict": "exact", "reason": EXACT}
        if ours.num_params is not None
        else {"verdict": "in part", "reason": WEIGHTS}
    )
    figures: dict[str, Any] = {"parameters": parameters}
    if model_type in NO_CACHE:
        return out | {"verdict": "in part", "reason": PART}
    try:
        for num_tokens in LENGTHS:
            figures[str(num_tokens)] = weighed(cache_of(model, num_tokens))
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError, IndexError):
        return out | {"verdict": "in part", "reason": PART}
    for num_tokens in LENGTHS:
        assert weighed(predicted(ours, num_tokens)) == figures[str(num_tokens)], (model_type, num_tokens)
    return out | {"config": plain(config), **figures}


def whole(model_type: str, settings: dict[str, Any], ours: Any) -> str:
    """How far a wrapper itself was held to its class: its decoder's parameters, and the cache that words leave."""
    from oracle import cache_of, predicted, text_model, weighed

    try:
        _, model, parameters = text_model(model_type, settings)
    except (KeyError, StopIteration, AttributeError, ImportError, TypeError, ValueError):
        return TEXT  # it does not start here: a library is not installed, or its class's defaults are no model
    assert ours.num_params in (parameters, None), (ours.num_params, parameters)
    try:
        caches = {num_tokens: weighed(cache_of(model, num_tokens)) for num_tokens in LENGTHS}
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError, IndexError, StopIteration):
        return TEXT
    for num_tokens, parts in caches.items():
        assert weighed(predicted(ours, num_tokens)) == parts, (model_type, num_tokens)
    return EXACT if ours.num_params is not None else WEIGHTS


def plain(config: Any) -> dict[str, Any]:
    """A config as its JSON file has it."""
    given: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return given


SMALL = ("glm4v_text", "glm4v_moe_text", "qwen2_vl_text", "qwen2_5_vl_text", "glm_image_text", "hunyuan_vl_text")
KEPT = ("id2label", "label2id", "transformers_version", "vision_config", "audio_config")


def record() -> dict[str, Any]:
    """Verdicts of all types; the figures of those that a transformers before 5.24 may lack."""
    from model_variants import RECORDED

    rows: dict[str, Any] = {}
    for name in names():
        try:
            row = judged(name)
        except Exception as error:
            row = {"verdict": "refused", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
            print(name, row["reason"], file=sys.stderr)
        if name not in RECORDED:
            row = {key: row[key] for key in ("verdict", "reason", "text") if key in row}
        elif "config" in row:
            row["config"] = {
                key: value for key, value in row["config"].items() if key not in KEPT and value is not None
            }
        rows[name] = row
    return inherited(rows)


def inherited(rows: dict[str, Any]) -> dict[str, Any]:
    """``rows``, in which a wrapper that was taken by its text side alone is held no further than that was."""
    held = {row.get("text", name) for name, row in rows.items() if row["reason"] == EXACT}
    for row in rows.values():
        if row["reason"] == TEXT and row["text"] not in held:
            text = rows.get(row["text"], {"verdict": "by its row", "reason": OWN})
            row |= {"verdict": text["verdict"], "reason": text["reason"]}
    return rows


if __name__ == "__main__":
    import transformers

    warnings.filterwarnings("ignore")
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    lines = ",\n".join(f'"{name}": {json.dumps(row)}' for name, row in record().items())
    RECORD.write_text(f'{{"transformers": "{transformers.__version__}", "types": {{\n{lines}\n}}}}\n', encoding="utf-8")
