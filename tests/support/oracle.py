"""What transformers itself says of a config, without a GPU and without weights: its classes on the ``meta`` device.

``python tests/support/oracle.py`` records it for every row of the catalogue in tests/support/oracle.json;
tests/kvsim/test_model_oracle.py compares the parser and the transformers engine with the record, and the record with a
live run.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("oracle.json")
NUM_TOKENS = 8
LONG = 5000

MISSES: dict[str, str] = {
    "XiaomiMiMo/MiMo-7B-Base": "remote code: built here as the Qwen2 class that it derives from",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": "remote code: transformers has no class for nemotron-nas",
    "MiniMaxAI/MiniMax-M3": "no causal class: test_kvsim_transformers.py holds its text model to the parser",
    "moonshotai/Kimi-K3": "remote code: tests/kvsim/test_model_published.py counts it",
}
"""Rows that transformers cannot instantiate, and the one that another class stands in for."""

STAND_IN = {"mimo": "qwen2", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}
"""Types without a causal class, and the one whose layers they have."""
OWN_WEIGHTS = {"moonshotai/Kimi-K3"}
"""Rows whose class is known and has weights besides those of transformers' own."""
NULLED = {"mistralai/Mistral-Large-Instruct-2407"}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part of a config, with what the outer one says of its embeddings."""
    inner = config.get("text_config")
    if not inner:
        return config
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config and key not in inner}
    return {**inner, **outer}


def meta_model(config: dict[str, Any]) -> Any:
    """The causal language model of ``config`` in bfloat16 on the ``meta`` device."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = text_config(config)
    model_type = config["model_type"]
    model_type = STAND_IN.get(model_type, {"kimi_k2": "deepseek_v3"}.get(model_type, model_type))
    known = CONFIG_MAPPING[model_type]
    built = known(**{key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")})
    auto = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        if model_type == "mistral4":
            from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

            return Mistral4ForCausalLM(built).to(torch.bfloat16).eval()
        return auto.from_config(built, dtype=torch.bfloat16).eval()


def cache_of(model: Any, num_tokens: int) -> dict[str, int]:
    """Bytes of every tensor that a forward pass of ``num_tokens`` tokens leaves, by the engine's part names."""
    import torch

    with torch.no_grad():
        ids = torch.ones(1, num_tokens, dtype=torch.long, device=next(model.parameters()).device)
        out = model(ids, use_cache=True)
    cache = next(found for name in CACHES if (found := getattr(out, name, None)) is not None)
    parts: dict[str, int] = {}
    names = {"keys": "key", "values": "value", "indexer_keys": "index_key", "conv_states": "state_conv",
             "recurrent_states": "state_recurrent", "prefill_keys": "key", "prefill_values": "value",
             "indexer_position_ids": "index_position"}  # fmt: skip
    for layer in [*cache.layers, *_beside(cache)]:
        for name, value in vars(layer).items():
            for inner, tensor in _tensors(name, value):
                if name.startswith("_") or not tensor.numel():
                    continue
                part = names.get(name, "compressed" if inner == "compressed_kv.compressor" else inner)
                part = "index_compressed" if part == "compressed_kv.indexer" else part
                part = "buffer" if part.startswith(("buffer_", "overlap_")) else part
                parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
    return parts


CACHES = ("past_key_values", "cache", "cache_params")
"""Where a model's output has its cache."""


def _beside(cache: Any) -> list[Any]:
    """MiniMax keeps its recurrent states in a list of their own."""
    return [SimpleNamespace(recurrent_states=state) for state in getattr(cache, "linear_cache", [])]


def _tensors(name: str, value: Any) -> list[tuple[str, Any]]:
    import torch

    if torch.is_tensor(value):
        return [(name, value)]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [(f"{name}.{key}", tensor) for key, tensor in inner if torch.is_tensor(tensor)]


IMAGES = {"embed_tokens_extend", "vqmodel"}
DECODERS = ("model.language_model", "language_model", "model.text_model", "text_model")
"""Where models of images and sound have their decoder."""

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_ocr2_text": ("deepseek_ocr2", {}),
    "ernie4_5_vl_moe_text": ("ernie4_5_vl_moe", {}),
    "granite4_vision_text": ("granite4_vision", {"deepstack_layer_map": [], "downsample_rate": "1/2"}),
    "mllama_text_model": ("mllama", {}),
    "paddleocr_vl_text": ("paddleocr_vl", {}),
    "unlimited_ocr_text": ("unlimited_ocr", {}),
    "step3p5": ("step3p7", {"vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}}),
    "voxtral_realtime_text": ("voxtral_realtime", {}),
}
"""Decoders without a class of their own in the automatic ones, and the model that they are built in."""


def text_model(model_type: str, settings: dict[str, Any], device: str = "meta") -> tuple[Any, Any, int]:
    """``(decoder's config, model, parameters of the decoder and its head)`` of a type with these settings, bfloat16.

    On the ``cpu`` the weights are random.  Raises ``KeyError`` for a type that transformers has no class for.
    """
    import torch
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    if model_type in WHOLE:
        outer, own = WHOLE[model_type]
        built = CONFIG_MAPPING[outer](text_config={"model_type": model_type, **settings}, **own)
    else:
        built = CONFIG_MAPPING[model_type](**settings)
    mappings = [getattr(modeling_auto, name) for name in MAPPINGS if hasattr(modeling_auto, name)]
    each = next(mapping[type(built)] for mapping in mappings if type(built) in mapping)
    with torch.device(device):
        model = (each[0] if isinstance(each, tuple) else each)._from_config(built, dtype=torch.bfloat16).eval()
    if device == "cpu":
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02)
    return built.get_text_config(decoder=True), model, _decoder_parameters(model)


MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING",
            "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
            "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING", "MODEL_MAPPING")  # fmt: skip


def _decoder_parameters(model: Any) -> int:
    """Parameters of the decoder and its head: of all of it, where there is no other part; a bare one gets its head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    decoder = next((found for path in DECODERS if (found := _at(model, path)) is not None), model)
    named = [pair for part in (decoder, head) if part is not None for pair in part.named_parameters()]
    unique = {id(one): one for name, one in named if not IMAGES & set(name.split("."))}
    total = sum(one.numel() for one in unique.values())
    config = decoder.config
    if head is None and not getattr(config, "tie_word_embeddings", False):
        total += (getattr(config, "vision_vocab_size", None) or config.vocab_size) * config.hidden_size
    return total


def _at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def predicted(model: Any, num_tokens: int) -> dict[str, int]:
    """The transformers engine's parts of kvsim's model, those of 0 left out."""
    from kvsim.engines.transformers import Transformers
    from kvsim.methods import Full

    parts = Transformers().parts(model, Full("bfloat16"), 1, num_tokens)
    return {name: size for name, size in parts.items() if size}


def weighed(parts: dict[str, int]) -> dict[str, int]:
    """Latents and rotary keys are one stream here, as are a layer's states; an unfilled block counts at its most in
    the prediction."""
    out = {name: size for name, size in parts.items() if name not in ("key", "value", "buffer")}
    states = [out.pop(name) for name in list(out) if name.startswith("state_")]
    return out | {"kv": parts.get("key", 0) + parts.get("value", 0), "state": sum(states)}


def measure(name: str, config: dict[str, Any], long: bool = True) -> dict[str, Any]:
    """``parameters``, and the cache's bytes by part after 8 and 5,000 tokens; ``miss`` where it cannot be had."""
    try:
        if name in OWN_WEIGHTS:
            raise KeyError(name)
        model = meta_model(config | {"sliding_window": None} if name in NULLED else config)
    except KeyError:
        return {"miss": MISSES[name]}
    out: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    try:
        for num_tokens in (NUM_TOKENS, LONG) if long else (NUM_TOKENS,):
            limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", LONG)
            out[str(min(num_tokens, limit))] = cache_of(model, min(num_tokens, limit))
    except (RuntimeError, NotImplementedError):
        out["miss"] = MISSES[name]
    return out


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    from kvsim import catalog

    facts = {row["id"]: measure(row["id"], row["config"]) for row in catalog.rows("models")}
    import transformers

    lines = ",\n".join(f'"{name}": {json.dumps(fact)}' for name, fact in facts.items())
    source = f"transformers {transformers.__version__}, bfloat16 on the meta device"
    RECORD.write_text(f'{{"source": "{source}", "rows": {{\n{lines}\n}}}}\n', encoding="utf-8")
