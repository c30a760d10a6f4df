"""From a name to a model: a catalogue name, a config.json, a model directory, a GGUF file, or a hub id."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvsim import catalog
from kvsim.models.model import Model
from kvsim.models.quantization import quant_method
from kvsim.regular_files import read_text, short

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_SECONDS = 5
FP8 = {"quant_method": "fp8"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
ROUNDED = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
MXFP4 = {"quant_method": "mxfp4"}


def _whole(bits: int, **more: Any) -> dict[str, Any]:
    """llm-compressor's integers, a scale a channel (``group_size`` else), symmetric."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"all": {"targets": ["Linear"], "weights": weights}}}


QUANTIZED: Mapping[str, Mapping[str, Any]] = {
    r"-fp8(-kv|-dynamic|-block)?|-fp8-static(-per-?tensor)?": FP8,
    r"-quantized\.w8a8|-quantized\.w8a16": _whole(8),
    r"-quantized\.w4a16": _whole(4, group_size=128),
    r"-(nvfp4|fp4)(-v\d)?": NVFP4,
    r"-mxfp4(-preview)?": MXFP4,
    r"-awq(-int4|-4bit)?": AWQ,
    r"-int4-(auto-?round|inc)": ROUNDED,
    r"-gptq-int8": {**GPTQ, "bits": 8},
    r"-gptq(-int4|-4bit)?": GPTQ,
    r"-unsloth-bnb-4bit": {"quant_method": "bitsandbytes"},
    r"-(bnb|nf4)-4bit|-bnb-nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    r"(-qat)?(-q\d[\w]*)?-gguf(:[\w.-]+)?": {"quant_method": "gguf"},
    r"(-mlx)?-(3|4|5|6|8)bit(-mlx)?": {"bits": 0, "group_size": 64},
    r"-exl[23]": {"quant_method": "exl3"},
    r"-aqlm-[\w-]+": {"quant_method": "aqlm"},
}
"""How a checkpoint's name ends whose weights are quantized, and the ``quantization_config`` of such checkpoints.

The first that fits counts.  Of a repository of GGUF files each has bits of its own; of those of unsloth's mixed ones,
ExLlama and AQLM only the checkpoint tells.  MLX's bits are in its name.
"""
MIRRORS = ("bartowski", "lmstudio-community", "mlx-community", "neuralmagic", "nvidia", "redhatai", "unsloth")
"""Who publishes others' models again under the same names, as they are."""
Named = tuple[catalog.Row, Model]
"""A row of the catalogue, and its model."""
ASIDE = re.compile(r"[\s_:-]+")
"""What spellings differ in: ``qwen3:32b``, ``phi4``."""


def known_row(name: str) -> catalog.Row | None:
    """The catalogue's row under ``name``, its dashes, underscores and colons left out of account where none is so
    written (``llama3.1:8b``, ``phi4``); ``None`` where there is none."""
    row = catalog.find("models", name)
    if row is None and "/" not in name and (wanted := ASIDE.sub("", name.lower())):
        rows = (row for row in catalog.rows("models") if wanted in (ASIDE.sub("", one) for one in catalog.names(row)))
        row = next(rows, None)
    return row


def load_model(name: str) -> Model:
    """The model that ``name`` means: the catalogue first, then a path, then a quantized checkpoint of a model of the
    catalogue, then the model hub.

    A path is a config.json, a model directory (its safetensors' headers weigh the weights), a GGUF file, which is
    enough by itself, or a safetensors file with its config.json beside it.  Raises ``LookupError`` for an unknown
    name and ``ValueError`` for a file that is no model.
    """
    row = known_row(name)
    if row is not None:
        return Model.from_config(row["config"], row["id"])
    if not name.strip():
        raise LookupError("model '': allowed are a name of `kvsim models`, a config.json, a model directory, a hub id")
    path = Path(name)
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _file(path)
    if path.exists():
        raise ValueError(f"model {name}: neither a file nor a directory")
    if path.suffix in (".json", ".gguf", ".safetensors") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LookupError(f"no such file or directory: {name}")
    named = _quantized(name) or _mirrored(name)
    return named[1] if named is not None else Model.from_config(_hub_config(name), name)


