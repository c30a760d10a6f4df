"""Models from GGUF and safetensors headers, without the data; one clear error for a broken file."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from weight_files import CONFIG, F16, F32, decoder, gguf, safetensors, written

from kvsim.engines import LlamaCpp
from kvsim.layout import LayerShape
from kvsim.methods import Full
from kvsim.models.gguf import BLOCKS, read_header
from kvsim.models.gguf_model import PLAIN, WINDOWS
from kvsim.models.load import load_model
from kvsim.models.model import Model


def test_a_gguf_alone_is_a_model(tmp_path: Path) -> None:
    metadata, tensors = decoder("llama")
    metadata["tokenizer.ggml.tokens"] = ["word"] * 5000  # walked, not kept
    model = load_model(written(tmp_path, gguf(metadata, tensors)))
    config = {
        "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    same = Model.from_config(config)
    assert (model.layers, model.weights, model.num_q_heads) == (same.layers, same.weights, 8)
    nbytes = 128 * 64 // 32 * 34 + 9 * 64 * 4 + 4 * 2 * (64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 96)
    assert model.num_params
    assert model.weight_bits == 8 * nbytes / model.num_params
    assert model.source("num_kv_heads") == "llama.attention.head_count_kv"


def test_windows_follow_the_architecture_or_the_file(tmp_path: Path) -> None:
    def windows(arch: str, **keys: Any) -> list[int | None]:
        model = load_model(written(tmp_path, gguf(*decoder(arch, layers=6, **keys))))
        return [layer.window for layer in model.cache_layers]

    assert windows("gemma2", attention__sliding_window=512) == [512, None] * 3
    assert windows("gemma3", attention__sliding_window=512) == [512] * 5 + [None]
    assert windows("gpt-oss", attention__sliding_window=128) == [128, None] * 3
    assert windows("phi3", attention__sliding_window=512) == [512] * 6
    assert windows("phi3", attention__sliding_window=4096) == [None] * 6  # as long as the positions
    pattern = [True, False, True, True, True, False]
    assert windows("mimo2", attention__sliding_window=64, attention__sliding_window_pattern=pattern) == [
        64 if slides else None for slides in pattern
    ]
    assert windows("qwen2", attention__sliding_window=64) == [None] * 6  # llama.cpp runs it whole
    assert windows("gemma2", context_length=8192) == [4096, None] * 3  # its width where the key is absent
    assert windows("smallthinker", attention__sliding_window=64, context_length=8192)[:2] == [None, 4096]
    assert windows("llama4", attention__sliding_window=64, context_length=16384)[:2] == [8192, 8192]
    assert windows("llama4", attention__sliding_window=0, context_length=16384) == [None] * 6
    with pytest.raises(ValueError, match=r"sliding_window_pattern is absent: this architecture must say which layers"):
        windows("mimo2", attention__sliding_window=64)
    assert not PLAIN & set(WINDOWS)


@pytest.mark.parametrize(
    ("arch", "whole"),
    [
        ("phi3", True), ("llama", True), ("qwen2", True), ("phimoe", True), ("mistral3", True), ("starcoder2", True),
        ("gemma2", False), ("gemma3", False), ("gpt-oss", False), ("olmo2", False), ("cohere2", False),
        ("exaone4", True), ("lfm2", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("listed", [False, True])
def test_llama_cpp_applies_windows_by_architecture(tmp_path: Path, arch: str, whole: bool, listed: bool) -> None:
    """A GGUF file's too, and a list of its own does not change that.  exaone4 has them in 64 layers alone."""
    keys = {"attention__sliding_window": 256, "context_length": 8192}
    keys |= {"attention__sliding_window_pattern": [True] * 64} if listed else {}  # type: ignore[dict-item]

    def taken(layers: int) -> int:
        model = load_model(written(tmp_path, gguf(*decoder(arch, layers=layers, **keys))))
        return sum(LlamaCpp().parts(model, Full(), 1, 8192).values()) // layers

    every = 8192 * 2 * 2 * 8 * 2
    assert (taken(6) == every) == whole
    if arch == "exaone4":
        assert taken(64) < every


