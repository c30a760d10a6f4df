"""A model by name: a directory, something pulled, a hub id, or a catalogue shape with seeded random weights.

Every loaded model carries the words that must stand beside its numbers (``weights``), so that nothing measured on
random or dequantized weights can pass for something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvruntime.pull import PULLS, pulled

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
DTYPES = ("float16", "bfloat16", "float32")
SEED = 0


@dataclass(frozen=True)
class Loaded:
    """A causal language model in eval mode.  ``real``: pretrained weights; ``weights``: their label."""

    name: str
    model: Any
    tokenizer: Any
    weights: str
    real: bool

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


def pick_device(device: str | None) -> str:
    """``device`` checked, or ``cuda`` where there is one, else ``cpu``.

    Raises ``ValueError`` for a device this machine does not have.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device {device!r}: allowed are cpu, cuda, cuda:0, ...") from None
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not on this machine: allowed here are cpu" + ", cuda" * torch.cuda.is_available())
    return device


def load(name: str, device: str, dtype: str | None = None, *, seed: int = SEED, offline: bool = False) -> Loaded:
    """The model called ``name``, on ``device``, weights in ``dtype`` (default: float16 on CUDA, float32 elsewhere).

    Tried in this order: a directory, a pulled model, a catalogue alias (real weights only where a hub download
    already lies on this machine, else random ones from ``seed``), a hub id.

    Raises ``ValueError`` for a directory without weights or an architecture that is no causal language model,
    ``LookupError`` for a name that means nothing, ``OSError`` where a hub id cannot be had.
    """
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    kind = getattr(torch, dtype or ("float32" if torch.device(device).type == "cpu" else "float16"))
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        return _from_directory(path, device, kind)
    if name in PULLS and PULLS[name].is_model:
        folder = pulled(name)
        if folder is None:
            raise LookupError(f"{name} is not on this machine yet: run `kvruntime pull {name}`")
        return _pretrained(name, str(folder), device, kind, PULLS[name].label, offline=True)
    row = catalogue_row(name)
    if row is not None and name != row.hub_id:
        if _in_hub_cache(row.hub_id):
            return _pretrained(name, row.hub_id, device, kind, f"hub id {row.hub_id}", offline=True)
        return _random(name, row.config, device, kind, seed)
    if "/" not in name:
        raise LookupError(_unknown(name))
    if offline and not _in_hub_cache(name):
        raise OSError(f"{name} is not in this machine's hub cache, and --offline forbids a download")
    try:
        return _pretrained(name, name, device, kind, f"hub id {name}", offline=offline)
    except OSError as error:
        hint = f"; its shape with random weights is --model {row.alias}" if row else ""
        raise OSError(f"cannot load {name} from the model hub: {_first_line(error)}{hint}") from None


def _from_directory(path: Path, device: str, dtype: torch.dtype) -> Loaded:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: a local model is a directory with config.json and weights")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"directory {path} holds no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not valid JSON: {error}") from None
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise ValueError(f"directory {path} holds no weights: expected {' or '.join(WEIGHT_FILES)}")
    return _pretrained(path.name or str(path), str(path), device, dtype, f"directory {path.name}", offline=True)


def _pretrained(name: str, source: str, device: str, dtype: torch.dtype, label: str, *, offline: bool) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    with _no_unsupported(name):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=offline)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
    except (OSError, ValueError):
        tokenizer = None
    return Loaded(name, model.to(device).eval(), tokenizer, label, real=True)


def _random(name: str, config: dict[str, Any], device: str, dtype: torch.dtype, seed: int) -> Loaded:
    """The shape with weights drawn from ``seed``, made on the device itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quiet()
    with _no_unsupported(name):
        made = AutoConfig.for_model(**config)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(made, dtype=dtype)
        finally:
            torch.set_rng_state(state)
    folder = pulled("gpt2-tokenizer") if config["model_type"] == "gpt2" else None
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True) if folder else None
    return Loaded(name, model.to(device).eval(), tokenizer, f"random (seed {seed})", real=False)


@contextmanager
def _no_unsupported(name: str) -> Iterator[None]:
    """Turns transformers' long refusals of a model type into one line."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name}: unsupported architecture: {_first_line(error)}") from None


def quiet() -> None:
    """Keeps transformers from writing its own progress and advice between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _in_hub_cache(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in ("model.safetensors", "model.safetensors.index.json"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
