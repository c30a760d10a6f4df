"""Bits a weight by group and type of scale, and the cache that a checkpoint asks for, as its config says them."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvsim.analysis.doctor import diagnose
from kvsim.cli import run
from kvsim.hardware import find_hardware
from kvsim.memory.capacity import room
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.models.quantization import cache_dtype, config_bits
from kvsim.models.weight_storage import weight_nbytes, weight_storage

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION, MLP = 2 * 256 * 256 + 2 * 64 * 256, 3 * 512 * 256
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
QUARK_FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
QUARK_MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
INT4 = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True}


def compressed(*groups: tuple[list[str], Any], **more: Any) -> dict[str, Any]:
    """A compressed-tensors config of groups ``(targets, weights)``."""
    rows = {f"group_{at}": {"targets": targets, "weights": weights} for at, (targets, weights) in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "config_groups": rows, **more}


def bits_of(quantization: dict[str, Any], **more: Any) -> float | None:
    return Model.from_config(CONFIG | more | {"quantization_config": quantization}).weight_bits


@pytest.mark.parametrize(
    ("weights", "more", "bits"),
    [
        (NVFP4, {"format": "nvfp4-pack-quantized"}, 4 + 8 / 16),
        (NVFP4, {}, 4 + 8 / 16),
        ({"num_bits": 4, "type": "float", "group_size": 32}, {"format": "mxfp4-pack-quantized"}, 4 + 8 / 32),
        ({"num_bits": 8, "type": "float", "group_size": 32}, {"format": "mxfp8-quantized"}, 8 + 8 / 32),
        (NVFP4 | {"scale_dtype": "torch.float32"}, {}, 4 + 32 / 16),
        ({"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}, {}, 4 + 8 / 32),
        (INT4, {"format": "pack-quantized"}, 4 + 16 / 128),
        (INT4 | {"symmetric": False}, {"format": "pack-quantized"}, 4 + (16 + 4) / 128),
        (INT4 | {"group_size": -1}, {}, 4),
        (FP8, {"format": "float-quantized"}, 8),
        (FP8 | {"strategy": "block", "block_structure": [128, 128]}, {}, 8 + 16 / 128**2),
    ],
)
def test_bits_follow_group_and_type_of_scale(weights: dict[str, Any], more: dict[str, Any], bits: float) -> None:
    assert bits_of(compressed((["Linear"], weights), **more)) == bits
    assert bits_of(compressed((["Linear"], weights), ignore=["lm_head", "re:.*vision.*"], **more)) == bits


def test_mixed_groups_are_each_counted_by_its_own() -> None:
    mixed = (FP8, ATTENTION, 8), (NVFP4, MLP, 4.5)
    mean = sum(count * bits for _, count, bits in mixed) / (ATTENTION + MLP)
    for attention in (["re:.*self_attn.*"], [f"model.layers.{at}.self_attn" for at in range(4)]):
        both = compressed((attention, FP8), (["re:.*mlp.*"], NVFP4), format="mixed-precision")
        assert bits_of(both) == pytest.approx(mean)
        assert bits_of(compressed((["Linear"], NVFP4), (attention, FP8))) == pytest.approx(mean)  # names come first
    assert bits_of(compressed((["re:.*self_attn.*"], FP8), (["re:.*mlp.*"], FP8))) == 8
    down = compressed((["re:.*down_proj$"], FP8), (["Linear"], NVFP4))
    assert bits_of(down) == pytest.approx((ATTENTION * 4.5 + MLP * (2 * 4.5 + 8) / 3) / (ATTENTION + MLP))
    first = compressed((["re:.*layers\\.0\\..*"], FP8), (["Linear"], NVFP4))
    assert bits_of(first) == pytest.approx((8 + 3 * 4.5) / 4)
    model = Model.from_config(CONFIG | {"quantization_config": both})
    assert any("the mean over its groups" in note for note in model.notes)
    layers = int(4 * (ATTENTION * 8 + MLP * 4.5) / 8)
    norms = 9 * 256
    space = room(model, find_hardware("h100-sxm"))
    assert space.weight_nbytes == pytest.approx(layers + norms * mean / 8 + 2 * 1000 * 256 * 2, rel=1e-6)


def test_what_a_quantization_leaves_out_keeps_16_bits() -> None:
    left = compressed((["Linear"], NVFP4), ignore=["lm_head", "re:.*self_attn.*"])
    assert bits_of(left) == pytest.approx((ATTENTION * 16 + MLP * 4.5) / (ATTENTION + MLP))
    one = compressed((["Linear"], NVFP4), ignore=["model.layers.0.mlp.down_proj"])
    matrix = MLP / 3
    assert bits_of(one) == pytest.approx(4.5 + 11.5 * matrix / (4 * (ATTENTION + MLP)))
    only = compressed((["re:.*mlp.*"], FP8))
    assert bits_of(only) == pytest.approx((ATTENTION * 16 + MLP * 8) / (ATTENTION + MLP))


def test_experts_are_a_group_of_their_own() -> None:
    """Mixtral's names and Qwen's mean the same matrices."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral"}
    routed = 4 * MLP
    for targets in (["re:.*block_sparse_moe.experts.*"], ["re:.*mlp.experts.*"]):
        bits = bits_of(compressed((targets, NVFP4), (["re:.*self_attn.*"], FP8), ignore=["re:.*gate$"]), **sizes)
        router = 4 * 256
        assert bits == pytest.approx((routed * 4.5 + ATTENTION * 8 + router * 16) / (routed + ATTENTION + router))


