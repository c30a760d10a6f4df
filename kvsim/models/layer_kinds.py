"""Which layer is of which kind: the rules of the model classes, for where a config has no list of its own.

A kind is ``full``, ``sliding``, ``chunked``, ``linear``, ``conv``, ``hybrid`` (both at once), ``compressed`` ...
(the keys of a family's mixers), or ``none`` for a layer that keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvsim.models.config import MAX_LAYERS, Body, ConfigReader

Kinds = Callable[[Body], list[str]]

SPELLINGS: dict[str, str] = {
    "full_attention": "full",
    "attention": "full",
    "global": "full",
    "indexed_attention": "full",
    "reference_sliding_attention": "full",
    "qwen_sparse_attention": "full",
    "deepseek_sparse_attention": "full",
    "minimax_m3_sparse": "indexed",
    "sliding_attention": "sliding",
    "local": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "recurrent": "linear",
    "conv": "conv",
    "hybrid": "hybrid",
    "hybrid_sliding": "hybrid_sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
    "mlp": "dense",
    "moe": "sparse",
}
"""How configs spell the kinds."""


def spelled(reader: ConfigReader, key: str, entries: list[Any], allowed: set[str]) -> list[str]:
    """Kinds of a config's list.  Raises ``ValueError``, naming the entry, for one that the family does not have."""
    out = []
    for entry in entries:
        kind = SPELLINGS.get(entry) if isinstance(entry, str) else None
        if kind is None or kind not in allowed:
            names = ", ".join(repr(name) for name, kind in SPELLINGS.items() if kind in allowed)
            window = reader.config.get("sliding_window")
            what = f" (sliding_window {str(window)[:20]})" if window is not None and kind == "sliding" else ""
            raise ValueError(
                f"config key {reader.label(key)} has {str(entry)[:40]!r}{what}: not supported, only {names}"
            )
        out.append(kind)
    return out


def full(body: Body) -> list[str]:
    return ["full"] * body.num_layers


def windowed(body: Body) -> list[str]:
    """All sliding where ``sliding_window`` is given."""
    return ["full" if body.reader.value("sliding_window") is None else "sliding"] * body.num_layers


def mistral(body: Body) -> list[str]:
    """As :func:`windowed`; a config that lacks the key counts as full attention, and a note says so."""
    reader = body.reader
    if reader.get("sliding_window") is None and "sliding_window" not in reader.config:
        body.note(f"{reader.label('sliding_window')} is absent: full attention; transformers' class would fill in 4096")
    return ["full" if reader.get("sliding_window") is None else "sliding"] * body.num_layers


def every(
    period: int | str, last: str = "full", rest: str = "sliding", first: bool = False, default: int | None = None
) -> Kinds:
    """``last`` in every ``period``-th layer (a number, or the key of one), ``rest`` in the others.

    ``first``: the period starts with ``last`` instead of ending with it.
    """

    def kinds(body: Body) -> list[str]:
        step = period if isinstance(period, int) else body.reader.count_or_none("pattern", period, fill=True)
        step = step or default
        if step is None:
            raise body.reader.error(str(period), "a whole number is needed")
        shift = 0 if first else 1
        return [last if (layer + shift) % step == 0 else rest for layer in range(body.num_layers)]

    return kinds


def switched(body: Body) -> list[str]:
    """Qwen2's and Qwen3's: with ``use_sliding_window``, the layers from ``max_window_layers`` on."""
    reader = body.reader
    if not reader.switch(("use_sliding_window", False)) or reader.value("sliding_window") is None:
        return full(body)
    first = reader.count("max_window_layers", "max_window_layers", zero=True, fill=True)
    return ["sliding" if layer >= first else "full" for layer in range(body.num_layers)]


def windowed_from(body: Body) -> list[str]:
    """dots.llm1's: with ``sliding_window``, the layers from ``max_window_layers`` on."""
    if body.reader.value("sliding_window") is None:
        return full(body)
    first = body.reader.count("max_window_layers", "max_window_layers", zero=True, fill=True)
    return ["sliding" if layer >= first else "full" for layer in range(body.num_layers)]


def glm_dsa(body: Body) -> list[str]:
    """GLM-5's: layers that run the indexer of their own (``full``), and those that reuse a choice (``latent``)."""
    reader = body.reader
    pattern = reader.get("index_topk_pattern") if reader.get("indexer_types") is None else None
    given = list(pattern) if isinstance(pattern, str) else reader.listed("indexer_types")
    if given is not None:
        names = {"full": "full", "shared": "latent", "F": "full", "S": "latent"}
        key = "indexer_types" if pattern is None else "index_topk_pattern"
        if len(given) != body.num_layers or not all(isinstance(one, str) and one in names for one in given):
            raise reader.error(key, f"allowed are {body.num_layers} entries of 'full' and 'shared'")
        return [names[one] for one in given]
    every_nth = reader.count_or_none("index_frequency", "index_topk_freq") or 1
    offset = reader.count_or_none("index_offset", "index_skip_topk_offset", zero=True)
    offset = 2 if offset is None else offset
    return ["full" if max(layer - offset + 1, 0) % every_nth == 0 else "latent" for layer in range(body.num_layers)]


