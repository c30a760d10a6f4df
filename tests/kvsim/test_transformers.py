"""The parser against transformers itself: every family, tiny, built for real.

The number of parameters, and the shape of what a forward pass leaves in a plain cache, are those of the class.
"""

from typing import Any

import pytest

from kvsim import catalog
from kvsim.models.families import FAMILIES
from kvsim.models.model import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NOT_IN_TRANSFORMERS = {"mimo", "minimax_m3"}  # remote code, or another class there
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 211,
    "max_position_embeddings": 128,
}
UNGROUPED = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2 = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 211}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GLM = {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
BIASED = {"attention_bias": True, "mlp_bias": True}

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [GPT2, GPT2 | {"n_inner": 100}],
    "gpt_bigcode": [GPT2, GPT2 | {"multi_query": False}],
    "gptj": [GPT2 | {"rotary_dim": 8}],
    "gpt_neox": [UNGROUPED, UNGROUPED | {"attention_bias": False}],
    "llama": [SIZES, SIZES | BIASED | {"tie_word_embeddings": True, "head_dim": 16}],
    "mistral": [SIZES | {"sliding_window": None}],
    "ministral3": [SIZES | {"head_dim": 16, "sliding_window": None}],
    "mixtral": [SIZES | LOCAL_EXPERTS],
    "qwen2": [SIZES, SIZES | {"sliding_window": 32, "tie_word_embeddings": True}],
    "qwen2_moe": [
        SIZES | EXPERTS | {"shared_expert_intermediate_size": 80},
        SIZES | EXPERTS | {"shared_expert_intermediate_size": 80, "decoder_sparse_step": 2, "qkv_bias": False},
    ],
    "qwen3": [SIZES | {"head_dim": 16}, SIZES | {"head_dim": 16, "attention_bias": True}],
    "qwen3_moe": [SIZES | EXPERTS | {"head_dim": 16}, SIZES | EXPERTS | {"head_dim": 16, "mlp_only_layers": [0]}],
    "gemma": [SIZES | {"head_dim": 16}, SIZES | {"head_dim": 32, "attention_bias": True}],
    "phi": [SIZES, SIZES | {"qk_layernorm": True}],
    "phi3": [SIZES],
    "phimoe": [SIZES | LOCAL_EXPERTS, SIZES | LOCAL_EXPERTS | {"attention_bias": True, "lm_head_bias": True}],
    "olmo": [SIZES, SIZES | {"attention_bias": True}],
    "olmo2": [SIZES, SIZES | {"attention_bias": True}],
    "olmoe": [SIZES | {"num_experts": 4, "num_experts_per_tok": 2}],
    "falcon": [
        SIZES,
        SIZES | {"multi_query": False, "bias": True, "parallel_attn": False},
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
        SIZES | {"ffn_hidden_size": 100, "tie_word_embeddings": False},
    ],
    "cohere": [SIZES, SIZES | {"use_qk_norm": True, "attention_bias": True}],
    "nemotron": [SIZES, SIZES | BIASED],
    "glm4_moe": [
        SIZES | GLM | {"head_dim": 16, "first_k_dense_replace": 1},
        SIZES | GLM | {"head_dim": 16, "first_k_dense_replace": 2, "use_qk_norm": True, "attention_bias": True},
    ],
    "minimax_m2": [SIZES | LOCAL_EXPERTS | {"head_dim": 16, "rotary_dim": 8}],
    "smollm3": [SIZES, SIZES | BIASED | {"tie_word_embeddings": False}],
    "starcoder2": [SIZES, SIZES | {"use_bias": False}],
    "seed_oss": [SIZES | {"head_dim": 16}, SIZES | {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}],
    "ernie4_5": [SIZES | {"head_dim": 16}, SIZES | {"head_dim": 16, "use_bias": True}],
}


def test_every_family_is_here_or_in_the_oracle() -> None:
    assert set(CONFIGS) <= set(FAMILIES) - NOT_IN_TRANSFORMERS


@pytest.mark.parametrize(
    ("model_type", "config"),
    [pytest.param(name, config, id=f"{name}-{at}") for name, each in CONFIGS.items() for at, config in enumerate(each)],
)
def test_parameters_and_cache_shapes(model_type: str, config: dict[str, Any]) -> None:
    ours = Model.from_config(config | {"model_type": model_type})
    theirs = transformers.AutoConfig.for_model(model_type, **config, **IDS)
    model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    assert ours.num_params == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5, 6, 7]]), use_cache=True).past_key_values
    broadcast = model_type == "falcon" and config.get("new_decoder_architecture")
    for layer, shape in zip(cache.layers, ours.layers, strict=True):
        heads = ours.num_q_heads if broadcast else shape.num_kv_heads
        assert tuple(layer.keys.shape) == (1, heads, 5, shape.key_dim)
        assert tuple(layer.values.shape) == (1, heads, 5, shape.value_dim)
    assert broadcast == bool(ours.notes) or not broadcast


def test_minimax_m3_against_the_language_model_of_its_vision_class() -> None:
    """No causal class of its own: the text model, and a head as large as the embedding."""
    torch = pytest.importorskip("torch", reason="the runtime extra is not installed")
    name = "minimax_m3_vl"
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}", reason="transformers without it")
    config = next(row["config"] for row in catalog.rows("models") if row["id"] == "MiniMaxAI/MiniMax-M3")
    settings = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        text = modeling.MiniMaxM3VLTextModel(modeling.MiniMaxM3VLTextConfig(**settings))
    ours = Model.from_config(config)
    head = config["vocab_size"] * config["hidden_size"]
    assert ours.num_params == sum(parameter.numel() for parameter in text.parameters()) + head
    indexed = [layer for layer in text.layers if getattr(layer.self_attn, "indexer", None) is not None]
    assert len(ours.index_layers) == len(indexed) == 57
    more = {"sparse_block_size": 128, "sparse_topk_blocks": 16, "sparse_score_type": "max", "sparse_local_block": 1}
    whole = config | {"sparse_attention_config": config["sparse_attention_config"] | more}
    assert Model.from_config(whole).layers == ours.layers