def test_latents_states_and_shared_caches(tmp_path: Path) -> None:
    metadata, tensors = decoder("deepseek2", attention__kv_lora_rank=32, rope__dimension_count=8)
    for layer in range(4):
        del tensors[f"blk.{layer}.attn_k.weight"], tensors[f"blk.{layer}.attn_v.weight"]
        tensors[f"blk.{layer}.attn_kv_a_mqa.weight"] = ((64, 40), F16)
    model = load_model(written(tmp_path, gguf(metadata, tensors)))
    assert model.layers == (LayerShape(1, 40, 0, kind="mla"),) * 4

    ssm = {"ssm__inner_size": 128, "ssm__state_size": 16, "ssm__time_step_rank": 4, "ssm__group_count": 2}
    metadata, tensors = decoder("granitehybrid", attention__head_count_kv=[0, 2, 0, 2], **ssm)
    for layer in (0, 2):
        for name in ("q", "k", "v"):
            del tensors[f"blk.{layer}.attn_{name}.weight"]
        del tensors[f"blk.{layer}.attn_output.weight"]
        tensors[f"blk.{layer}.ssm_in.weight"] = ((64, 128), F16)
        tensors[f"blk.{layer}.ssm_conv1d.weight"] = ((4, 192), F32)
    model = load_model(written(tmp_path, gguf(metadata, tensors)))
    assert model.cache_layers == (LayerShape(2, 8, 8),) * 2
    assert model.state_layers[0].tensors == (("conv", (192, 4), "bfloat16"), ("recurrent", (4, 32, 16), "float32"))
    assert dict(model.kinds) == {"mamba2": 2, "full": 2}

    shared = decoder("gemma3n", attention__shared_kv_layers=1)
    assert dict(load_model(written(tmp_path, gguf(*shared))).kinds) == {"full": 3, "shared": 1}