@pytest.mark.parametrize(
    "quantization",
    [
        compressed((["re:.*tower.*"], FP8)),
        compressed((["re:("], FP8)),
        compressed((["re:(a+)+$"], FP8), (["Linear"], NVFP4)),
        compressed((["re:" + ".*" * 40 + "x"], FP8), (["Linear"], NVFP4)),
        compressed((["Linear"], {"num_bits": "4"})),
        compressed(),
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
    ],
)
def test_groups_that_are_not_understood_are_refused_not_guessed(quantization: dict[str, Any]) -> None:
    model = Model.from_config(CONFIG | {"quantization_config": quantization})
    assert model.weight_bits is None
    with pytest.raises(ValueError, match="its quantization_config is not known here, give --weight-bits"):
        room(model, find_hardware("h100-sxm"))


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, 4.5),
        ({"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "NVFP4"}}, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 64}, 4.25),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, 8.25),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}, 4.5),
        ({"quant_method": "compressed_tensors", "config_groups": {"a": {"weights": NVFP4}}}, 4.5),
        ({"quant_method": "quark", "global_quant_config": {"weight": QUARK_FP8}, "exclude": ["lm_head"]}, 8),
        ({"quant_method": "quark", "global_quant_config": {"weight": [QUARK_FP8, {"dtype": "int4"}]}}, 4),
        ({"quant_method": "quark", "global_quant_config": {"weight": QUARK_MXFP4}}, 4.25),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 64}}, 4.5),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}}, 4.25),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, 4.5),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"},
            4 + 20 / 128,
        ),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}, 4.25),
        ({"quant_method": "bitnet", "quantization_mode": "offline"}, 2),
        ({"quant_method": "bitnet", "quantization_mode": "online"}, 16),
        ({"quant_method": "exl3", "bits": 3.5, "head_bits": 6}, 3.5),
        ({"quant_method": "exl2", "bits": 4.25}, 4.25),
        ({"quant_method": "quanto", "weights": "int8"}, 8),
        ({"quant_method": "quanto", "weights": "int4"}, 4 + 32 / 128),
        ({"quant_method": "eetq"}, 8),
        ({"group_size": 64, "bits": 4}, 4.5),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, 4.25),
    ],
)
def test_other_methods_by_their_own_scales(quantization: dict[str, Any], bits: float) -> None:
    assert config_bits(quantization) == bits_of(quantization) == bits


def test_layers_that_a_library_leaves_or_stores_otherwise() -> None:
    one = {"model.layers.0.mlp.down_proj": {"bits": 16}}
    rounded = {"quant_method": "auto-round", "bits": 4, "group_size": -1, "extra_config": one}
    matrix, whole = MLP / 3, 4 * (ATTENTION + MLP)
    assert bits_of(rounded) == pytest.approx(4 + 12 * matrix / whole)
    mlx = {"group_size": 64, "bits": 4, "model.layers.0.mlp.down_proj": False}
    assert bits_of(mlx) == pytest.approx(4.5 + 11.5 * matrix / whole)
    mlx["model.layers.0.mlp.down_proj"] = {"group_size": 64, "bits": 8}  # type: ignore[assignment]
    assert bits_of(mlx) == pytest.approx(4.5 + 4 * matrix / whole)
    assert Model.from_config(CONFIG | {"quantization": mlx}).weight_bits == bits_of(mlx)
    skipped = {"quant_method": "torchao", "quant_type": "int8_weight_only", "modules_to_not_convert": ["self_attn"]}
    assert bits_of(skipped) == pytest.approx((ATTENTION * 16 + MLP * 8) / (ATTENTION + MLP))
    layers = {"*self_attn*": {"weight": QUARK_FP8}}
    quark = {"quant_method": "quark", "global_quant_config": {"weight": QUARK_MXFP4}, "layer_quant_config": layers}
    assert bits_of(quark) == pytest.approx((ATTENTION * 8 + MLP * 4.25) / (ATTENTION + MLP))


