"""Configs in the words in which they were published, with the keys that do not matter here, against literal figures.

None of them is in the catalogue: the keys of remote code, older names, nested configs without what equals the class's
defaults (``source``: where the text was read, of those that have it).  The parameters are the totals that their authors
state, to the last digit where they give one.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvsim.memory.estimate import cache_nbytes
from kvsim.methods import Full
from kvsim.models.load import load_model
from kvsim.models.model import Model

ROWS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).parents[1].joinpath("support", "published.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", ROWS)
def test_a_published_config(name: str) -> None:
    row = ROWS[name]
    model = Model.from_config(row["config"], name)
    assert cache_nbytes(model, Full(), 1, 1) == row["bytes_per_token"]
    assert cache_nbytes(model, Full(), 1, 8192) == row["8192"]
    assert sum(buffer.nbytes for layer in model.state_layers for buffer in layer.buffers(1)) == row["state"]
    assert model.num_params == row["parameters"]
    assert dict(model.kinds) == row["kinds"]


def changed(name: str, **change: Any) -> dict[str, Any]:
    return ROWS[name]["config"] | change


def inside(name: str, **change: Any) -> dict[str, Any]:
    config = ROWS[name]["config"]
    return config | {"text_config": config["text_config"] | change}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("hunyuan-a13b", use_cla=True), "cla_share_factor is 2: layers that share"),
        (changed("internlm2-7b", sliding_window=4096), "sliding_window is 4096: sliding windows"),
        (changed("baichuan2-7b", num_key_value_heads=8), "num_key_value_heads is 8: this model type has 32"),
        (changed("minimax-text-01", attn_type_list=[0, 2] * 40), "attn_type_list"),
        (changed("minimax-m2", attn_type_list=[0] + [1] * 61), "attn_type_list"),
        (changed("bamba-9b", attn_layer_indices=[9, 18, 99]), "attn_layer_indices"),
        (changed("exaone4-32b", sliding_window_pattern="LLXG"), "sliding_window_pattern is 'LLXG'"),
        (changed("gptneo-1.3b", attention_layers=["global", "sparse"] * 12), "attention_types has 'sparse'"),
        (changed("gemma2-9b", use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (changed("mpt-7b", attn_config={"attn_type": "multiquery_attention"}), "attn_config.attn_type"),
        (changed("ernie-0.3b", compression_ratio=4), "compression_ratio is 4: compressed attention"),
        (changed("qwen-7b", kv_cache_bits=4), "kv_cache_bits is 4"),
        (changed("lfm2-1.2b", layer_types=["conv"] * 15 + ["mamba"]), "layer_types has 'mamba'"),
        (changed("falcon-h1-1.5b", mamba_n_heads=47), "mamba_n_heads is 47"),
        (changed("kimi-linear-remote", linear_attn_config={"kda_layers": [1]}), "linear_attn_config"),
        (changed("mamba-2.8b", model_type="hyena"), "model_type is 'hyena'"),
        (changed("openelm-270m", num_kv_heads=[3] * 15), "num_kv_heads is .*: 15 entries for 16 layers"),
        (changed("openelm-270m", num_kv_heads=[5] * 16), "num_kv_heads is .*: allowed are divisors"),
        (changed("ernie-0.3b", layer_share_kv=True), "layer_share_kv is True: layers that share a cache"),
        (inside("deepseek-v4.1-flash", compress_ratios=[0] * 39), "compress_ratios is .*: allowed are 40 entries"),
        (inside("deepseek-v4.1-flash", kv_source_layer_ids=[2, 8, 14]), "layer 20 has no source of its ratio"),
        (
            inside("deepseek-v4.1-flash", kv_source_layer_ids=[1, 2, 20]),
            "kv_source_layer_ids is .*: allowed are",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model.from_config(config)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("minicpm-moe-8x2b", "num_experts 8: weights that are not known of 'minicpm'"),
    ],
)
def test_weights_that_a_family_does_not_know_are_not_counted(name: str, key: str) -> None:
    model = Model.from_config(ROWS[name]["config"])
    assert model.num_params is None
    assert any(key in note for note in model.notes)


def test_kimi_k3_matrix_by_matrix() -> None:
    """As its remote code makes it: a full-rank output gate in delta attention, a gate in latent attention, experts of
    half the width between two projections, and residuals that attend over the blocks before."""
    hidden, vocab, heads, dim, low, rank, wide, latent = 7168, 163840, 96, 128, 1536, 512, 3072, 3584
    width = heads * dim
    delta = 5 * hidden * width + 3 * width * 4 + heads + width + hidden * dim + dim * width + hidden * heads + dim
    attention = hidden * low + low + low * heads * 192 + hidden * 576 + rank + rank * heads * 256 + 2 * hidden * width
    experts = 896 * hidden + 896 * 3 * latent * wide + 2 * hidden * latent + latent + 3 * hidden * wide * 2
    layers = 69 * delta + 24 * attention + 92 * experts + 3 * hidden * 33792 + 93 * 6 * hidden
    assert load_model("kimi-k3").num_params == layers + 2 * vocab * hidden + 3 * hidden


QWEN2 = ROWS["qwen2.5-vl"]["config"]


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({"model_type": "internvl_chat", "llm_config": QWEN2 | {"model_type": "qwen2"}}, "llm_config."),
        (
            {
                "model_type": "qwen2_5_omni",
                "thinker_config": {"text_config": QWEN2 | {"model_type": "qwen2_5_omni_text"}},
            },
            "thinker_config.text_config.",
        ),
        ({"model_type": "llava_onevision", "text_config": QWEN2 | {"model_type": "qwen2"}}, "text_config."),
    ],
)
def test_a_decoder_is_found_where_its_wrapper_has_it(config: dict[str, Any], prefix: str) -> None:
    model = Model.from_config(config)
    assert dict(model.kinds) == ROWS["qwen2.5-vl"]["kinds"]
    assert model.source("num_kv_heads", "full") == f"{prefix}num_key_value_heads"
    outer = {"model_type": config["model_type"], **({"thinker_config": {}} if "thinker_config" in config else {})}
    with pytest.raises(ValueError, match=rf"config key {prefix.removesuffix('.')} is absent: .* has its decoder there"):
        Model.from_config(outer)


@pytest.mark.parametrize(
    ("wrapper", "outer", "inner", "tied"),
    [
        ("ovis2", True, False, True),
        ("ovis2", False, True, False),
        ("ovis2", None, True, True),
        ("llava", False, True, True),
        ("llava", True, None, True),
        ("llava", False, None, False),
    ],
)
def test_the_outer_config_ties_the_embeddings_or_either_does(
    wrapper: str, outer: bool | None, inner: bool | None, tied: bool
) -> None:
    text = {key: value for key, value in QWEN2.items() if key != "tie_word_embeddings"} | {"model_type": "qwen2"}
    text |= {} if inner is None else {"tie_word_embeddings": inner}
    config = {"model_type": wrapper, "text_config": text}
    model = Model.from_config(config if outer is None else config | {"tie_word_embeddings": outer})
    assert model.weights is not None
    assert (model.weights.head == 0) is tied


def test_a_switched_off_window_is_none() -> None:
    """Keys that Qwen's descendants keep when they are published as Llama."""
    config = ROWS["orion-14b"]["config"] | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 9}
    assert dict(Model.from_config(config).kinds) == {"full": 40}
    with pytest.raises(ValueError, match="use_sliding_window is True"):
        Model.from_config(config | {"use_sliding_window": True})


def test_granites_without_experts_have_the_shared_mlp_alone() -> None:
    """Granite 4.0 Micro, 3.4 billion parameters."""
    config = ROWS["granite4h-tiny"]["config"] | {
        "hidden_size": 2560,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 8192,
        "vocab_size": 100352,
        "layer_types": ["attention"] * 40,
    }
    layer = 2 * 2560 * (2560 + 512) + 3 * 2560 * 8192 + 2 * 2560
    assert Model.from_config(config).num_params == 40 * layer + 2560 + 100352 * 2560 == 3402836480


def test_absent_keys_take_the_values_of_the_class_and_a_note_says_which() -> None:
    model = Model.from_config(ROWS["gemma3-4b"]["config"])
    note = next(line for line in model.notes if line.startswith("absent from the config"))
    assert "num_key_value_heads 4" in note
    assert "head_dim 256" in note
    assert model.source("head_dim", "full") == "text_config.head_dim (absent: 256 by its class)"