def hy_v4(body: Body) -> list[str]:
    """Hunyuan 4's: as GLM-5's where ``indexer_types`` is given, else the first layer and every fourth from the next."""
    if body.reader.get("indexer_types") is not None:
        return glm_dsa(body)
    return ["full" if layer == 0 or (layer - 1) % 4 == 0 else "latent" for layer in range(body.num_layers)]


def flint(body: Body) -> list[str]:
    """Flint's: the first two, every fourth from the second on, and the last full."""
    last = body.num_layers - 1
    return ["full" if layer < 2 or layer % 4 == 1 or layer == last else "sliding" for layer in range(body.num_layers)]


def cohere2_moe(body: Body) -> list[str]:
    """Cohere2-MoE's: ``sliding_window_pattern`` behind the dense layers, a pattern of their own in these."""
    reader = body.reader
    dense = min(reader.count_or_none("first_dense", "first_k_dense_replace", zero=True) or 0, body.num_layers)
    steps = [
        (reader.count_or_none(key, key, fill=True) or default, length)
        for key, default, length in (
            ("prefix_dense_sliding_window_pattern", 1, dense),
            ("sliding_window_pattern", 4, body.num_layers - dense),
        )
    ]
    return ["sliding" if (layer + 1) % step else "full" for step, length in steps for layer in range(length)]


def lfm3(body: Body) -> list[str]:
    """LFM3's: of four layers the third full and the first sliding, but for the very first; convolutions between."""
    names = {2: "full", 0: "sliding"}
    return [names.get(layer % 4, "conv") if layer else "conv" for layer in range(body.num_layers)]


def minimax_m3(body: Body) -> list[str]:
    """MiniMax-M3's ``sparse_attention_freq``: 1 for a layer whose blocks are picked by index keys."""
    key = "sparse_attention_config.sparse_attention_freq"
    given = body.reader.listed(key)
    if given is None:
        return full(body)
    if len(given) != body.num_layers or not set(map(str, given)) <= {"0", "1"}:
        raise body.reader.error(key, f"allowed are {body.num_layers} entries of 0 and 1")
    return ["indexed" if entry else "full" for entry in given]


def switched_all(body: Body) -> list[str]:
    """Qwen3-MoE's: with ``use_sliding_window``, every layer."""
    reader = body.reader
    on = reader.switch(("use_sliding_window", False)) and reader.value("sliding_window") is not None
    return ["sliding" if on else "full"] * body.num_layers


def switched_even(body: Body) -> list[str]:
    """Qwen2-MoE's: with ``use_sliding_window``, every other layer below ``max_window_layers``."""
    reader = body.reader
    if not reader.switch(("use_sliding_window", False)) or reader.value("sliding_window") is None:
        return full(body)
    last = reader.count("max_window_layers", "max_window_layers", zero=True, fill=True)
    return ["sliding" if layer % 2 == 0 and layer < last else "full" for layer in range(body.num_layers)]


def _rotary(body: Body) -> list[bool]:
    """Llama 4's and SmolLM3's ``no_rope_layers``: 1 for a layer *with* rotary positions."""
    given = body.reader.listed("no_rope_layers")
    if given:
        if len(given) != body.num_layers or not set(map(str, given)) <= {"0", "1"}:
            raise body.reader.error("no_rope_layers", f"allowed are {body.num_layers} entries of 0 and 1")
        return [bool(entry) for entry in given]
    step = body.reader.count("no_rope_step", "no_rope_layer_interval", fill=True)
    return [(layer + 1) % step != 0 for layer in range(body.num_layers)]


def chunked(body: Body) -> list[str]:
    """Llama 4's: chunks where there are rotary positions; a chunk size of null means none."""
    if body.reader.value("attention_chunk_size") is None:
        return full(body)
    return ["chunked" if rotary else "full" for rotary in _rotary(body)]


def smollm3(body: Body) -> list[str]:
    """SmolLM3's: with ``use_sliding_window``, the layers without rotary positions."""
    reader = body.reader
    on = reader.switch(("use_sliding_window", False)) and reader.value("sliding_window") is not None
    return ["sliding" if on and not rotary else "full" for rotary in _rotary(body)]


