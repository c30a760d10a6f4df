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
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("oracle.json")
NUM_TOKENS = 8
LONG = 5000

MISSES: dict[str, str] = {
    "XiaomiMiMo/MiMo-7B-Base": "remote code: built here as the Qwen2 class that it derives from",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": "remote code: transformers has no class for nemotron-nas",
    "MiniMaxAI/MiniMax-M3": "no causal class: test_kvsim_transformers.py holds its text model to the parser",
}
"""Rows that transformers cannot instantiate, and the one that another class stands in for."""

STAND_IN = {"mimo": "qwen2"}
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
        ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    parts: dict[str, int] = {}
    names = {"keys": "key", "values": "value", "indexer_keys": "index_key", "conv_states": "state_conv",
             "recurrent_states": "state_recurrent"}  # fmt: skip
    for layer in cache.layers:
        for name, value in vars(layer).items():
            for inner, tensor in _tensors(name, value):
                if name.startswith("_") or not tensor.numel():
                    continue
                part = names.get(name, "compressed" if inner == "compressed_kv.compressor" else inner)
                part = "index_compressed" if part == "compressed_kv.indexer" else part
                part = "buffer" if part.startswith(("buffer_", "overlap_")) else part
                parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
    return parts


def _tensors(name: str, value: Any) -> list[tuple[str, Any]]:
    import torch

    if torch.is_tensor(value):
        return [(name, value)]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [(f"{name}.{key}", tensor) for key, tensor in inner if torch.is_tensor(tensor)]


def measure(name: str, config: dict[str, Any], long: bool = True) -> dict[str, Any]:
    """``parameters``, and the cache's bytes by part after 8 and 5,000 tokens; ``miss`` where it cannot be had."""
    try:
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
