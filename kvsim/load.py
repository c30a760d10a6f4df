"""From a name to a model: a catalogue name, a config.json, a model directory, or a hub id."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from kvsim import catalog
from kvsim.model import Model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_SECONDS = 5


def load_model(name: str) -> Model:
    """The model that ``name`` means (see :func:`load_config`), parsed."""
    title, config = load_config(name)
    return Model.from_config(config, title)


def load_config(name: str) -> tuple[str, dict[str, Any]]:
    """``(title, config)``: the catalogue first, then a path, then the model hub.

    Raises ``LookupError`` for an unknown name and ``ValueError`` for a file that is no config.
    """
    row = catalog.find("models", name)
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


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.  Raises ``ValueError``, naming the file, for anything else."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
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
