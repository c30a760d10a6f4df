"""A model by name: a directory, something pulled, a hub id, or a catalogue shape with seeded random weights.

``resolve`` says where a model would come from, quickly and without torch; ``load`` brings it.  Both carry the words
that must stand beside every number (``weights``), so that nothing measured on random or dequantized weights can
pass for something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvruntime.checkpoints.pretrained import first_line, one_line, pretrained
from kvruntime.checkpoints.pull import PULLS, damage, pull, pulled
from kvsim.finite_json import read_json

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = tuple(
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
"""Names that transformers looks for, the first that is there is loaded."""
UNPICKLE = "KVRUNTIME_UNPICKLE"
"""The environment variable that asks, with ``1``, for pickled weights: tensors alone are read, nothing is run."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    "chat_template.jinja",
)
MOST_CONFIG_NBYTES = 64 << 20
DTYPES = ("float16", "bfloat16", "float32")
SEED = 0
GIB = 1 << 30


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``path`` (a directory or hub id with real weights) or ``config`` (random ones).

    ``weights`` is the label of its numbers; ``download`` allows the hub to be asked.
    """

    name: str
    weights: str
    path: str | None = None
    config: Mapping[str, Any] | None = None
    seed: int = SEED
    download: bool = False

    @property
    def real(self) -> bool:
        """Whether the weights are pretrained ones."""
        return self.path is not None


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode, its tokenizer (None where there is none) and where it came from."""

    source: Source
    model: Any
    tokenizer: Any
    no_tokenizer: str = "comes without a tokenizer"
    """Why ``tokenizer`` is None."""

    @cached_property
    def sha256(self) -> str:
        """``sha256_of`` its source."""
        return sha256_of(self.source)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def max_positions(self) -> int | None:
        """Tokens the model has positions for; None where its config sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size


def resolve(name: str, *, seed: int = SEED, offline: bool = False, say: Callable[[str], None] = print) -> Source:
    """Where the model called ``name`` comes from.

    Tried in this order: a directory; something to pull (pulled now, unless ``offline``); a hub id; a catalogue name
    (real weights only where a hub download of it already lies on this machine, else random ones from ``seed``).

    Raises ``ValueError`` for a directory without a model in it, ``LookupError`` for a name that means nothing (with
    the nearest ones) or was not pulled yet, ``OSError`` for a hub id that ``offline`` keeps away.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        _check_directory(path)
        return Source(path.name or name, f"directory {path.resolve().name}", path=str(path))
    if name in PULLS and PULLS[name].is_model:
        folder = pulled(name)
        if folder is None and offline:
            raise LookupError(
                f"{name} is {damage(name) or 'not on this machine yet'}, and --offline forbids a download: "
                f"`kvruntime pull {name}`"
            )
        return Source(name, PULLS[name].label, path=str(folder or pull(name, say)))
    if name.count("/") == 1:
        if offline and not _in_hub_cache(name):
            raise OSError(f"{name} is not in this machine's hub cache, and --offline forbids a download")
        return Source(name, f"hub id {name}", path=name, download=not offline)
    hub_id, config = _catalogue_row(name)
    if _in_hub_cache(hub_id):
        return Source(name, f"hub id {hub_id}", path=hub_id)
    return Source(name, f"random (seed {seed})", config=config, seed=seed)


def config_of(source: Source) -> Any:
    """transformers' configuration of a model, without its weights.

    Raises ``ValueError`` for an architecture that transformers does not know, ``OSError`` where a hub id cannot be had.
    """
    from transformers import AutoConfig

    _quiet()
    with one_line(source.name):
        if source.config is not None:
            return AutoConfig.for_model(**source.config)
        return AutoConfig.from_pretrained(source.path, local_files_only=not source.download, trust_remote_code=False)


