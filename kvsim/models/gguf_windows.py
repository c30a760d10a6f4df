"""Which GGUF architectures have layers with windows, as llama.cpp loads them."""

from __future__ import annotations

WINDOWED: dict[str, tuple[str, ...]] = {
    "afmoe": ("afmoe",),
    "cohere2": ("cohere2",),
    "cohere2moe": ("cohere2_moe",),
    "deepseek4": ("deepseek_v4",),
    "exaone-moe": ("exaone_moe",),
    "exaone4": ("exaone4",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3_text",),
    "gemma3n": ("gemma3n_text",),
    "gemma4": ("gemma4_text", "gemma4_unified_text"),
    "gpt-oss": ("gpt_oss",),
    "granite_swa": ("granite_swa", "granitemoe_swa"),
    "laguna": ("laguna",),
    "lfm2": ("lfm2",),
    "llama4": ("llama4_text",),
    "maple": ("maple",),
    "mellum": ("mellum",),
    "mimo2": ("mimo_v2_flash",),
    "muse-glimmer": (),
    "olmo2": ("olmo3",),
    "plamo3": ("plamo3",),
    "smallthinker": ("smallthinker",),
    "spark2_5": (),
    "step35": ("step3p5",),
}
"""GGUF architectures whose loader sets a ``swa_type`` (src/models/, ``load_arch_hparams``), and the ``model_type`` that
conversion/ turns into them.  Every other architecture runs its layers whole, phi3 after reading its window
(llama.cpp#13676); mistral, mixtral, qwen2, qwen3, phimoe, starcoder2, smollm3, ministral3 are among them."""
