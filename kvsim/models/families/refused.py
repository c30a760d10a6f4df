"""Model types that are known and not taken: no decoder-only language model, or no cache that tokens alone tell."""

from __future__ import annotations

ENCODER_DECODER = "an encoder and a decoder: the cross attention's cache is as long as the encoder's input"
ENCODER = (
    "an encoder: its tokens see each other both ways and leave no cache (as a decoder, is_decoder, it is not read)"
)
DRAFT = "a draft model: it reads its target's cache and keeps none of its own"
SEVERAL = "several models in one, each with a cache of its own"
DIFFUSION = "a diffusion model: tokens are refined in blocks both ways, not appended one by one"

REASONS: dict[str, tuple[str, ...]] = {
    ENCODER_DECODER: (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "canary", "cohere_asr", "dia", "encoder-decoder",
        "florence2", "fsmt", "led", "longt5", "m2m_100", "marian", "mbart", "moonshine", "moonshine_streaming", "mt5",
        "musicgen", "musicgen_melody", "mvp", "nllb-moe", "pegasus", "pegasus_x", "pix2struct", "plbart", "pop2piano",
        "pp_formulanet", "pp_formulanet_text", "prophetnet", "seamless_m4t", "seamless_m4t_v2",
        "speech-encoder-decoder", "speech_to_text", "speecht5",
        "switch_transformers", "t5", "t5gemma", "t5gemma2", "t5gemma2_decoder",
        "trocr",
        "udop", "umt5", "vision-encoder-decoder", "whisper", "blip", "blip_text_model",
    ),
    ENCODER: (
        "albert", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "distilbert", "electra", "ernie",
        "embedding_gemma2", "embedding_gemma2_text", "eurobert", "megatron-bert", "modernbert", "modernvbert",
        "nomic_bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "t5gemma2_encoder",
        "t5gemma2_text", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "openai_privacy_filter",
    ),
    DRAFT: ("gemma4_assistant", "gemma4_unified_assistant", "muse_glimmer_assistant"),
    SEVERAL: (
        "bark", "blt", "csm", "fastspeech2_conformer_with_hifigan", "gradium_phonon_tts", "moshi", "pi0", "pocket_tts",
        "qwen2_5_omni_talker", "csm_depth_decoder_model",
    ),
    DIFFUSION: ("diffusion_gemma", "diffusion_gemma_text", "dream", "llada", "llada_moe", "sdar"),
    "a model of images or sound, not of language": ("vits", "imagegpt", "higgs_audio_v2", "kyutai_speech_to_text"),
    "32 prompt tokens of its own stand before the text": ("cpmant",),
    "images stand before the text, in a cache that the config does not size": (
        "git", "kosmos-2", "kosmos-2.5", "idefics", "evolla", "kosmos_2_text_model", "kosmos_2_5_text_model",
    ),
    "its hashed attention keeps buckets and states, not keys and values": ("reformer",),
    "its memory is not keys and values (mems)": ("xlnet",),
}  # fmt: skip
"""Why a model type is not taken."""

REFUSED: dict[str, str] = {name: reason for reason, names in REASONS.items() for name in names}