def load(
    source: Source,
    device: str,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    tensor_parallel_size: int = 1,
) -> LoadedModel:
    """The model on ``device``, weights in ``dtype`` (default: float16 on CUDA, float32 elsewhere).

    ``tensor_parallel_size``: ranks among which transformers splits it, one a process (:func:`rank_device`).  ``say`` is
    told what of the files is not used.  Raises ``ValueError`` for an architecture that transformers has no
    causal language model for, weights that are damaged, missing or of another shape, pickled objects other than
    tensors and a model that brings code of its own; ``OSError`` where a hub id cannot be had.
    """
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    device = pick_device(device)
    kind = getattr(torch, dtype or ("float32" if torch.device(device).type == "cpu" else "float16"))
    _quiet()
    if source.path is None:
        model = _random(source, device, kind)
        folder = pulled("gpt2-tokenizer") if model.config.model_type == "gpt2" else None
        return LoadedModel(source, model, *(_tokenizer(str(folder), False) if folder else (None,)))
    split: dict[str, Any] = {}
    if tensor_parallel_size > 1:
        from transformers.distributed import DistributedConfig

        split = {"distributed_config": DistributedConfig(tp_size=tensor_parallel_size)}
    if os.environ.get(UNPICKLE) != "1":
        _check_not_pickled(source)
        split["use_safetensors"] = True
    model = pretrained(source.name, source.path, say, dtype=kind, local_files_only=not source.download, **split)
    tokenizer, why_not = _tokenizer(source.path, source.download)
    return LoadedModel(source, model.to(device).eval(), tokenizer, why_not)


def _check_not_pickled(source: Source) -> None:
    """Raises ``ValueError`` for a directory whose weights are pickled files."""
    folder = Path(str(source.path))
    if folder.is_dir():
        first = next((name for name in WEIGHT_FILES if (folder / name).exists()), "")
        if first.startswith("pytorch_model.bin"):
            asked = f"convert them to safetensors, or set {UNPICKLE}=1 to read the tensors in them"
            raise ValueError(f"{source.name}: its weights are pickled ({first}), which is not read unasked: {asked}")


def sha256_of(source: Source) -> str:
    """What identifies a model whatever its name: of a shape with random weights the configuration's SHA-256, of real
    weights that of every byte of configuration, weights and tokenizer files.

    Raises ``OSError`` for a hub id whose files are not on this machine.
    """
    if source.path is None:
        return shape_sha256(source.config or {})
    return files_sha256(_folder(source.path))


