"""What each ``model_type`` of a config.json means: which keys hold the numbers, and what a layer is made of.

One row a family, read from the model's class in transformers 5.17 to 5.24 (or, where it is not there, from the
code published with the model).  :mod:`kvsim.models.model` reads the keys, :mod:`kvsim.models.parameters` counts
the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache

from kvsim.models.families.custom import CUSTOM
from kvsim.models.families.family import (
    Family,
)
from kvsim.models.families.gpt import GPT
from kvsim.models.families.hybrid import (
    HYBRID,
)
from kvsim.models.families.latent import LATENT
from kvsim.models.families.llama import (
    LLAMA,
)
from kvsim.models.families.looped import LOOPED
from kvsim.models.families.multimodal import MULTIMODAL
from kvsim.models.families.refused import REFUSED
from kvsim.models.feedforward import (
    if_any,
    none,
)


@cache
def known_keys(model_type: str) -> frozenset[str]:
    """Every key that the family's row names, read or not; none of a type that is no family."""
    return frozenset(_strings(FAMILIES[model_type])) if model_type in FAMILIES else frozenset()


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, Mapping):
        yield from _strings(tuple(value.values()))
    elif is_dataclass(value):
        yield from _strings(tuple(getattr(value, field.name) for field in fields(value)))


FAMILIES: dict[str, Family] = {**GPT, **LLAMA, **LATENT, **HYBRID, **LOOPED, **MULTIMODAL, **CUSTOM}

FAMILIES["gemma4_unified_text"] = replace(
    FAMILIES["gemma4_text"], experts=None, layer_extra=None, outer_extra=None, lookup_extra=None
)
FAMILIES["apertus1p5_text"] = replace(
    FAMILIES["apertus"],
    count_if=lambda body: body.reader.get("output_vocab_size") in (None, body.reader.get("vocab_size")),
)
for alias, known in {
    "kimi_k25_text": "kimi_k2",
    "minimax_text_01": "minimax",
    "minimax_m1": "minimax",
    "gpt-sw3": "gpt2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "minimax_m3_vl_text": "minimax_m3",
    "emu3_text_model": "llama",
    "granite_docling_text": "granite",
    "granite4_vision_text": "granite",
    "hunyuan_vl_text": "hunyuan_v1_dense",
    "paddleocr_vl_text": "ernie4_5",
}.items():
    FAMILIES[alias] = FAMILIES[known]

WRAPPERS = (
    "mistral3", "ministral3", "llama4", "gemma3", "gemma3n", "gemma4", "qwen3_5", "qwen3_5_moe", "kimi_k25",
    "llava", "llava_next", "vipllava", "paligemma", "internvl", "aya_vision", "cohere2_vision", "idefics3", "smolvlm",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "got_ocr2", "lfm2_vl", "minimax_m3_vl", "kimi_vl",
    "glm4v", "glm4v_moe", "glm46v", "qwen2_5_omni", "qwen3_omni_moe", "step3p7", "kimi_k3", "internvl_chat",
    "llava_next_video", "llava_onevision", "video_llava", "video_llama_3", "idefics2",
    "aria", "ovis2", "perception_lm", "fast_vlm", "deepseek_vl", "deepseek_vl_hybrid", "janus", "lighton_ocr",
    "qianfan_ocr", "exaone4_5", "minicpmv4_6", "shieldgemma2", "gemma4_unified", "apertus1p5", "nemotron_h_omni",
    "hyperclovax_vision_v2", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "deepseek_v41",
    "dots3_note",
    "ernie4_5_vl_moe", "fun_asr_nano", "fuyu", "glm5_next", "glm_image", "glm_ocr", "glmga", "granite4_vision",
    "granite_docling", "hunyuan_vl", "hy_v4_vl", "inkling2", "inkling2_loop", "inkling_mm_model", "jev", "lfm3_vl",
    "minicpm_ocr", "minicpmv4_7", "mistral_large4", "mllama", "molmo2", "moss_transcribe_diarize", "muse_glimmer",
    "muse_spark", "musicflamingo", "nemo_speechlm", "omniasr", "paddleocr_vl", "pp_chart2table", "qwen2_5_omni_thinker",
    "qwen3_asr", "qwen3_omni_moe_thinker", "qwen4_exp", "unlimited_ocr", "vibevoice", "voxtral_realtime",
    "blip-2", "instructblip", "instructblipvideo", "emu3", "qwen2_audio",
    "voxtral", "granite_speech", "granite_speech_plus", "audioflamingo3",
    "glmasr", "vibevoice_asr",
)  # fmt: skip
"""Outer model types of transformers whose ``text_config`` is a decoder of the table above.  Others are taken as well
where their ``text_config`` is, and none of their own keys smells of the cache."""

__all__ = ["FAMILIES", "REFUSED", "WRAPPERS", "Family", "Mixer", "if_any", "none"]
