"""Which files of a directory hold the weights, and which files are refused: one line each."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from weight_files import CONFIG, Q8_0, decoder, gguf, safetensors, written

from kvsim.cli import run
from kvsim.commands.doctor import command as doctor
from kvsim.hardware import find_hardware
from kvsim.latency.profile import load_profile
from kvsim.memory.capacity import room
from kvsim.models.gguf import read_header
from kvsim.models.load import load_model, read_config
from kvsim.models.safetensors import read_tensors, weight_files
from kvsim.regular_files import read_text
from kvsim.specs import parse_lengths

LAYERS = {f"model.layers.{at}.self_attn.k_proj.weight": ([16, 64], "F16", 2048) for at in range(2)}
TABLE = {"model.embed_tokens.weight": ([128, 64], "F16", 16384)}
OWN = {"layers.0.attention.wk.weight": ([16, 64], "F16", 2048), "tok_embeddings.weight": ([128, 64], "F16", 16384)}
LORA = {"base.q_proj.lora_A.weight": ([8, 64], "F32", 2048)}
WHOLE = safetensors(LAYERS | TABLE)
NBYTES = 2 * 2048 + 16384


def directory(folder: Path, **files: bytes | dict[str, Any]) -> Path:
    """A model directory of the small config; ``__`` in a name stands for a full stop, ``_of_`` for ``-of-``."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".").replace("_of_", "-of-").replace("_0", "-0")).write_bytes(data)
    return folder


def counted(folder: Path) -> int:
    """Bytes of the weights as the model's own bits give them."""
    model = load_model(str(folder))
    assert model.num_params
    assert model.weight_bits
    return round(model.num_params * model.weight_bits / 8)


INDEX = {"weight_map": dict.fromkeys(LAYERS, "a.safetensors") | dict.fromkeys(TABLE, "b.safetensors")}


@pytest.mark.parametrize(
    "files",
    [
        {"model__safetensors": WHOLE},
        {"model__safetensors": WHOLE, "consolidated__safetensors": safetensors(OWN)},
        {"model__safetensors": WHOLE, "adapter_model__safetensors": safetensors(LORA)},
        {"model__safetensors": WHOLE, "optimizer__safetensors": safetensors(LORA)},
        {"model__safetensors": WHOLE, "model_00001_of_00002__safetensors": safetensors(LAYERS)},
        {
            "model_00001_of_00002__safetensors": safetensors(LAYERS),
            "model_00002_of_00002__safetensors": safetensors(TABLE),
            "consolidated_00001_of_00001__safetensors": safetensors(OWN),
        },
        {
            "a__safetensors": safetensors(LAYERS),
            "b__safetensors": safetensors(TABLE),
            "c__safetensors": safetensors(OWN),
            "model__safetensors__index__json": INDEX,
        },
        {"consolidated__safetensors": WHOLE},
        {"consolidated__safetensors": WHOLE, "adapter_model__safetensors": safetensors(LORA)},
        {"gptq_model-4bit-128g__safetensors": WHOLE, "consolidated__safetensors": safetensors(OWN)},
        {"model__safetensors": WHOLE, "model__safetensors__part": b"left behind"},
    ],
)
def test_weights_are_the_files_that_a_loader_takes(tmp_path: Path, files: dict[str, Any]) -> None:
    assert counted(directory(tmp_path, **files)) == NBYTES