def test_aqlm_has_a_codebook_a_matrix() -> None:
    """2-bit vectors of 8 weights, and 2^8 entries of 8 values in 16 bits for each of 28 matrices."""
    sizes = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8}
    books = 28 * 2 * 256 * 8 * 16
    assert bits_of({"quant_method": "aqlm", **sizes}) == pytest.approx(2 + books / (4 * (ATTENTION + MLP)))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "torchao", "quant_type": "uintx_weight_only"},
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "bfp16"}}},
        {"quant_method": "exl3"},
        {"quant_method": "hqq"},
        {"quant_method": "aqlm", "num_codebooks": 1},
        {"quant_method": "vptq"},
    ],
)
def test_settings_that_a_library_does_not_tell_are_refused(quantization: dict[str, Any]) -> None:
    model = Model.from_config(CONFIG | {"quantization_config": quantization})
    assert model.weight_bits is None
    with pytest.raises(ValueError, match="its quantization_config is not known here, give --weight-bits"):
        room(model, find_hardware("h100-sxm"))


def test_experts_have_bits_of_their_own() -> None:
    """DeepSeek-V4's are FP4 in an FP8 checkpoint; Kimi-K2.5's are int4 and the rest of its layers 16 bits, which makes
    the 594 GB that are published."""
    for name, dense, routed, total in (
        ("deepseek-v4-flash", 8, 4.25, 155.5),
        ("kimi-k2.5", 16, 4.5, 594.2),
        ("deepseek-v3", 8, 8, 672.9),
    ):
        model = load_model(name)
        storage = weight_storage(model)
        assert storage.dense == pytest.approx(dense, rel=3e-3)
        assert storage.routed == routed
        assert weight_nbytes(model) / 1e9 == pytest.approx(total, abs=0.1)
        assert weight_storage(model, 6.0).routed == weight_storage(model, 6.0).dense == 6


def test_modelopt_layers_of_several_kinds() -> None:
    rows = {f"model.layers.{at}.self_attn.{name}_proj": {"quant_algo": "FP8"} for at in range(4) for name in "qkvo"}
    rows |= {
        f"model.layers.{at}.mlp.{name}_proj": {"quant_algo": "NVFP4", "group_size": 16}
        for at in range(4)
        for name in ("gate", "up", "down")
    }
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": rows}
    assert bits_of(mixed) == pytest.approx((ATTENTION * 8 + MLP * 4.5) / (ATTENTION + MLP))
    left = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head", "*self_attn*"]}
    assert bits_of(left) == pytest.approx((ATTENTION * 16 + MLP * 4.5) / (ATTENTION + MLP))


@pytest.mark.parametrize(
    "compression",
    [
        compressed((["Linear"], FP8), format="float-quantized"),
        {key: value for key, value in compressed((["Linear"], FP8)).items() if key != "quant_method"},
        {"quantization_config": compressed((["Linear"], FP8)), "sparsity_config": {"format": "dense"}},
    ],
)
def test_compression_config_is_the_older_name(compression: dict[str, Any]) -> None:
    model = Model.from_config(CONFIG | {"compression_config": compression})
    assert (model.weight_bits, model.source("weight_bits")) == (8, "compression_config")
    plain = {key: value for key, value in CONFIG.items() if key != "compression_config"}
    space, wide = (room(each, find_hardware("h100-sxm")) for each in (model, Model.from_config(plain)))
    assert wide.weight_nbytes - space.weight_nbytes == 4 * (ATTENTION + MLP) + 9 * 256  # head and embedding keep 16
    wrapped = {"model_type": "llava", "text_config": CONFIG, "compression_config": compression}
    assert Model.from_config(wrapped).weight_bits == 8


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (compressed((["Linear"], FP8), kv_cache_scheme=SCHEME), "fp8"),
        (compressed((["Linear"], FP8), kv_cache_scheme=None), None),
        (compressed((["Linear"], FP8), kv_cache_scheme=SCHEME | {"num_bits": 4}), None),
        (compressed((["Linear"], FP8), kv_cache_scheme=SCHEME | {"type": "int"}), None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "fp8"}}, "fp8"),
        ({"quant_method": "modelopt_fp4", "kv_cache_scheme": SCHEME}, "fp8"),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "nvfp4"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "MIXED_PRECISION"}, None),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": None}, None),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": ["FP8"]}, None),
        ({"quant_method": "fp8", "kv_cache_scheme": SCHEME}, None),
    ],
)
def test_the_cache_that_a_checkpoint_asks_for(quantization: dict[str, Any], dtype: str | None) -> None:
    assert cache_dtype(quantization)[0] == dtype
    model = Model.from_config(CONFIG | {"quantization_config": quantization})
    assert model.cache_dtype == dtype
    assert bool(model.source("cache_dtype")) == (dtype is not None)
    unknown = any("a type of cache that vLLM does not have" in note for note in model.notes)
    scheme = quantization.get("kv_cache_scheme")
    assert unknown == (dtype is None and isinstance(scheme, dict) and quantization["quant_method"] != "fp8")


