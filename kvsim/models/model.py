"""A model as the cache sees it: a tuple of layers, and the counts that weigh it, read from its config.json.

One parser for every family of :mod:`kvsim.models.families`.  What a config asks for and its family does not know (a key
that smells of changing the cache, an unknown kind of layer, a combination that the class does not have) is refused
with one line that names the key and the value, never guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvsim import catalog
from kvsim.layout import Layers, LayerShape, StateShape
from kvsim.models.config import MAX_LAYERS, Body, ConfigReader, Keys, Shapes
from kvsim.models.families import FAMILIES, REFUSED, WRAPPERS, known_keys
from kvsim.models.families.family import Family
from kvsim.models.layer_kinds import spelled
from kvsim.models.parameters import Weights, count_weights, mixer_kind, more_norms, weight_modules
from kvsim.models.quantization import cache_dtype, config_bits, expert_bits
from kvsim.nearest import hint

FOREIGN: dict[str, str] = {
    r"lora_rank|kv_latent": "multi-head latent attention",
    r"chunk": "chunked attention",
    r"block_config": "layers that differ block by block (NAS)",
    r"hybrid|layers_block_type|block_types": "hybrid layers",
    r"interval|linear_attn|^linear_|lightning|delta|full_attn": "linear-attention layers",
    r"attn_layer|attn_type|attention_type|attention_layers|layer_types|attention_pattern": "layers of several kinds",
    r"mamba|ssm|^conv_|_conv\b|d_conv|d_state|recurrent|lru_|rwkv|time_mix|short_conv": "recurrent layers",
    r"shared_kv|share_kv|layer_shar|cla_|share_factor|cross_layer|yoco|kv_shar": "layers that share a cache",
    r"compress": "compressed attention",
    r"^index|indexer|sparse_attention|_topk_blocks|nsa_": "sparse attention with an index of its own",
    r"sliding|window|^swa_|attention_sink": "sliding windows",
    r"global_|kv_head|key_value_head|_groups?$|n_head_kv|multi_query|kv_channels|kv_n_heads": "other key/value heads",
    r"head_dim|value_dim|key_dim|_head_size|d_kv|d_head": "other head dimensions",
    r"per_layer_config|_per_layer$": "layers that differ one by one",
    r"cross_attention|encoder": "an encoder and cross attention",
    r"bidirectional": "attention both ways, over other windows",
    r"cache|kv_quant|kv_bits": "a cache of another kind",
}
"""What a key that changes the cache smells of (a pattern over its name), and what it stands for."""

NEUTRAL: dict[str, Any] = {
    "full_attn_mod": 1,
    "use_bidirectional_attention": "vision",
    "compression_ratio": 1,
    "attn_config.attn_type": "multihead_attention",
}
"""Keys that smell and are understood at one value alone."""

INERT = frozenset(
    {
        "attn_logit_softcapping", "audio_config", "cache_implementation", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "embedding_initializer_range", "encoder_no_repeat_ngram_size",
        "final_logit_softcapping", "global_rope_theta", "index_share_for_mtp_iteration", "initializer_range",
        "moe_expert_groups", "moe_group", "mtp_layer_types", "mtp_num_hidden_layers", "n_group", "num_attention_groups",
        "num_beam_groups", "num_expert_group", "num_key_value_groups", "pretraining_tp", "qk_head_dim", "rope_head_dim",
        "rope_local_base_freq", "rope_parameters", "rope_scaling", "rotary_emb_base", "topk_group", "use_cache",
        "context_window_size", "use_cache_kernel", "use_cache_quantization", "use_mrope", "vision_config",
    }
)  # fmt: skip
"""Keys that smell and do not change what a token leaves behind."""

UNCOUNTED = frozenset({"experts_per_token", "num_experts_per_tok", "num_experts_per_token", "moe_topk"})
"""Keys that :data:`_WEIGHTY` finds and that are no weights."""

_WEIGHTY = re.compile(
    r"(^|_)experts?(_|$)(?!.*(group|bias|overlap|parallel))|^moe_.*(size|dim)$|_latent_|attn_res|output_gate|^hc_mult"
)
"""Keys that add or change weights, wherever a family knows them: experts, gates, further residual streams."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where a config says how its weights are quantized: the second is what compressed-tensors wrote at first, the third
is MLX's."""