def named_model(name: str) -> Named:
    """The catalogue's row that a name means, quantized and republished ones too, and its model under that name.

    Raises ``LookupError`` for any other.
    """
    row = known_row(name)
    found = (row, Model.from_config(row["config"], row["id"])) if row is not None else None
    found = found or _quantized(name) or _mirrored(name)
    if found is None:
        raise LookupError(catalog.unknown("models", "model", name, "kvsim models"))
    return found


def _quantized(name: str) -> Named | None:
    """The catalogue's model under a name that adds how its weights are quantized, whoever published that."""
    for ending, config in QUANTIZED.items():
        found = re.search(f"(?:{ending})$", name.lower())
        if found is None:
            continue
        plain = name[: found.start()]
        row = catalog.find("models", plain) or known_row(plain.rsplit("/", 1)[-1])
        if row is None or (config is FP8 and "quantization_config" in row["config"]):  # it has 8 bits or fewer
            return None
        if "bits" in config and not config["bits"]:
            config = {**config, "bits": int(next(filter(str.isdecimal, found[0])))}
        return _described(row, name, config)
    return None


def _described(row: catalog.Row, name: str, quantization: Mapping[str, Any]) -> Named:
    """The row's model with its weights quantized so, and a note."""
    model = Model.from_config({**row["config"], "quantization_config": quantization}, name)
    bits = "bits that the name does not tell" if model.weight_bits is None else f"{model.weight_bits:g} bits"
    note = f"layers of {row['id']}, quantized weights of {bits}, by the name {name}"
    return row, replace(model, notes=(*model.notes, note))


def _mirrored(name: str) -> Named | None:
    """The catalogue's model that another publisher has under its name."""
    owner, _, own = name.partition("/")
    row = known_row(own) if owner.lower() in MIRRORS else None
    if row is None:
        return None
    model = Model.from_config(row["config"], name)
    return row, replace(model, notes=(*model.notes, f"layers and weights of {row['id']}, by the name {name}"))


def load_config(name: str) -> tuple[str, dict[str, Any]]:
    """``(title, config)`` of a catalogue name, a config.json, a model directory or a hub id, unparsed.

    Raises as :func:`load_model` does.
    """
    row = known_row(name)
    if row is not None:
        return row["id"], row["config"]
    path = Path(name)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise ValueError(f"model directory {name} has no config.json")
        return path.resolve().name, read_config(file)
    if path.is_file():
        return name, read_config(path)
    if path.suffix == ".json" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise LookupError(f"no such file or directory: {name}")
    return name, _hub_config(name)