def first_row(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], list[str]]:
    """The first row and the notes of an estimate."""
    assert run(["estimate", "--ctx", "4k", "--json", *arguments]) == 0
    out = json.loads(capsys.readouterr().out)
    return out["rows"][0], out["notes"]


def test_auto_is_the_checkpoints_own_cache_under_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """512 bytes a token: 4 layers of 2 heads of 32, keys and values, one byte each (vllm#57126, #34953)."""
    scheme = CONFIG | {"quantization_config": compressed((["Linear"], FP8), kv_cache_scheme=SCHEME)}
    (tmp_path / "config.json").write_text(json.dumps(scheme))
    model = ["--model", str(tmp_path)]
    for flags in (["--engine", "vllm"], ["--engine", "vllm", "--kv-cache-dtype", "auto"], ["--kv-cache-dtype", "auto"]):
        row, notes = first_row(capsys, *model, *flags)
        assert (row["method"], row["read_nbytes_per_token"]) == ("fp8", 512)
        assert row["parts"]["key_codes"] + row["parts"]["value_codes"] == 512 * 4096
        assert "--kv-cache-dtype auto is fp8: quantization_config.kv_cache_scheme" in notes
    for flags in (
        ["--engine", "vllm", "--method", "bf16"],
        ["--engine", "transformers", "--kv-cache-dtype", "auto"],
        [],
    ):
        row, notes = first_row(capsys, *model, *flags)
        assert row["read_nbytes_per_token"] == 1024
        assert not any("auto is" in note for note in notes)
    pytest.importorskip("numpy")
    plan = ["plan", *model, "--gpu", "h100-sxm:1", "--users", "2", "--engine", "vllm", "--kv-cache-dtype", "auto"]
    assert run([*plan, "--input-len", "128", "--output-len", "64", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in out["rows"]} == {"fp8"}
    assert any("auto is fp8" in note for note in out["notes"])


@pytest.mark.parametrize("own", [None, {"quant_method": "modelopt", "quant_algo": "FP8"}])
def test_modelopts_own_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], own: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | ({"quantization_config": own} if own else {})))
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(told))
    for path in (tmp_path, tmp_path / "config.json"):
        row, notes = first_row(capsys, "--model", str(path), "--engine", "vllm")
        assert (row["method"], row["read_nbytes_per_token"]) == ("fp8", 512)
        assert "--kv-cache-dtype auto is fp8: quantization_config.kv_cache_quant_algo" in notes
        assert load_model(str(path)).weight_bits == 8
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"hf_quant_config.json holds a JSON list"):
        load_model(str(tmp_path))
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": 1}')
    with pytest.raises(ValueError, match=r"hf_quant_config.json has no object quantization"):
        load_model(str(tmp_path))


def test_the_doctor_reads_auto_likewise() -> None:
    scheme = CONFIG | {"quantization_config": compressed((["Linear"], FP8), kv_cache_scheme=SCHEME)}
    log = (
        "INFO Initializing a V1 LLM engine (v0.19.0) with config: model='x', dtype=torch.bfloat16, "
        "kv_cache_dtype=auto\n"
        "INFO Available KV cache memory: 1.00 GiB\nINFO GPU KV cache size: 2,097,152 tokens\n"
    )
    tokens = next(row for row in diagnose(log, Model.from_config(scheme)).findings if row.what == "KV cache size")
    assert tokens.predicted == 2097152
