"""A model by name: a directory, something pulled, a hub id, or a catalogue shape with seeded random weights.

``resolve`` says where a model would come from, quickly and without torch; ``load`` brings it.  Both carry the words
that must stand beside every number (``weights``), so that nothing measured on random or dequantized weights can
pass for something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvruntime.pull import PULLS, pull, pulled

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
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
class Loaded:
    """A causal language model in eval mode, its tokenizer (None where there is none) and where it came from."""

    source: Source
    model: Any
    tokenizer: Any

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
                f"{name} is not on this machine yet, and --offline forbids a download: `kvruntime pull {name}`"
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


def load(source: Source, device: str, dtype: str | None = None) -> Loaded:
    """The model on ``device``, weights in ``dtype`` (default: float16 on CUDA, float32 elsewhere).

    Raises ``ValueError`` for an architecture that transformers has no causal language model for, ``OSError`` where a
    hub id cannot be had.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    kind = getattr(torch, dtype or ("float32" if torch.device(device).type == "cpu" else "float16"))
    _quiet()
    if source.path is None:
        model = _random(source, device, kind)
        folder = pulled("gpt2-tokenizer") if model.config.model_type == "gpt2" else None
        return Loaded(source, model, _tokenizer(str(folder), False) if folder else None)
    with _one_line(source.name):
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=kind, local_files_only=not source.download)
    return Loaded(source, model.to(device).eval(), _tokenizer(source.path, source.download))


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


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: a local model is a directory with config.json and weights")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"directory {path} holds no config.json: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not valid JSON: {error}") from None
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ValueError(f"directory {path} holds no weights: expected {' or '.join(WEIGHT_FILES)}")


def _random(source: Source, device: str, dtype: torch.dtype) -> Any:
    """The shape with weights drawn from the seed, made on the device itself.

    Raises ``ValueError`` before any weight is made where no cache runs under the model, or where it does not fit.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvruntime.hf.models import layer_shapes

    assert source.config is not None
    cuda = [torch.device(device).index] if torch.device(device).type == "cuda" else []
    with _one_line(source.name):
        config = AutoConfig.for_model(**source.config)
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layer_shapes(outline)
    size, free = sum(tensor.nbytes for tensor in outline.parameters()), _free_nbytes(device)
    if free is not None and size > free:
        raise ValueError(
            f"{source.name}: {size / GIB:.1f} GiB of {str(dtype).removeprefix('torch.')} weights do not fit into the "
            f"{free / GIB:.1f} GiB that are free on {device}"
        )
    with _one_line(source.name), torch.random.fork_rng(cuda), torch.device(device):
        torch.manual_seed(source.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
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


def _tokenizer(path: str, download: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=not download)
    except (OSError, ValueError):
        return None


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turns transformers' long refusals into one line."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name}: unsupported architecture: {_first_line(error)}") from None
    except OSError as error:
        raise OSError(f"cannot load {name}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
            catalog.unknown("models", "model", name, "kvsim models") + ", a directory, or a hub id (owner/name)"
        )
    return row["id"], row["config"].get("text_config", row["config"])


def _in_hub_cache(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)