def exaone4(body: Body) -> list[str]:
    """EXAONE 4's ``sliding_window_pattern``: a period, or letters ("LLLG") to repeat; full without a window."""
    reader = body.reader
    if reader.value("sliding_window") is None:
        return full(body)
    pattern = reader.value("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        kinds = [{"L": "sliding", "G": "full"}[letter] for letter in pattern]
        return [kinds[layer % len(kinds)] for layer in range(body.num_layers)]
    return every("sliding_window_pattern")(body)


def mimo_v2(body: Body) -> list[str]:
    """MiMo-V2's: ``hybrid_layer_pattern`` (1: sliding), else the first and every sixth layer full."""
    given = body.reader.listed("hybrid_layer_pattern", body.num_layers)
    if given is not None:
        if not set(map(str, given)) <= {"0", "1"}:
            raise body.reader.error("hybrid_layer_pattern", "allowed are entries of 0 and 1")
        return ["sliding" if entry else "full" for entry in given]
    return ["full" if layer == 0 or (layer + 1) % 6 == 0 else "sliding" for layer in range(body.num_layers)]


def gpt_neo(body: Body) -> list[str]:
    """GPT-Neo's ``attention_types``: ``[[["global", "local"], 12]]``, unrolled (or ``attention_layers`` as it is)."""
    reader = body.reader
    given = reader.listed("attention_layers", body.num_layers)
    if given is None:
        given = []
        for entry in reader.value("attention_types") or []:
            block, times = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
            if not isinstance(block, list | tuple) or not isinstance(times, int) or not 0 < times <= MAX_LAYERS:
                raise reader.error("attention_types", "allowed are pairs of a list and a count")
            given += list(block) * times
            if len(given) > body.num_layers:
                break
        if len(given) != body.num_layers:
            raise reader.error("attention_types", f"not the {body.num_layers} layers")
    return spelled(reader, "attention_types", given, {"full", "sliding"})


def periodic(body: Body) -> list[str]:
    """Jamba's: attention every ``attn_layer_period``-th layer from ``attn_layer_offset``."""
    period = body.reader.count("attention_period", "attn_layer_period", fill=True)
    offset = body.reader.count("attention_offset", "attn_layer_offset", zero=True, fill=True)
    return ["full" if layer % period == offset else "linear" for layer in range(body.num_layers)]


def indexed(key: str, rest: str) -> Kinds:
    """Full attention in the layers that ``key`` lists, ``rest`` in the others (absent: as the class says)."""

    def kinds(body: Body) -> list[str]:
        chosen = body.reader.indices(key)
        if chosen is None:
            return [rest if key == "attn_layer_indices" else "full"] * body.num_layers
        if not chosen <= set(range(body.num_layers)):
            raise body.reader.error(key, f"allowed are layers 0 to {body.num_layers - 1}")
        return ["full" if layer in chosen else rest for layer in range(body.num_layers)]

    return kinds


def linear(body: Body) -> list[str]:
    return ["linear"] * body.num_layers


def hybrid(body: Body) -> list[str]:
    return ["hybrid"] * body.num_layers


def olmo_hybrid(body: Body) -> list[str]:
    """Every fourth layer full; the last where there is none."""
    kinds = every(4, rest="linear")(body)
    return kinds if "full" in kinds else [*kinds[:-1], "full"]


def minimax(body: Body) -> list[str]:
    """MiniMax's: ``attn_type_list`` (1: full), else every other layer."""
    given = body.reader.listed("attn_type_list", body.num_layers)
    if given is not None:
        if not set(map(str, given)) <= {"0", "1"}:
            raise body.reader.error("attn_type_list", "allowed are entries of 0 and 1")
        return ["full" if entry else "linear" for entry in given]
    return ["full" if (layer + 1) % 2 else "linear" for layer in range(body.num_layers)]


def kimi(body: Body) -> list[str]:
    """Kimi Linear's ``linear_attn_config``: layers counted from 1; without it as the class has it."""
    nested = body.reader.child("linear_attn_config")
    if nested is None:
        return ["full" if layer and layer % 4 == 0 else "linear" for layer in range(body.num_layers)]
    chosen, others = nested.indices("full_attn_layers"), nested.indices("kda_layers")
    if chosen is None or others is None or chosen | others != set(range(1, body.num_layers + 1)) or chosen & others:
        raise body.reader.error("linear_attn_config", "full_attn_layers and kda_layers must share out all layers")
    return ["full" if layer + 1 in chosen else "linear" for layer in range(body.num_layers)]


def cycled(key: str) -> Kinds:
    """RecurrentGemma's ``block_types``, repeated."""

    def kinds(body: Body) -> list[str]:
        given = body.reader.value(key)
        if not isinstance(given, list | tuple) or not given:
            raise body.reader.error(key, "allowed is a list")
        block = spelled(body.reader, key, list(given), {"full", "linear"})
        each = {"full": "sliding", "linear": "linear"}
        return [each[block[layer % len(block)]] for layer in range(body.num_layers)]

    return kinds


def letters(body: Body) -> list[str]:
    """Nemotron-H's ``hybrid_override_pattern``: M Mamba-2, * attention, - MLP, E experts."""
    pattern = body.reader.get("hybrid_override_pattern")
    names = {"M": "linear", "*": "full", "-": "dense", "E": "sparse"}
    if not isinstance(pattern, str) or len(pattern) != body.num_layers or not set(pattern) <= set(names):
        raise body.reader.error(
            "hybrid_override_pattern", f"allowed are {body.num_layers} letters of {' '.join(names)}, one a layer"
        )
    return [names[letter] for letter in pattern]


def zamba(body: Body) -> list[str]:
    """Zamba's: two Mamba layers, one with attention, then by ``attn_layer_period`` and ``attn_layer_offset``."""
    period = body.reader.count("attention_period", "attn_layer_period", fill=True)
    offset = body.reader.count("attention_offset", "attn_layer_offset", zero=True, fill=True)
    rest = ["hybrid" if layer % period == offset else "linear" for layer in range(body.num_layers - 3)]
    return ["linear", "linear", "hybrid", *rest][: body.num_layers]


def zamba2(body: Body) -> list[str]:
    """Zamba2's: attention beside Mamba-2 in the layers of ``hybrid_layer_ids``."""
    chosen = body.reader.indices("hybrid_layer_ids")
    if chosen is None:
        raise body.reader.error("layers_block_type", "this model type must list its layers")
    if not chosen <= set(range(body.num_layers)):
        raise body.reader.error("hybrid_layer_ids", f"allowed are layers 0 to {body.num_layers - 1}")
    return ["hybrid" if layer in chosen else "linear" for layer in range(body.num_layers)]


def deepseek_v4(body: Body) -> list[str]:
    """DeepSeek-V4's ``compress_ratios`` (0: none, 4, 128; entries past the layers belong to the MTP head)."""
    given = body.reader.listed("compress_ratios")
    if given is None:
        rest = ["csa" if layer % 2 else "hca" for layer in range(max(body.num_layers - 2, 0))]
        return ["hca"] * min(body.num_layers, 2) + rest
    names = {0: "sliding", 4: "csa", 128: "hca"}
    known = all(isinstance(ratio, int) and not isinstance(ratio, bool) and ratio in names for ratio in given)
    if not known or len(given) < body.num_layers:
        raise body.reader.error("compress_ratios", f"allowed are {body.num_layers} entries of 0, 4 and 128")
    return [names[ratio] for ratio in given[: body.num_layers]]


V41_STRIDES = (1, 2, 4, 8, 16, 32, 64, 128)


def deepseek_v41(body: Body) -> list[str]:
    """DeepSeek-V4.1's: every layer a window; those of ``kv_source_layer_ids`` have a compressed stream besides, of the
    stride that ``compress_ratios`` gives, and the layers up to the next source read it."""
    reader, count = body.reader, body.num_layers
    ratios, sources = reader.listed("compress_ratios"), reader.indices("kv_source_layer_ids")
    if (ratios is None or sources is None) and count != 40:
        raise reader.error("compress_ratios", f"give it and kv_source_layer_ids for {count} layers")
    ratios = [0, 0, *[2] * 18, *[1] * 20] if ratios is None else ratios
    sources = {2, 8, 14, 20} if sources is None else sources
    known = all(isinstance(ratio, int) and not isinstance(ratio, bool) and ratio >= 0 for ratio in ratios)
    if not known or len(ratios) < count:
        raise reader.error("compress_ratios", f"allowed are {count} entries of 0 and above")
    if not all(at < count and ratios[at] in V41_STRIDES for at in sources):
        raise reader.error("kv_source_layer_ids", f"allowed are layers 0 to {count - 1} whose ratio is a power of 2")
    for at in range(count):
        own = [source for source in sources if source <= at]
        if ratios[at] and (not own or ratios[max(own)] != ratios[at]):
            raise reader.error("compress_ratios", f"layer {at} has no source of its ratio")
    return [f"csa{ratios[at]}" if at in sources else "sliding" for at in range(count)]


def qwen_hybrid(body: Body) -> list[str]:
    """Qwen3-Next's: every ``full_attention_interval``-th layer full (4 where absent), the others linear."""
    return every("full_attention_interval", rest="linear", default=4)(body)
