"""Vision-language models by their real names, as tiny seeded random models with an image in the prompt.

tests/kvruntime/test_hf_vision.py runs every row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from hf_models import GQA

IMAGE, START, END = 100, 102, 103
"""Tokens: of an image's place, and around it."""
TEXT = {**GQA, "vocab_size": 120}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE = {**VISION, "image_size": 16, "patch_size": 4}
QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 101,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
GEMMA = {**TEXT, "head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA4 = {
    **TEXT,
    "head_dim": 32,
    "attention_chunk_size": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 32,
    "layer_types": ["chunked_attention", "full_attention"],
}
LLAMA4_VISION = {
    **SQUARE,
    "intermediate_size": 128,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}
PATCHES = torch.Size([2 * 16, 3 * 16])
PIXELS = torch.Size([2, 3, 16, 16])
IMAGES = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4] * 2)
"""The places of an image's tokens in the prompt."""
GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": IMAGES}

VISIONS: dict[str, tuple[str, dict[str, Any], torch.Size, dict[str, torch.Tensor]]] = {
    "Qwen2.5-VL": (
        "Qwen2_5_VL",
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {**QWEN, "window_size": 16, "fullatt_block_indexes": [0]},
            **QWEN_TOKENS,
        },
        PATCHES,
        GRID,
    ),
    "Qwen3-VL": (
        "Qwen3VL",
        {
            "text_config": {**TEXT, "head_dim": 32, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
            "vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        },
        PATCHES,
        GRID,
    ),
    "Gemma 3": (
        "Gemma3",
        {
            "text_config": GEMMA,
            "vision_config": SQUARE,
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        PIXELS,
        {"token_type_ids": IMAGES},
    ),
    "Llama 4": (
        "Llama4",
        {
            "text_config": LLAMA4,
            "vision_config": LLAMA4_VISION,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        PIXELS,
        {},
    ),
    "Mistral 3": (
        "Mistral3",
        {
            "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None, "head_dim": 32},
            "vision_config": {"model_type": "pixtral", **SQUARE, "head_dim": 16},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        PIXELS,
        {"image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "InternVL": (
        "InternVL",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        PIXELS,
        {},
    ),
    **{
        name: (
            name,
            {
                "text_config": {**TEXT, "model_type": "llama"},
                "vision_config": SQUARE,
                "image_token_id": IMAGE,
                "scale_factor": 2,
            },
            torch.Size([2, 1, 3, 16, 16]),
            {},
        )
        for name in ("SmolVLM", "Idefics3")
    },
}
"""Name -> (class without its ending, arguments of the config, shape of the pixels, what else the processor gives)."""


@cache
def vision(name: str) -> torch.nn.Module:
    """The tiny model, seeded; every caller gets the same object."""
    kind, arguments, _, _ = VISIONS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**arguments)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = None
    return model


def image_prompt(name: str) -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, 4 of them an image's."""
    _, _, pixels, more = VISIONS[name]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 97, (2, 12), generator=generator)
    ids[:, 3], ids[:, 4:8] = START, IMAGE
    images = {"pixel_values": torch.randn(pixels, generator=generator)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images, **more}
