"""A model as the cache sees it: a tuple of layers, and the counts that weigh it, read from its config.json.

Plain full-attention decoders only.  Whatever else a config asks for (sliding windows, chunked attention, MLA,
recurrent or hybrid layers, layers that share a cache, per-layer blocks, nested configs) is refused with one
line that names the key, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from kvsim.config import ConfigReader
from kvsim.families import FAMILIES, WRAPPERS, Family
from kvsim.layout import LayerShape, StateShape
from kvsim.parameters import Weights, count_parameters

FOREIGN: dict[str, str] = {
    "kv_lora_rank": "multi-head latent attention",
    "attention_chunk_size": "chunked attention",
    "block_configs": "layers that differ block by block (NAS)",
    "hybrid_override_pattern": "hybrid layers",
    "hybrid_layer_pattern": "hybrid layers",
    "layers_block_type": "hybrid layers",
    "full_attention_interval": "linear-attention layers",
    "linear_attn_config": "linear-attention layers",
    "linear_num_key_heads": "linear-attention layers",
    "attn_layer_period": "hybrid layers",
    "attn_layer_indices": "hybrid layers",
    "mamba_num_heads": "recurrent layers",
    "mamba_d_state": "recurrent layers",
    "ssm_cfg": "recurrent layers",
    "num_kv_shared_layers": "layers that share another layer's cache",
    "cla_share_factor": "layers that share another layer's cache",
    "compress_ratios": "compressed attention",
    "index_topk": "sparse attention with an index of its own",
    "sliding_window_pattern": "sliding windows",
    "global_head_dim": "layers of different head dimensions",
    "attention_layers": "local-attention layers",
    "attention_types": "local-attention layers",
    "add_cross_attention": "cross attention",
    "is_encoder_decoder": "an encoder and cross attention",
}
"""Keys that change what a token leaves behind, and what each stands for."""

MAX_LAYERS = 4096
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Model:
    """What the planner needs to know of one model.

    ``layers`` holds one :class:`LayerShape` a layer with a cache of its own.  ``num_params`` and ``dtype`` are
    ``None`` where the config does not tell, ``max_positions`` likewise.  ``weight_bits`` are the bits a
    parameter (of ``dtype``, or of the ``quantization_config``).  ``sources`` names the config key of every
    number, ``read`` all keys that were looked at.
    """

    name: str
    model_type: str
    layers: tuple[LayerShape | StateShape, ...]
    num_q_heads: int
    hidden_size: int
    vocab_size: int | None
    weights: Weights | None
    max_positions: int | None
    dtype: str | None
    weight_bits: float | None
    sources: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    read: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> Model:
        """Reads a ``config.json`` object.

        Raises ``ValueError``, naming the key, for a config that is incomplete or not a plain full-attention
        decoder.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"a config is a JSON object, not {type(config).__name__}")
        reader, wrapper = ConfigReader(config), None
        if config.get("text_config") is not None:
            reader, wrapper = _text_config(reader)
        _refuse_foreign(reader)
        model_type = reader.get("model_type")
        family = _family(reader, model_type)
        notes = [f"language model only: vision and projector weights of {wrapper!r} are not counted"] if wrapper else []
        num_layers = reader.count("num_layers", family.num_layers)
        if num_layers > MAX_LAYERS:
            raise reader.error(family.num_layers, f"allowed are up to {MAX_LAYERS}")
        hidden = reader.count("hidden_size", family.hidden)
        num_q_heads = reader.count("num_q_heads", family.num_q_heads)
        num_kv_heads = _kv_heads(reader, family, model_type, num_q_heads)
        if num_q_heads % num_kv_heads:
            key = reader.sources["num_kv_heads"].removeprefix(reader.prefix)
            raise reader.error(key, f"allowed are divisors of the {num_q_heads} query heads")
        head_dim = _head_dim(reader, family, hidden, num_q_heads)
        max_positions = reader.count_or_none("max_positions", family.positions)
        notes += _check_window(reader, family, num_layers, max_positions)
        norms = family.norms
        if model_type == "falcon":
            norms = _falcon_norms(reader)
            if reader.switch(("new_decoder_architecture", False)) and num_kv_heads != num_q_heads:
                notes.append(f"transformers caches falcon's keys and values broadcast to all {num_q_heads} query heads")
        shape = LayerShape(num_kv_heads, head_dim, head_dim)
        weights = count_parameters(reader, family, num_layers, num_q_heads, shape, hidden, norms)
        notes += _left_out(reader)
        dtype = _dtype(reader, config)
        return cls(
            name=name or str(config.get("_name_or_path") or model_type),
            model_type=model_type,
            layers=(shape,) * num_layers,
            num_q_heads=num_q_heads,
            hidden_size=hidden,
            vocab_size=reader.count_or_none("vocab_size", "vocab_size"),
            weights=weights,
            max_positions=max_positions,
            dtype=dtype,
            weight_bits=_weight_bits(reader, config, dtype),
            sources=tuple(reader.sources.items()),
            notes=tuple(notes),
            read=frozenset(reader.used),
        )

    @property
    def num_layers(self) -> int:
        """Layers with a cache."""
        return len(self.layers)

    @property
    def num_params(self) -> int | None:
        """All weights of the language model, ``None`` where the config does not tell."""
        return None if self.weights is None else self.weights.total

    @property
    def cache_layers(self) -> tuple[LayerShape, ...]:
        """The keys and values that grow with the tokens."""
        return tuple(s for s in self.layers if isinstance(s, LayerShape) and s.kind != "indexer")

    @property
    def index_layers(self) -> tuple[LayerShape, ...]:
        """The index keys beside them (DeepSeek-V3.2's kind): weighed apart, no method stores them."""
        return tuple(s for s in self.layers if isinstance(s, LayerShape) and s.kind == "indexer")

    @property
    def state_layers(self) -> tuple[StateShape, ...]:
        """The states that do not grow with the tokens."""
        return tuple(layer for layer in self.layers if isinstance(layer, StateShape))

    def source(self, name: str) -> str:
        """The config key that a number came from."""
        return dict(self.sources).get(name, "")