def test_an_adapter_alone_is_no_weight(tmp_path: Path) -> None:
    folder = directory(tmp_path, adapter_model__safetensors=safetensors(LORA))
    assert weight_files(folder) == {}
    assert load_model(str(folder)).weight_bits == 16  # of the config's type


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model_00001_of_00002__safetensors": WHOLE}, "model-00002-of-00002.safetensors: half a download"),
        ({"model_00002_of_00002__safetensors": WHOLE}, "model-00001-of-00002.safetensors: half a download"),
        ({"consolidated_00001_of_00002__safetensors": WHOLE}, "consolidated-00002-of-00002.safetensors: half a"),
        (
            {
                "model_00001_of_00001__safetensors": WHOLE,
                "model_00001_of_00002__safetensors": WHOLE,
                "model_00002_of_00002__safetensors": WHOLE,
            },
            "has parts of 1 and of 2",
        ),
        ({"model__safetensors__part": WHOLE}, "model.safetensors.part is half a download"),
        ({"model__safetensors__incomplete": WHOLE}, "model.safetensors.incomplete is half a download"),
        ({"model__safetensors": WHOLE, "model__safetensors__aria2": b""}, "model.safetensors.aria2 is half a download"),
        ({"a__safetensors": WHOLE, "model__safetensors__index__json": INDEX}, "names b.safetensors, which is not in"),
        (
            {
                "a__safetensors": safetensors(LAYERS),
                "b__safetensors": safetensors(LORA),
                "model__safetensors__index__json": INDEX,
            },
            "'model.embed_tokens.weight' is in b.safetensors, which does not",
        ),
        (
            {"model__safetensors__index__json": {"weight_map": {"a": "../a.safetensors"}}},
            "'../a.safetensors': allowed are",
        ),
        ({"model__safetensors__index__json": {"weight_map": {"a": "/a.safetensors"}}}, "'/a.safetensors': allowed are"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "b/../../a"}}}, "'b/../../a': allowed are"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "x\n"}}}, r"'x\\n': allowed are"),
        ({"model__safetensors__index__json": {"weight_map": {"a": 1}}}, "is no index of safetensors files"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "x" * 9999}}}, "allowed are files of its own"),
    ],
)
def test_half_a_download_and_paths_elsewhere_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(directory(tmp_path, **files)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_directory_of_gguf_files_is_its_model(tmp_path: Path) -> None:
    content = gguf(*decoder("llama"))
    metadata, _ = decoder("llama")
    written(tmp_path, content, "model-Q8_0.gguf")
    alone = load_model(str(tmp_path))
    written(tmp_path, gguf({"general.architecture": "clip"}, {}), "mmproj-model-f16.gguf")
    written(tmp_path, gguf(metadata | {"general.type": "adapter"}, {}), "french.gguf")
    written(tmp_path, gguf({"general.type": "imatrix"}, {}), "weights-of-use.gguf")
    assert load_model(str(tmp_path)) == alone
    written(tmp_path, content, "model-F16.gguf")
    with pytest.raises(ValueError, match="has 2 GGUF models: name one"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-00002-of-00003.gguf", "tiny-00002-of-00003.gguf and not tiny-00001-of-00003.gguf: half a download"),
        ("tiny.gguf.part", "tiny.gguf.part is half a download"),
    ],
)
def test_half_a_gguf_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    written(tmp_path, gguf(*decoder("llama")), name)
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter: give the model that it is for"):
        load_model(str(tmp_path))


def test_the_bytes_of_a_file_are_the_bytes_on_the_card(tmp_path: Path) -> None:
    """The mean over all tensors holds for embedding and head too: they are not counted at 16 bits once more."""
    metadata, tensors = decoder("llama")
    tensors["output.weight"] = ((64, 128), Q8_0)
    path = written(tmp_path, gguf(metadata, tensors))
    nbytes = sum(tensor.nbytes for tensor in read_header(Path(path)).tensors.values())
    card = find_hardware("h100-sxm")
    assert abs(room(load_model(path), card).weight_nbytes - nbytes) <= 1
    quantized = {name: (shape, "U8", 1024) for name, (shape, _, _) in LAYERS.items()}
    folder = directory(tmp_path, model__safetensors=safetensors(TABLE | {**quantized}))
    assert abs(room(load_model(str(folder)), card).weight_nbytes - (16384 + 2048)) <= 1


def refused(call: Callable[[], Any], message: str) -> None:
    """One clear line of bounded length; what would be read for ever hangs here."""
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def header(text: str, data: int = 0) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + b"\0" * data