def shape_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def files_sha256(folder: Path) -> str:
    """SHA-256 of a model directory: every byte of what is loaded of it, names included.

    Nothing cheaper notices a weight that was changed in place.  A core hashes 0.4 to 2 GB a second.
    """
    digest = hashlib.sha256()
    for name in ("config.json", *weight_files(folder), *TOKENIZER_FILES):
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                part = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name} {part}\n".encode())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[str]:
    """Names of the files in ``folder`` that transformers takes the weights from, an index first.

    Raises ``ValueError`` where there is none, for an index that is none or leads out of the folder, and for a weight
    file that is not a regular one.
    """
    first = next((name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if first is None:
        raise ValueError(f"directory {folder} holds no weights: expected {' or '.join(WEIGHT_FILES)}")
    names = [first]
    if first.endswith(".index.json"):
        index = read_json(folder / first, "index of weights", MOST_CONFIG_NBYTES)
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError(f"{folder / first} has no weight_map of names to files")
        names += sorted(set(parts.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / first} names {name!r}: allowed are files of its own folder")
        if not (folder / name).exists():
            raise ValueError(f"{folder / first} names {name!r}, which is not there")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is not a regular file")
    return names


def first_not_finite(model: Any) -> str | None:
    """The name of a weight that holds NaN or infinity; None where all are numbers."""
    return next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)


def pick_device(device: str | None) -> str:
    """``device`` checked, or ``cuda`` where there is one, else ``cpu``.

    Raises ``ValueError`` for a device that this machine does not have.
    """
    import torch

    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device is None:
        return cuda[0] if cuda else "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in ("cpu", *cuda):
        raise ValueError(f"device {device!r} is not on this machine: allowed here are {', '.join(['cpu', *cuda])}")
    return wanted


def rank_device(tensor_parallel_size: int, source: Source, device: str) -> tuple[int, str]:
    """This process's rank of as many, as torchrun says, and its device.

    Raises ``ValueError`` for another number of processes, and for random weights, which are not split.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if tensor_parallel_size < 1 or (tensor_parallel_size > 1 and tensor_parallel_size != processes):
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel_size} in {processes} process{'es' * (processes > 1)}: start as "
            f"many, `torchrun --nproc-per-node {max(2, tensor_parallel_size)} -m kvruntime generate ...`"
        )
    if tensor_parallel_size == 1:
        return 0, device
    if source.path is None:
        raise ValueError(f"{source.name}: random weights are not split: give --model a directory or a hub id")
    local = os.environ.get("LOCAL_RANK", "0")
    return int(os.environ.get("RANK", "0")), f"cuda:{local}" if device.startswith("cuda") else device


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: a local model is a directory with config.json and weights")
    if not (path / "config.json").exists():
        raise ValueError(f"directory {path} holds no config.json")
    config = read_json(path / "config.json", "configuration", MOST_CONFIG_NBYTES)
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} is not a JSON object")
    if "transformers_weights" in config:
        raise ValueError(f"{path / 'config.json'} names its weights (transformers_weights): not supported")
    weight_files(path)


def _folder(path: str) -> Path:
    """The directory that ``path``, a directory or a hub id whose files are here, was loaded from."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json")
    if not isinstance(found, str):
        raise OSError(f"{path} is not in this machine's hub cache")
    return Path(found).parent


def _random(source: Source, device: str, dtype: torch.dtype) -> Any:
    """The shape with weights drawn from the seed, made on the device itself.

    Raises ``ValueError`` before any weight is made where no cache runs under the model, or where it does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from kvruntime.hf.models import layer_kinds

    cuda = [torch.device(device).index] if torch.device(device).type == "cuda" else []
    config = config_of(source)
    with one_line(source.name), torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    layer_kinds(outline)
    size, free = sum(tensor.nbytes for tensor in outline.parameters()), _free_nbytes(device)
    if free is not None and size > free:
        raise ValueError(
            f"{source.name}: {size / GIB:.1f} GiB of {str(dtype).removeprefix('torch.')} weights do not fit into the "
            f"{free / GIB:.1f} GiB that are free on {device}"
        )
    with one_line(source.name), torch.random.fork_rng(cuda), torch.device(device):
        torch.manual_seed(source.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval()


def _free_nbytes(device: str) -> int | None:
    """Bytes that weights may take on ``device``; None where the system does not say."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _tokenizer(path: str, download: bool) -> tuple[Any, str]:
    """The tokenizer that lies beside the weights, or None and why there is none."""
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = AutoTokenizer.from_pretrained(path, local_files_only=not download, trust_remote_code=False)
        return found, ""
    except Exception as error:
        if not any((_folder(path) / name).exists() for name in TOKENIZER_FILES):
            return None, "comes without a tokenizer"
        return None, f"has a tokenizer that cannot be loaded ({first_line(error)})"


def _quiet() -> None:
    """Keeps transformers and the hub's client from writing their own progress, retries and advice between our lines."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _catalogue_row(name: str) -> tuple[str, Mapping[str, Any]]:
    """``(hub id, config)`` of a catalogue name or alias."""
    from kvsim import catalog

    row = catalog.find("models", name)
    if row is None:
        raise LookupError(
            catalog.unknown("models", "model", name, "kvsim models") + "; a directory or a hub id (owner/name) will do"
        )
    return row["id"], row["config"].get("text_config", row["config"])


def _in_hub_cache(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)
