"""The doctor on llama.cpp's logs, of one model and of two."""

from dataclasses import replace

import pytest
from boot_logs import LLAMA, TWO_MODELS, figures

from kvsim.analysis.doctor import diagnose, engine_of
from kvsim.layout import LayerShape
from kvsim.models.load import load_model

GEMMA4 = replace(
    LLAMA,
    layers=(LayerShape(8, 256, 256, window=1024),) * 40 + (LayerShape(1, 512, 512),) * 8,
)
LLAMA_CPP = """\
llama_context: n_seq_max     = 2
llama_context: n_ctx         = 8192
llama_context: n_ctx_seq     = 4096
llama_context: n_ubatch      = 512
llama_kv_cache_iswa: creating non-SWA KV cache, size = 4096 cells
llama_kv_cache: size =  128.00 MiB ( 4096 cells,   8 layers,  2/2 seqs), K (f16):   64.00 MiB, V (f16):   64.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = 1536 cells
llama_kv_cache: size =  960.00 MiB ( 1536 cells,  40 layers,  2/2 seqs), K (f16):  480.00 MiB, V (f16):  480.00 MiB
"""
"""llama-server -c 8192 -np 2, gemma-4-12B, as its users' notes give it."""


def test_a_llama_cpp_log_line_by_line() -> None:
    assert engine_of(LLAMA_CPP) == "llama.cpp"
    found = figures(diagnose(LLAMA_CPP, GEMMA4))
    assert found == {
        "cells": (4096, 4096, 0),
        "keys, f16 (full)": (64, 64, 0),
        "values, f16 (full)": (64, 64, 0),
        "cells with a window": (1536, 1536, 0),
        "keys, f16 (window)": (480, 480, 0),
        "values, f16 (window)": (480, 480, 0),
    }
    quantized = """llama_kv_cache_iswa: creating non-SWA KV cache, size = 16384 cells
llama_kv_cache: size =  136.00 MiB ( 16384 cells,   8 layers,  1/1 seqs), K (q8_0):   68.00 MiB, V (q8_0):   68.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = 1536 cells
llama_kv_cache: size =  255.00 MiB ( 1536 cells,  40 layers,  1/1 seqs), K (q8_0):  127.50 MiB, V (q8_0):  127.50 MiB"""
    assert figures(diagnose(quantized, GEMMA4)) == {
        "keys, q8_0 (full)": (68, 68, 0),
        "values, q8_0 (full)": (68, 68, 0),
        "keys, q8_0 (window)": (127.5, 127.5, 0),
        "values, q8_0 (window)": (127.5, 127.5, 0),
    }


def test_llama_cpp_by_its_own_metadata() -> None:
    """28 layers, 512 wide, 2048 cells: KV self size 112.00 MiB (JamePeng/llama-cpp-python#1)."""
    text = """llm_load_print_meta: n_layer          = 28
llm_load_print_meta: n_embd_k_gqa     = 512
llm_load_print_meta: n_embd_v_gqa     = 512
llama_init_from_model: n_ctx         = 2048
llama_init_from_model: KV self size  =  112.00 MiB, K (f16):   56.00 MiB, V (f16):   56.00 MiB"""
    assert figures(diagnose(text, None)) == {"keys, f16": (56, 56, 0), "values, f16": (56, 56, 0)}
    bare = text.splitlines()[-1]
    (keys, _) = diagnose(bare, None).findings
    assert keys.predicted is None
    assert "give --model" in keys.cause


def test_llama_cpp_buffers() -> None:
    """Llama-3-8B and Qwen2.5-3B as llama.cpp prints them (SciSharp/LLamaSharp#1099 for the second)."""
    text = """llama_kv_cache_init:      CUDA0 KV buffer size =  1024.00 MiB
llama_context: n_ctx         = 8192
llama_kv_cache: size = 1024.00 MiB (  8192 cells,  32 layers,  1/1 seqs), K (f16):  512.00 MiB, V (f16):  512.00 MiB
llama_context:      CUDA0 compute buffer size =   258.50 MiB"""
    found = figures(diagnose(text, LLAMA))
    assert found["KV buffers"] == (1024, 1024, 0)
    assert found["compute buffer"] == (258.5, 258.5, 0)
    small = """llama_kv_cache_init:      CUDA0 KV buffer size =   144.00 MiB
llama_init_from_model: KV self size  =  144.00 MiB, K (f16):   72.00 MiB, V (f16):   72.00 MiB
llama_init_from_model: n_ctx         = 4096
llama_init_from_model:      CUDA0 compute buffer size =   300.75 MiB"""
    shape = replace(LLAMA, layers=(LayerShape(2, 128, 128),) * 36, hidden_size=2048, vocab_size=151936)
    found = figures(diagnose(small, shape))
    assert found["KV buffers"] == (144, 144, 0)
    assert found["keys, f16"] == (72, 72, 0)
    assert found["compute buffer"] == (300.75, 300.75, 0)
    alone = diagnose(small.splitlines()[0], None).findings
    assert [(each.what, each.predicted, each.reported) for each in alone] == [("KV buffers", None, 144)]