def tensor(name: str, start: int, end: int, shape: str | None = None) -> str:
    return f'"{name}":{{"dtype":"U8","shape":{shape or [end - start]},"data_offsets":[{start},{end}]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            header("{" + tensor("a", 0, 4) + "," + tensor("b", 2, 6) + "}", 6),
            "'b' overlaps the one before it, at byte 2",
        ),
        (
            header("{" + tensor("a", 0, 4) + "," + tensor("b", 0, 4) + "}", 4),
            "'b' overlaps the one before it, at byte 0",
        ),
        (header("{" + tensor("a", 0, 4) + "," + tensor("b", 6, 8) + "}", 8), "'b' leaves a hole before it, at byte 6"),
        (header("{" + tensor("a", 0, 4) + "}", 9), "5 bytes behind its last tensor"),
        (header("{" + tensor("a", 0, 4) + "," + tensor("a", 4, 8) + "}", 8), "its header has 'a' twice"),
        (
            header('{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4),
            "its header has 'dtype' twice",
        ),
        (
            header('{"__metadata__":{"format":1},' + tensor("a", 0, 4) + "}", 4),
            "its __metadata__ is not an object of texts",
        ),
        (header("{" + tensor("a", 0, 1, str([1] * 40_000)) + "}", 1), "'a' of 40,000 axes, allowed are up to 8"),
        (header("{" + tensor("a", 0, 1, "[" + "9" * 2_000_000 + "]") + "}", 1), "its header is not JSON"),
        (header("{" + tensor("a", 0, 1, "[" + "9" * 4_000 + "]") + "}", 1), "not described by a shape"),
        (header('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', 1), r"of \[3\] F4 takes 1 bytes"),
        (header("{" + tensor("n" * 900_000, 0, 4, "[5]") + "}", 4), "takes 4 bytes"),
        (len("{}".encode("utf-16")).to_bytes(8, "little") + "{}".encode("utf-16"), "its header is not JSON"),
    ],
)
def test_headers_that_safetensors_forbids_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = Path(written(tmp_path, content, "model.safetensors"))
    refused(lambda: read_tensors(path), message)


def offset_of(content: bytes, name: str) -> int:
    """Where the offset of a matrix stands."""
    return content.index(name.encode()) + len(name) + 4 + 2 * 8 + 4


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "at offset 0, the one before makes it"),
        (1, "at offset 1, the one before"),
        (1 << 40, "the one before makes"),
    ],
)
def test_offsets_that_gguf_forbids_are_refused(tmp_path: Path, offset: int, message: str) -> None:
    content = gguf(*decoder("llama"))
    at = offset_of(content, "blk.1.attn_k.weight")
    hurt = content[:at] + struct.pack("<Q", offset) + content[at + 8 :]
    refused(lambda: read_header(Path(written(tmp_path, hurt))), message)


def test_duplicate_names_of_a_gguf_are_refused(tmp_path: Path) -> None:
    content = gguf(*decoder("llama"))
    tensors = content.replace(b"blk.1.attn_k.weight", b"blk.1.attn_v.weight")
    refused(lambda: read_header(Path(written(tmp_path, tensors))), "tensor 'blk.1.attn_v.weight' for the second time")
    entries = gguf({"a": 1, "b": 2}, {}).replace(b"\x01\0\0\0\0\0\0\0b", b"\x01\0\0\0\0\0\0\0a")
    refused(lambda: read_header(Path(written(tmp_path, entries))), "entry 'a' for the second time")


@pytest.mark.parametrize("count", ["3", [3], True, -1, 10_000])
def test_a_split_count_is_a_whole_number(tmp_path: Path, count: Any) -> None:
    metadata, tensors = decoder("llama")
    raw = gguf(metadata | {"split.count": 7 if count == -1 else count}, tensors)
    if count == -1:
        raw = raw.replace(b"split.count" + struct.pack("<II", 4, 7), b"split.count" + struct.pack("<Ii", 5, -1))
    refused(
        lambda: load_model(written(tmp_path, raw)), r"GGUF key split.count is .*: allowed are whole numbers to 9999"
    )