def test_routed_experts_and_prediction_layers_are_told_apart(tmp_path: Path) -> None:
    metadata, tensors = decoder("qwen3moe", expert_count=4, expert_used_count=2, nextn_predict_layers=1)
    for layer in range(4):
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = ((64, 32, 4), F16)
    tensors["rope_freqs.weight"] = ((4,), F32)
    model = load_model(written(tmp_path, gguf(metadata, tensors)))
    assert model.num_layers == 3
    assert model.weights is not None
    assert (model.weights.routed, model.weights.num_experts, model.weights.experts_per_token) == (3 * 64 * 32 * 4, 4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "lama"}, "general.architecture is lama: did you mean llama"),
        ({"llama.block_count": 5}, "no tensors of block 4 of 5"),
        ({"llama.block_count": "four"}, "llama.block_count is four: a whole number is needed"),
        ({"llama.attention.head_count_kv": 4}, r"blk.0.attn_k.weight has the shape \[64, 16\]"),
        ({"llama.attention.head_count_kv": 3}, "head_count_kv is 3"),
        ({"llama.attention.head_count": 7}, "head_count"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    metadata, tensors = decoder("llama")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(written(tmp_path, gguf(metadata | change, tensors)))
    assert "\n" not in str(caught.value)


def test_a_split_model_is_read_from_its_parts(tmp_path: Path) -> None:
    metadata, tensors = decoder("llama")
    names = sorted(tensors)
    for part in (1, 2):
        chosen = {name: tensors[name] for name in names[part - 1 :: 2]}
        content = gguf((metadata if part == 1 else {}) | {"split.count": 2, "split.no": part - 1}, chosen)
        written(tmp_path, content, f"tiny-0000{part}-of-00002.gguf")
    whole = load_model(written(tmp_path, gguf(metadata, tensors), "whole.gguf"))
    (tmp_path / "whole.gguf").unlink()
    assert load_model(str(tmp_path)).weights == whole.weights
    (tmp_path / "tiny-00002-of-00002.gguf").unlink()
    with pytest.raises(ValueError, match=r"tiny-00002-of-00002.gguf is not beside it"):
        load_model(str(tmp_path))


def test_every_cut_of_a_gguf_is_one_clear_error(tmp_path: Path) -> None:
    content = gguf(*decoder("llama", layers=1))
    for size in [*range(0, 400, 7), *range(400, len(content), 997), len(content) - 1]:
        path = written(tmp_path, content[:size])
        with pytest.raises(ValueError, match="no whole GGUF file") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_corrupt_headers_are_refused_and_never_hang(tmp_path: Path) -> None:
    content = gguf(*decoder("gemma3", layers=2, attention__sliding_window=512))
    start = time.process_time()
    for _ in range(20):
        load_model(written(tmp_path, content))
    unhurt = (time.process_time() - start) / 20
    rng, start, outcomes = random.Random(0), time.process_time(), [0, 0]
    for _ in range(1500):
        hurt = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            hurt[rng.randrange(4, 1500)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path = written(tmp_path, bytes(hurt))
        try:
            load_model(path)
            outcomes[0] += 1
        except ValueError as error:
            assert "\n" not in str(error).replace("\\n", "")  # noqa: PT017
            outcomes[1] += 1
    assert min(outcomes) > 50
    assert time.process_time() - start < 1500 * 20 * unhurt


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants", reason="the gguf package is not installed")
    known = {int(kind): sizes for kind, sizes in constants.GGML_QUANT_SIZES.items()}
    assert {kind: sizes for kind, sizes in known.items() if kind in BLOCKS} == BLOCKS


def test_a_file_of_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    np = pytest.importorskip("numpy")
    writer = package.GGUFWriter(str(tmp_path / "theirs.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_head_count_kv([1, 2])
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((3, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "theirs.gguf")
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["llama.attention.head_count_kv"] == [1, 2]
    assert header.tensors["blk.0.attn_k.weight"].shape == (64, 3)
    assert header.tensors["blk.0.attn_k.weight"].nbytes == 384


def model_directory(folder: Path, rows: int = 16) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    keys = {f"model.layers.{at}.self_attn.k_proj.weight": ([rows, 64], "F16", rows * 64 * 2) for at in range(2)}
    written(
        folder, safetensors({**keys, "model.embed_tokens.weight": ([128, 64], "F8_E4M3", 8192)}), "model.safetensors"
    )
    return folder


def test_a_model_directory_weighs_its_checkpoint(tmp_path: Path) -> None:
    model = load_model(str(model_directory(tmp_path)))
    assert model.num_params
    assert model.weight_bits == 8 * (2 * 16 * 64 * 2 + 8192) / model.num_params
    assert "weights of 12,288 B in 3 tensors beside the config" in model.notes
    assert load_model(str(tmp_path / "model.safetensors")) == model
    assert model.layers == Model.from_config(CONFIG).layers


def test_a_checkpoint_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"k_proj.weight has 32 rows, config.json says kv heads x head dim = 16"):
        load_model(str(model_directory(tmp_path, rows=32)))


def test_broken_safetensors_are_one_clear_error(tmp_path: Path) -> None:
    path = model_directory(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 3, 8, 9, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="no whole safetensors file") as caught:
            load_model(str(tmp_path))
        assert "\n" not in str(caught.value)
    path.write_bytes(content.replace(b'"F16"', b'"F99"'))
    with pytest.raises(ValueError, match="unknown type 'F99'"):
        load_model(str(path))
    path.write_bytes(content)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names model-00001-of-00002.safetensors, which is not in"):
        load_model(str(tmp_path))


def test_tensor_shapes_alone_are_no_model(tmp_path: Path) -> None:
    path = model_directory(tmp_path) / "model.safetensors"
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json beside it"):
        load_model(str(path))
    with pytest.raises(ValueError, match=r"has no config.json and no GGUF file"):
        load_model(str(tmp_path))
    with pytest.raises(LookupError, match="no such file"):
        load_model(str(tmp_path / "absent.gguf"))