_SMELL = re.compile("|".join(FOREIGN))
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Model:
    """What the planner needs to know of one model.

    ``layers`` holds, for every layer with a cache of its own, one :class:`LayerShape` a stream that grows with the
    tokens and one :class:`StateShape` a constant state (a layer may have several, or both).  ``weights`` and
    ``dtype`` are ``None`` where the config does not tell, ``max_positions`` likewise.  ``weight_bits`` are the bits
    a parameter (of ``dtype``, or of the ``quantization_config``), the mean where they differ, and ``expert_bits`` those
    of the routed experts where they have others.  ``sources`` names the config key of every
    number, ``read`` all keys that were looked at.  ``kinds`` counts the layers by kind, ``none`` and ``shared``
    (another layer's cache) among them.  ``quirks``: what transformers' own classes do otherwise than the layers say:
    ``broadcast`` (keys and values for every query head), ``whole`` (windows kept whole), ``two tensors`` (a vector
    that is key and value kept twice), ``compressed`` (with the buffers of unfilled blocks), ``float32 index`` (index
    keys of 32 bits), ``index positions`` (three positions of every token beside the first index keys).
    ``cache_dtype``: the type of cache that the checkpoint asks for (``fp8``, ``nvfp4``), which an engine's ``auto``
    means.  ``more_norms``: norms of all layers beyond two each, those of queries and of keys one each.
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
    kinds: tuple[tuple[str, int], ...] = ()
    quirks: tuple[str, ...] = ()
    cache_dtype: str | None = None
    expert_bits: float | None = None
    more_norms: int = 0
    read: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> Model:
        """Reads a ``config.json`` object.

        Raises ``ValueError``, naming the key, for a config that is incomplete, contradictory, or of an unknown kind.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"a config is a JSON object, not {type(config).__name__}")
        reader, wrapper, model_type, family = _open(config)
        if family.rewrite is not None:
            reader.config = family.rewrite(reader)
        for key in family.nested:
            reader = _flattened(reader, key)
        body = _body(reader, family, config)
        if wrapper in BESIDE:
            body.note(f"{wrapper}: {BESIDE[wrapper]}; not counted")
        if wrapper:
            body.note(f"language model only: vision and projector weights of {wrapper!r} are not counted")
        plan = _plan(body, family)
        layers, kinds = _layers(body, family, [kind for kind, _ in plan])
        weights = count_weights(body, family, plan)
        if weights is not None:
            weights = _known_weights(body, model_type, weights)
        _left_out(body, model_type, layers)
        own_cache = _cache_dtype(body, config)
        _refuse_foreign(reader, model_type, layers)
        dtype = _dtype(reader, config)
        bits, routed_bits = _weight_bits(body, family, config, dtype, plan)
        vocab = next((reader.count("vocab_size", key) for key in _each(family.vocab) if reader.has(key)), None)
        return cls(
            name=name or str(config.get("_name_or_path") or model_type),
            model_type=model_type,
            layers=layers,
            num_q_heads=body.num_q_heads,
            hidden_size=body.hidden,
            vocab_size=vocab,
            weights=weights,
            max_positions=body.max_positions,
            dtype=dtype,
            weight_bits=bits,
            expert_bits=routed_bits,
            more_norms=more_norms(body, family, plan),
            sources=tuple(reader.sources.items()),
            notes=tuple(body.notes),
            kinds=kinds,
            quirks=family.quirks(body) if family.quirks else (),
            cache_dtype=own_cache,
            read=frozenset(reader.used),
        )

    @property
    def num_layers(self) -> int:
        """Layers with a cache of keys and values."""
        return len(self.cache_layers)

    @property
    def num_blocks(self) -> int:
        """All decoder layers: those with keys and values, with a state, with another layer's cache, or with neither."""
        return sum(count for _, count in self.kinds)

    @property
    def num_params(self) -> int | None:
        """All weights of the language model, ``None`` where the config does not tell."""
        return None if self.weights is None else self.weights.total

    @cached_property
    def cache_layers(self) -> Layers:
        """The keys and values that grow with the tokens."""
        return Layers(s for s in self.layers if isinstance(s, LayerShape) and s.kind != "indexer")

    @cached_property
    def index_layers(self) -> tuple[LayerShape, ...]:
        """The index keys beside them (DeepSeek-V3.2's kind): weighed apart, no method stores them."""
        return tuple(s for s in self.layers if isinstance(s, LayerShape) and s.kind == "indexer")

    @cached_property
    def state_layers(self) -> tuple[StateShape, ...]:
        """The states that do not grow with the tokens."""
        return tuple(layer for layer in self.layers if isinstance(layer, StateShape))

    def source(self, name: str, kind: str = "") -> str:
        """The config key that a number came from; of a layer's ``kind`` where its own is another.

        ``state`` with the kind of a constant state names all keys of its sizes.
        """
        sources = dict(self.sources)
        return sources.get(f"{name}.{kind}", sources.get(name, ""))