def _text_config(reader: ConfigReader) -> tuple[ConfigReader, str]:
    outer, inner = reader.get("model_type"), reader.get("text_config")
    if not isinstance(inner, Mapping):
        raise reader.error("text_config", "allowed is a JSON object")
    nested = ConfigReader(inner, "text_config.")
    _refuse_foreign(nested)
    if outer not in WRAPPERS:
        raise ValueError(
            f"config key text_config of model_type {outer!r}: nested configs are not supported, "
            f"except of {' and '.join(WRAPPERS)}"
        )
    return nested, outer


def _refuse_foreign(reader: ConfigReader) -> None:
    for key, what in FOREIGN.items():
        if reader.config.get(key):
            raise reader.error(key, f"{what}: not supported, only plain full attention is")
    types = reader.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list):
        raise reader.error("layer_types", "allowed is a list")
    other = next((kind for kind in types if kind != "full_attention"), None)
    if other is not None:
        window = reader.config.get("sliding_window")
        what = f" (sliding_window {window})" if window is not None else ""
        raise ValueError(
            f"config key {reader.label('layer_types')} has {other!r}{what}: not supported, only 'full_attention' is"
        )


def _family(reader: ConfigReader, model_type: Any) -> Family:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if not isinstance(model_type, str):
        raise reader.error("model_type", f"allowed are {', '.join(FAMILIES)}")
    window = reader.config.get("sliding_window")
    if window is not None:
        raise ValueError(
            f"config key {reader.label('sliding_window')} is {window!r} in model_type {model_type!r}: "
            "sliding windows are not supported, only plain full attention is"
        )
    near = get_close_matches(model_type, FAMILIES, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise reader.error("model_type", f"{hint}supported are {', '.join(FAMILIES)}")


def _kv_heads(reader: ConfigReader, family: Family, model_type: str, num_q_heads: int) -> int:
    if model_type == "falcon":
        return _falcon_kv_heads(reader, num_q_heads)
    if family.multi_query and reader.switch((family.multi_query, True)):
        reader.sources["num_kv_heads"] = reader.label(f"{family.multi_query} = true")
        return 1
    key = family.num_kv_heads
    if key is not None:
        given = reader.get(key)
        if given is not None:
            return reader.count("num_kv_heads", key)
        if family.kv_heads_required and key not in reader.config:
            raise reader.error(key, f"model_type {model_type!r} must say how many key/value heads it has")
    reader.sources["num_kv_heads"] = reader.label(family.num_q_heads)
    return num_q_heads


def _falcon_kv_heads(reader: ConfigReader, num_q_heads: int) -> int:
    """Falcon has a ``num_kv_heads`` that only the new decoder architecture obeys, and a multi-query switch."""
    if reader.switch(("new_decoder_architecture", False)):
        return reader.count("num_kv_heads", "num_kv_heads" if reader.has("num_kv_heads") else "num_key_value_heads")
    if reader.switch(("multi_query", True)):
        reader.sources["num_kv_heads"] = reader.label("multi_query = true")
        return 1
    if reader.has("num_kv_heads"):
        return reader.count("num_kv_heads", "num_kv_heads")
    reader.sources["num_kv_heads"] = reader.label("num_attention_heads")
    return num_q_heads


def _falcon_norms(reader: ConfigReader) -> int:
    if not reader.switch(("parallel_attn", True)):
        return 2
    if reader.has("num_ln_in_parallel_attn"):
        return reader.count("norms", "num_ln_in_parallel_attn")
    return 2 if reader.switch(("new_decoder_architecture", False)) else 1


def _head_dim(reader: ConfigReader, family: Family, hidden: int, num_q_heads: int) -> int:
    if family.head_dim is not None:
        given = reader.count_or_none("head_dim", family.head_dim)
        if given is not None:
            return given
        if family.head_dim_required:
            raise reader.error(family.head_dim, "this model type must say its head dimension")
    if hidden % num_q_heads:
        raise reader.error(family.num_q_heads, f"allowed are divisors of {family.hidden} {hidden}")
    reader.sources["head_dim"] = reader.label(f"{family.hidden} / {family.num_q_heads}")
    return hidden // num_q_heads


def _check_window(reader: ConfigReader, family: Family, num_layers: int, max_positions: int | None) -> list[str]:
    """Refuses a sliding window that is in force; returns a note where one is given that never bites."""
    types = reader.get("layer_types")
    if types is not None and len(types) != num_layers:
        raise reader.error("layer_types", f"{len(types)} entries for {num_layers} layers")
    if family.window is None or (family.window == "switched" and not reader.switch(("use_sliding_window", False))):
        return []
    key = "sliding_window"
    if reader.get(key) is None:
        if family.window == "required" and key not in reader.config:
            raise reader.error(key, "transformers then takes a window of 4096; say null for full attention")
        return []
    window = reader.count("window", key)
    if max_positions is not None and window >= max_positions:
        return [f"{reader.label(key)} {window} is no shorter than the {max_positions} positions: full attention"]
    raise reader.error(key, "sliding windows are not supported, only plain full attention is")


def _left_out(reader: ConfigReader) -> list[str]:
    """Notes on what the config has and the layers do not count."""
    notes = []
    sparse = reader.get("sparse_attention_config")
    if isinstance(sparse, Mapping) and sparse.get("use_sparse_attention"):
        notes.append(
            f"{reader.label('sparse_attention_config')}: keys and values of every token are counted, "
            "the index keys of its block selection are not"
        )
    if reader.get("num_nextn_predict_layers"):
        count = reader.config["num_nextn_predict_layers"]
        notes.append(f"{reader.label('num_nextn_predict_layers')}: {count} further prediction layer(s) not counted")
    return notes


def _dtype(reader: ConfigReader, outer: Mapping[str, Any]) -> str | None:
    for key in ("torch_dtype", "dtype"):
        value = reader.get(key) or outer.get(key)
        if value is not None:
            short = str(value).removeprefix("torch.")
            if short not in DTYPES:
                raise reader.error(key, f"allowed are {', '.join(DTYPES)}")
            reader.sources["dtype"] = reader.label(key)
            return short
    return None


def _weight_bits(reader: ConfigReader, outer: Mapping[str, Any], dtype: str | None) -> float | None:
    """Bits a parameter; ``None`` where the config does not tell (no dtype, or an unknown quantization)."""
    quantization = reader.get("quantization_config") or outer.get("quantization_config")
    if isinstance(quantization, Mapping):
        reader.sources["weight_bits"] = "quantization_config"
        return 8 if quantization.get("quant_method") == "fp8" else None
    return None if dtype is None else 32 if dtype == "float32" else 16