def test_parts_of_other_models_are_refused(tmp_path: Path) -> None:
    metadata, tensors = decoder("llama")
    for part, told in ((1, {"split.count": 2, "split.no": 0}), (2, {"split.count": 3, "split.no": 1})):
        written(tmp_path, gguf(metadata | told, tensors), f"tiny-0000{part}-of-00002.gguf")
    refused(lambda: load_model(str(tmp_path)), "does not say of itself that it is part 2 of 2")
    written(tmp_path, gguf(metadata | {"split.count": 2, "split.no": 1}, tensors), "tiny-00002-of-00002.gguf")
    refused(lambda: load_model(str(tmp_path)), "is in another part too")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": ["llama", "llama"]}, r"general.architecture is \['llama', 'llama'\]: known are"),
        ({"general.architecture": 7}, "general.architecture is 7: known are"),
        ({"general.architecture": "lla\nma"}, "general.architecture is lla ma: did you mean llama"),
        ({"llama.block_count": [4, 4]}, r"llama.block_count is \[4, 4\]: a whole number is needed"),
        ({"llama.attention.head_count_kv": ["2"] * 4}, "head_count_kv is .*: allowed are 4 whole numbers"),
        ({"general.alignment": 48}, "general.alignment 48, which is no power of 2"),
    ],
)
def test_metadata_of_other_types_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    metadata, tensors = decoder("llama")
    refused(lambda: load_model(written(tmp_path, gguf(metadata | change, tensors))), message)


def test_a_sparse_gguf_of_endless_texts_is_refused(tmp_path: Path) -> None:
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    for kind, entries in ((8, 1 << 26), (8, 1 << 22), (9, 4097)):
        path = Path(written(tmp_path, start + struct.pack("<IIQ", 9, kind, entries)))
        os.truncate(path, 1 << 32)  # zeros that take no room: texts of no length, arrays of no entries
        refused(lambda path=path: read_header(path), "no whole GGUF file")  # type: ignore[misc]
    path = Path(written(tmp_path, b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 31)))
    os.truncate(path, 1 << 32)
    refused(lambda: read_header(path), "bytes of a name are announced, allowed are 65,536")


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    for name in ("model.safetensors", "a.gguf"):
        os.mkfifo(tmp_path / name)
    refused(lambda: load_model(str(tmp_path)), "a.gguf is not a regular file")
    refused(lambda: read_header(tmp_path / "a.gguf"), "is not a regular file")
    refused(lambda: read_tensors(tmp_path / "model.safetensors"), "is not a regular file")
    refused(lambda: load_model(str(directory(tmp_path))), "model.safetensors is not a regular file")
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    refused(lambda: load_model(str(tmp_path)), "index.json is not a regular file")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    refused(lambda: load_model(str(tmp_path)), "model.safetensors is not a regular file")
    for read in (read_text, read_config, load_profile, lambda path: parse_lengths(str(path), 1)):
        for path in (Path("/dev/zero"), tmp_path / "a.gguf"):
            refused(lambda read=read, path=path: read(path), "is not a regular file")  # type: ignore[misc]
    for arguments in (["--log", "/dev/zero"], ["--log", str(tmp_path / "a.gguf")]):
        result = CliRunner().invoke(doctor, arguments)
        assert isinstance(result.exception, ValueError)
        assert "is not a regular file" in str(result.exception)


def test_files_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    for read in (read_text, read_config, load_profile, lambda path: parse_lengths(str(path), 1)):
        refused(lambda read=read: read(path), r"1,099,511,627,776 bytes: allowed are up to")  # type: ignore[misc]


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--profile", "/dev/zero"],
        ["plan", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--users", "1", "--lengths", "/dev/zero"],
        ["doctor", "--log", "/dev/zero"],
        ["estimate", "--model", "/dev/zero"],
    ],
)
def test_commands_refuse_devices_with_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpy")
    assert run(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