def _open(config: Mapping[str, Any]) -> tuple[ConfigReader, str | None, str, Family]:
    """The reader of the decoder's config, the wrapper's model type if there is one, the model type, the family."""
    outer = ConfigReader(config)
    model_type = outer.get("model_type")
    wrapper, prefix, nested = None, "", False
    if not isinstance(model_type, str):
        raise outer.error("model_type", "allowed is the name of a model type")
    if model_type in OMNI:
        thinker = outer.child("thinker_config")
        if thinker is None:
            raise outer.error("thinker_config", "allowed is a JSON object")
        outer = thinker
    if model_type in REFUSED:
        raise outer.error("model_type", REFUSED[model_type])
    key = next(
        (key for key in NESTED if isinstance(outer.config.get(key), Mapping)), WITHOUT.get(model_type, NESTED[0])
    )
    inner = outer.config.get(key)
    if inner is None and model_type in WRAPPERS and model_type not in FAMILIES and model_type not in FLAT:
        raise outer.error(key, f"{model_type!r} has its decoder there: allowed is a JSON object")
    if inner is None and model_type in FLAT:
        wrapper, model_type = model_type, FLAT[model_type]
    elif inner is not None and (model_type not in FAMILIES or model_type in WRAPPERS):
        if not isinstance(inner, Mapping):
            raise outer.error(key, "allowed is a JSON object")
        wrapper, prefix, nested, config = str(model_type), f"{outer.prefix}{key}.", True, inner
        model_type = inner.get("model_type", INNER.get(wrapper))
        only = EXPECTED.get(wrapper)
        if only is not None and model_type != only:
            raise ValueError(
                f"config key {key} of model_type {wrapper!r} is {str(model_type)[:40]!r}: allowed is {only!r}"
            )
        if wrapper not in WRAPPERS:
            _refuse_foreign(_outer_keys(outer, wrapper), wrapper[:40], ())
    family = _family(ConfigReader(config, prefix), model_type)
    reader = ConfigReader(config, prefix, catalog.defaults(model_type), nested)
    reader.get("model_type")
    if wrapper == "paligemma":  # its prompts see each other both ways; the windows stay as they are
        reader.get("use_bidirectional_attention")
    if wrapper:
        told = outer.config.get("tie_word_embeddings")
        if told is not None and not (wrapper in EITHER and config.get("tie_word_embeddings")):
            reader.config = {**config, "tie_word_embeddings": told}
    return reader, wrapper, model_type, family


def _outer_keys(outer: ConfigReader, wrapper: str) -> ConfigReader:
    """The keys of an unknown wrapper that are no config of a part, for what they say of the cache."""
    own = {key: value for key, value in outer.config.items() if not isinstance(value, Mapping)}
    reader = ConfigReader(own, outer.prefix)
    reader.used |= {"image_seq_length", "encoder_hidden_size", "adaptor_intermediate_size"}
    return reader


FLAT = {
    "dots3_note": "dots3_note_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "phi3_v": "phi3",
    "phi4mm": "phi3",
    "step3p7": "step3p5",
}
"""Wrappers whose published configs hold the decoder's keys among their own."""

OMNI = ("qwen2_5_omni", "qwen3_omni_moe")
"""Wrappers whose ``thinker_config`` holds the ``text_config``, beside a talker with a cache of its own."""

EITHER = (
    "llava", "llava_next_video", "llava_onevision", "video_llama_3", "fast_vlm", "shieldgemma2", "minimax_m3_vl",
    "qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe",
)  # fmt: skip
"""Wrappers that tie the embeddings where either config says so; of the others the outer one decides."""

NESTED = ("text_config", "llm_config", "language_config")
"""Keys under which wrappers have their decoder."""

WITHOUT = {"internvl_chat": "llm_config"}
"""Where a wrapper that lacks its decoder should have it, if not under ``text_config``."""

EXPECTED = {"mllama": "mllama_text_model"}
"""Wrappers that run one decoder alone: with another they are another model."""