def _directory(folder: Path) -> Model:
    file = folder / "config.json"
    if file.is_file():
        from kvsim.models.safetensors import weighed

        return weighed(Model.from_config(_with_quantization(read_config(file), folder), folder.resolve().name), folder)
    models = _gguf_models(folder)
    if len(models) == 1:
        return _file(models[0])
    if models:
        raise ValueError(f"model directory {folder} has {len(models)} GGUF models: name one, such as {models[0].name}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"model directory {folder} holds an adapter: give the model that it is for")
    raise ValueError(f"model directory {folder} has no config.json and no GGUF file")


GGUF_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
NO_MODEL = ("adapter", "mmproj", "imatrix", "vocab", "control_vector")
"""``general.type``, or a word of the file's name, of a GGUF file that is no language model."""


def _gguf_models(folder: Path) -> list[Path]:
    """The GGUF models of a directory, of a split one the first part.

    A projector (mmproj), an adapter or an importance matrix is none.  Raises ``ValueError``, naming the file, where a
    first part is missing or a file is half downloaded.
    """
    from kvsim.models.gguf import is_gguf, read_header
    from kvsim.models.safetensors import HALF

    names = {entry.name for entry in folder.iterdir() if not entry.is_dir()}
    models = []
    for name in sorted(names):
        base = name.removesuffix(next((end for end in HALF if name.endswith(end)), ""))
        if base != name and base.endswith(".gguf") and (base not in names or name.endswith(".aria2")):
            raise ValueError(f"{short(folder)}: {name} is half a download")
        if not name.endswith(".gguf") or any(word in re.split(r"[^a-z_]+", name.lower()) for word in NO_MODEL):
            continue
        found = GGUF_PART.fullmatch(name)
        if found and int(found[2]) != 1:
            first = f"{found[1]}-00001-of-{found[3]}.gguf"
            if first not in names:
                raise ValueError(f"{short(folder)} has {name} and not {first}: half a download")
            continue
        models.append(folder / name)
    if len(models) > 1:
        models = [
            file
            for file in models
            if not is_gguf(file) or read_header(file).metadata.get("general.type") not in NO_MODEL
        ]
    return models


def _file(path: Path) -> Model:
    from kvsim.models.gguf import is_gguf

    if is_gguf(path) or path.suffix == ".gguf":
        from kvsim.models.gguf_model import read_gguf

        return read_gguf(path)
    if path.suffix == ".safetensors":
        from kvsim.models.safetensors import read_tensors

        read_tensors(path)  # a broken file is said to be one before anything else
        if not (path.parent / "config.json").is_file():
            raise ValueError(f"{short(path)} has no config.json beside it: tensor shapes alone do not tell the heads")
        return _directory(path.parent)
    config = read_config(path)
    if path.name == "config.json":
        config = _with_quantization(config, path.parent)
    return Model.from_config(config, str(path))


def _with_quantization(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``config`` with what ModelOpt wrote into a file of its own, ``hf_quant_config.json``, where it says nothing else.

    Raises ``ValueError`` for a file that is no such object.
    """
    file = folder / "hf_quant_config.json"
    if not file.exists() or config.get("compression_config"):
        return config
    told = read_config(file)
    inner = told.get("quantization")
    if not isinstance(inner, dict):
        raise ValueError(f"{short(file)} has no object quantization, which ModelOpt writes")
    own = config.get("quantization_config")
    if isinstance(own, dict) and not quant_method(own).startswith("modelopt"):
        return config
    return {**config, "quantization_config": {"quant_method": "modelopt", **inner, **(own or {})}}


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.  Raises ``ValueError``, naming the file, for anything else."""
    try:
        text = read_text(file)
    except UnicodeDecodeError:
        raise ValueError(f"{short(file)} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{short(file)} cannot be read: {error.strerror}") from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:  # a whole number of thousands of digits is a ValueError
        raise ValueError(f"{short(file)} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a JSON {type(config).__name__}, not a config object")
    return config


def _hub_config(name: str) -> dict[str, Any]:
    import logging

    missing = catalog.unknown("models", "model", name, "kvsim models")
    if not HUB_ID.fullmatch(name):
        raise LookupError(missing)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:
        raise LookupError(f"{missing} (no model hub: huggingface_hub is not installed)") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    try:
        file = hf_hub_download(name, "config.json", local_files_only=offline)
    except Exception as error:  # the hub client raises its own, requests' and httpx's errors
        reason = f"{constants.ENDPOINT} is not reachable" if offline else f"{type(error).__name__}: {error}"
        raise LookupError(f"{missing} (model hub: {reason.split(chr(10))[0][:120]})") from None
    return read_config(Path(file))


def _reachable(endpoint: str) -> bool:
    """Whether a server answers at all; asked first, since the hub client retries for half a minute."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
            return True
    except HTTPError:
        return True
    except (OSError, ValueError):
        return False