def test_llama_cpp_states() -> None:
    model = load_model("Qwen/Qwen3-Next-80B-A3B-Instruct")
    mebibytes = 36 * 4 * (8192 * 3 + 32 * 128 * 128) / (1 << 20)
    text = f"llama_memory_recurrent: size = {mebibytes:.2f} MiB (     1 cells,  48 layers,  1 seqs), R (f32): 3.38 MiB"
    found = figures(diagnose("llama_context: n_ctx = 4096\n" + text, model))
    assert found["states"][2] == pytest.approx(0.0, abs=1e-4)


def test_two_models_in_a_llama_cpp_log() -> None:
    diagnosis = diagnose(TWO_MODELS, None)
    assert diagnosis.model == "target-24B.gguf, draft.gguf"
    assert figures(diagnosis) == {
        "KV buffers (target-24B.gguf)": (640, 640, 0),
        "keys, f16 (target-24B.gguf)": (320, 320, 0),
        "values, f16 (target-24B.gguf)": (320, 320, 0),
        "KV buffers (draft.gguf)": (128, 128, 0),
        "keys, f16 (draft.gguf)": (64, 64, 0),
        "values, f16 (draft.gguf)": (64, 64, 0),
    }


def test_model_chooses_one_of_two() -> None:
    """The one whose layers and heads it has; the other by its metadata."""
    small = replace(LLAMA, name="small", layers=(LayerShape(8, 64, 64),) * 16, kinds=())
    diagnosis = diagnose(TWO_MODELS, small)
    assert all(each.error == 0 for each in diagnosis.findings)
    assert "small is taken for draft.gguf" in diagnosis.notes
    wrong = diagnose(TWO_MODELS, replace(small, name="wrong", layers=(LayerShape(8, 64, 64),) * 40))
    assert "wrong is taken for target-24B.gguf" in wrong.notes
    assert figures(wrong)["keys, f16 (target-24B.gguf)"] == (160, 320, 1)
    assert figures(wrong)["keys, f16 (draft.gguf)"] == (64, 64, 0)


def test_caches_after_both_models_are_told_apart_by_their_layers() -> None:
    lines = TWO_MODELS.splitlines()
    order = [*lines[:4], *lines[7:11], *lines[4:7], *lines[11:]]
    found = diagnose("\n".join(order), None).findings
    assert [each.error for each in found if each.what.startswith(("keys", "values"))] == [0, 0, 0, 0]


def test_a_llama_cpp_boot_that_failed() -> None:
    """36 layers x 256,000 cells x 1024 x 2 x 2 B = 36,000 MiB."""
    text = """print_info: n_layer          = 36
print_info: n_embd_k_gqa     = 1024
print_info: n_embd_v_gqa     = 1024
llama_context: n_ctx         = 256000
ggml_aligned_malloc: insufficient memory (attempted to allocate 36000.00 MB)
alloc_tensor_range: failed to allocate CPU buffer of size 37748736000
llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"""
    diagnosis = diagnose(text, None)
    assert figures(diagnosis) == {"the allocation that failed": (36_000, 36_000, 0)}
    assert diagnosis.notes == ("the boot failed, line 6: 36,000.00 MiB for the cache could not be allocated",)


def test_a_type_that_llama_cpp_does_not_have() -> None:
    line = "llama_kv_cache: size = 8.00 MiB (4096 cells, 40 layers, 1/1 seqs), K (turbo3): 4.00 MiB, V (f16): 4.00 MiB"
    (keys, _) = diagnose(TWO_MODELS.splitlines()[2] + "\n" + line, None).findings
    assert keys.predicted is None
    assert "turbo3 is not known here" in keys.cause