BESIDE = {
    "voxtral_realtime": "its audio encoder keeps a sliding cache of its own",
    "vibevoice": "its speech tokenizers keep convolutions' inputs of their own",
    "qwen2_5_omni": "its talker keeps a cache of its own",
    "qwen3_omni_moe": "its talker keeps a cache of its own",
}
"""What a wrapper keeps for a sequence beside its decoder's cache."""

INNER = {
    "qwen2_5_omni": "qwen2_5_omni_text",
    "qwen3_omni_moe": "qwen3_omni_moe_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "gemma3": "gemma3_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "llava": "llama",
    "llava_next": "llama",
    "paligemma": "gemma",
}
"""What a wrapper's ``text_config`` is where it does not say its ``model_type``."""


def _family(reader: ConfigReader, model_type: Any) -> Family:
    if not isinstance(model_type, str):
        raise reader.error("model_type", "allowed is the name of a model type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise reader.error("model_type", REFUSED[model_type])
    meant = hint(model_type[:60], [*FAMILIES, *WRAPPERS], cutoff=0.8)
    known = (
        f"known are {len(FAMILIES)} and {len(WRAPPERS)} that hold one: docs/models.md lists them, `kvsim models` models"
    )
    raise reader.error("model_type", f"{meant}{known}")


def _flattened(reader: ConfigReader, key: str) -> ConfigReader:
    """The same config with the object under ``key`` read as ``key.inner``."""
    child = reader.child(key)
    inner = {} if child is None else {f"{key}.{name}": value for name, value in child.config.items()}
    out = ConfigReader({**reader.config, **inner}, reader.prefix, reader.defaults, reader.lenient)
    out.used = reader.used
    return out


def _each(keys: Keys | None) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else tuple(keys or ())


def _body(reader: ConfigReader, family: Family, config: Mapping[str, Any]) -> Body:
    num_layers = _num_layers(reader, family)
    if num_layers > MAX_LAYERS:
        raise reader.error(reader.first(family.num_layers), f"allowed are up to {MAX_LAYERS}")
    hidden = reader.count("hidden_size", family.hidden)
    num_q_heads = 1 if family.num_q_heads is None else reader.count("num_q_heads", family.num_q_heads)
    return Body(
        reader=reader,
        num_layers=num_layers,
        hidden=hidden,
        num_q_heads=num_q_heads,
        max_positions=reader.count_or_none("max_positions", family.positions, fill=reader.lenient),
        norm_vectors=family.norm_vectors,
        dtype=_activations(reader, config),
    )


def _num_layers(reader: ConfigReader, family: Family) -> int:
    for key in _each(family.listed) if family.single else ():
        given = reader.listed(key)
        if given:
            return len(given)
    return reader.count("num_layers", family.num_layers)


def _activations(reader: ConfigReader, config: Mapping[str, Any]) -> str:
    given = next((source.get(key) for source in (reader.config, config) for key in ("dtype", "torch_dtype")
                  if source.get(key)), None)  # fmt: skip
    short = str(given).removeprefix("torch.")
    return short if short in ("float16", "bfloat16") else "bfloat16"


def _plan(body: Body, family: Family) -> list[tuple[str, bool]]:
    """Every layer's mixer and whether it has experts."""
    reader = body.reader
    allowed = set(family.mixers) | ({"sliding"} if family.window else set()) | ({"chunked"} if family.chunk else set())
    if family.single:
        allowed |= {"dense", "sparse"}
    kinds = None
    for key in _each(family.listed):
        given = reader.listed(key)
        if given and kinds is None:
            if len(given) < body.num_layers or (len(given) != body.num_layers and not family.experts):
                raise reader.error(key, f"{len(given)} entries for {body.num_layers} layers")
            kinds = spelled(reader, key, given[: body.num_layers], allowed)
            reader.sources["kinds"] = reader.label(key)
    if kinds is None:
        kinds = family.kinds(body)
        given = reader.listed("layer_types", body.num_layers) if not family.listed else None
        if given is not None:
            spelled(reader, "layer_types", given, {"full"})
    if family.forced_last and kinds and kinds[-1] != family.forced_last:
        body.note(f"the last layer counts as {family.forced_last}: its class makes it so")
        kinds[-1] = family.forced_last
    if family.check is not None:
        family.check(body, kinds)
    if family.single:
        return [(kind, kind == "sparse") for kind in kinds]
    sparse = [False] * body.num_layers
    if family.experts:
        rule = family.experts.sparse
        sparse = [True] * body.num_layers if rule is None else rule(body)
    return list(zip(kinds, sparse, strict=True))


def _layers(
    body: Body, family: Family, kinds: list[str]
) -> tuple[tuple[LayerShape | StateShape, ...], tuple[tuple[str, int], ...]]:
    """What all layers leave, and how many there are of each kind."""
    reader = body.reader
    if family.layers is not None:
        each = family.layers(body)
    else:
        made = {kind: _made(body, family, kind) for kind in dict.fromkeys(kinds)}
        each = [made[kind] for kind in kinds]
    labels = ["none" if not shapes else "+".join(dict.fromkeys(shape.kind for shape in shapes)) for shapes in each]
    if family.sharing:
        shared = reader.count_or_none("num_shared", family.sharing, zero=True, fill=True) or 0
        if shared >= body.num_layers and shared:
            raise reader.error(family.sharing, f"allowed are fewer than the {body.num_layers} layers")
        if shared:
            owners, users = set(kinds[: body.num_layers - shared]), kinds[body.num_layers - shared :]
            lost = next((kind for kind in users if kind not in owners), None)
            if lost is not None:
                raise reader.error(family.sharing, f"no layer of kind {lost} is left to share")
            each[-shared:], labels[-shared:] = [()] * shared, ["shared"] * shared
    if family.passes is not None:
        order = family.passes(body)
        each, labels = [each[at] for at in order], [labels[at] for at in order]
    return tuple(shape for shapes in each for shape in shapes), tuple(Counter(labels).items())


def _made(body: Body, family: Family, kind: str) -> Shapes:
    """What one layer of ``kind`` leaves."""
    reader = body.reader
    window, label = None, ""
    if kind in ("sliding", "chunked", "hybrid_sliding") or (family.window and kind.startswith(("csa", "hca"))):
        keys = family.chunk if kind == "chunked" else family.window
        key = reader.first(keys or ())
        window = reader.count("window", key, fill=True)
        if kind != "chunked" and family.window_of is not None:
            window = family.window_of(key, window)
        label = "chunked" if kind == "chunked" else ""
        if body.max_positions is not None and window >= body.max_positions:
            body.note(
                f"{reader.label(key)} {window} is no shorter than the {body.max_positions} positions: full attention"
            )
            window, label = None, ""
    out: list[LayerShape | StateShape] = []
    for mixer in family.mixers.get(mixer_kind(family, kind), ()):
        before = dict(reader.sources)
        made = mixer.shapes(body, window, label)
        for shape in made:
            reader.sources |= _own_sources(reader, shape, before)
        out += made
    return tuple(out)


def _own_sources(reader: ConfigReader, shape: LayerShape | StateShape, before: dict[str, str]) -> dict[str, str]:
    """Where a layer's own numbers came from, by ``name.kind``."""
    sources = reader.sources
    if isinstance(shape, StateShape):
        fresh = dict.fromkeys(key for name, key in sources.items() if before.get(name) != key and "." not in name)
        return {f"state.{shape.kind}": ", ".join(fresh)} if fresh else {}
    if shape.kind == "indexer":
        return {
            "num_kv_heads.indexer": reader.label("model_type"),
            "head_dim.indexer": sources.get("index_head_dim", ""),
        }
    names = ("num_kv_heads", "head_dim", "value_dim", *(("window",) if shape.window else ()))
    return {f"{name}.{shape.kind}": sources[name] for name in names if name in sources}


def _neutral(reader: ConfigReader, key: str, value: Any) -> bool:
    """Whether a key that smells says nothing at this value."""
    if key == "cla_share_factor":
        return reader.config.get("use_cla") is False or value == 1
    if key in ("sliding_window", "max_window_layers") and reader.config.get("use_sliding_window") is False:
        return True
    if key == "max_window_layers":  # of no window
        return not reader.config.get("sliding_window")
    if key in ("attn_type_list", "moe_layer_freq"):  # every layer of the one kind
        return isinstance(value, list) and all(entry == 1 for entry in value)
    return NEUTRAL.get(key) == value and not isinstance(value, bool)


def _refuse_foreign(reader: ConfigReader, model_type: str, layers: tuple[LayerShape | StateShape, ...]) -> None:
    """Refuses a key that smells of changing the cache and was not understood."""
    known = INERT | known_keys(model_type) | reader.used
    if not any(isinstance(layer, LayerShape) for layer in layers):
        known |= {"num_key_value_heads", "head_dim"}
    for key, value in reader.config.items():
        if not isinstance(key, str) or key in known:
            continue
        if _neutral(reader, key, value):
            continue
        if value is None or value is False or value in (0, "", -1) or value == [] or value == {}:
            continue
        found = _SMELL.search(key)
        if found:
            what = next(what for pattern, what in FOREIGN.items() if re.search(pattern, key))
            raise reader.error(key, f"{what}: not known of model_type {model_type!r}")


def _known_weights(body: Body, model_type: str, weights: Weights) -> Weights | None:
    """The count, unless the config has weights that the family does not: then ``None``, and a note names the key."""
    reader = body.reader
    known = UNCOUNTED | known_keys(model_type) | reader.used
    for key, value in reader.config.items():
        if not isinstance(key, str) or key in known or not _WEIGHTY.search(key):
            continue
        if value is True or (isinstance(value, int) and value > 1):
            body.note(f"{reader.label(key)} {value}: weights that are not known of {model_type!r}; not counted")
            return None
    return weights


def _left_out(body: Body, model_type: str, layers: tuple[LayerShape | StateShape, ...]) -> None:
    """Notes on what the config has and the layers do not count."""
    reader = body.reader
    sparse = reader.get("sparse_attention_config")
    if isinstance(sparse, Mapping) and sparse.get("use_sparse_attention"):
        indexed = any(isinstance(layer, LayerShape) and layer.kind == "indexer" for layer in layers)
        body.note(
            f"{reader.label('sparse_attention_config')}: a step is taken to read the keys and values of every token"
            + ("" if indexed else "; the index keys of its block selection are not counted")
        )
    if model_type == "falcon" and reader.switch(("new_decoder_architecture", False)):
        shape = layers[0]
        if isinstance(shape, LayerShape) and shape.num_kv_heads != body.num_q_heads:
            body.note(f"transformers caches falcon's keys and values broadcast to all {body.num_q_heads} query heads")
    for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        if reader.get(key):
            body.note(f"{reader.label(key)}: {str(reader.config[key])[:20]} further prediction layer(s) not counted")
    if reader.filled:
        what = ", ".join(f"{key} {str(value)[:40]}" for key, value in sorted(reader.filled.items()))
        body.note(f"absent from the config, taken from transformers' {model_type} class: {what}")


def _dtype(reader: ConfigReader, outer: Mapping[str, Any]) -> str | None:
    for key in ("torch_dtype", "dtype"):
        value = reader.get(key) or outer.get(key)
        if value is not None:
            short = str(value).removeprefix("torch.")
            if short not in DTYPES:
                if key not in reader.config:
                    reader = ConfigReader(outer)
                raise reader.error(key, f"allowed are {', '.join(DTYPES)}")
            reader.sources["dtype"] = reader.label(key)
            return short
    return None


def _quantization(reader: ConfigReader, outer: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key that says how the weights are quantized (``""``: none does), and what it says."""
    for key in QUANTIZATION_KEYS:
        found = reader.get(key) or outer.get(key)
        if isinstance(found, Mapping):
            inner = found.get("quantization_config")
            return key, inner if key == "compression_config" and isinstance(inner, Mapping) else found
    return "", {}


def _weight_bits(
    body: Body, family: Family, outer: Mapping[str, Any], dtype: str | None, plan: list[tuple[str, bool]]
) -> tuple[float | None, float | None]:
    """Bits a parameter, and of the routed experts where they have others; ``None`` where the config does not tell (no
    dtype, or an unknown quantization)."""
    key, quantization = _quantization(body.reader, outer)
    if not key:
        return None if dtype is None else 32 if dtype == "float32" else 16, None
    body.reader.sources["weight_bits"] = key
    modules, expert_dtype = weight_modules(body, family, plan), body.reader.get("expert_dtype")
    bits = config_bits(quantization, modules, expert_dtype)
    if bits is None:
        return None, None
    if bits != config_bits(quantization):
        body.note(f"{key}: {bits:.4g} bits a weight are the mean over its groups and what they leave at 16")
    routed = expert_bits(quantization, modules, expert_dtype)
    return bits, None if routed == bits else routed


def _cache_dtype(body: Body, outer: Mapping[str, Any]) -> str | None:
    """The checkpoint's own type of cache; a note where it asks for one that vLLM does not have."""
    key, quantization = _quantization(body.reader, outer)
    own, where = cache_dtype(quantization)
    if own is not None:
        body.reader.sources["cache_dtype"] = f"{key}.{where}"
    elif where:
        body.note(f"{key}.{where} {str(quantization.get(where))[:60]}: a type of cache that vLLM does not have")
    return own
