"""transformers' models with every weight from a checkpoint, and what goes wrong there as one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def pretrained(name: str, path: str | Path, say: Callable[[str], None], **options: Any) -> Any:
    """transformers' causal language model with every weight from ``path``, whose own code is never run.

    Raises ``ValueError`` by key for a weight that is not there or has another shape.  What the model shares (tied
    embeddings) or makes itself may be absent; what it has no place for is said.
    """
    from transformers import AutoModelForCausalLM

    with one_line(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be named below
            trust_remote_code=False,
            weights_only=True,
            **options,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{name}: {_some(missing)} missing from the checkpoint")
    if found["mismatched_keys"]:
        key, there, wanted = min(found["mismatched_keys"], key=lambda each: each[0])
        raise ValueError(f"{name}: weight {key} has shape {list(there)}, the configuration asks for {list(wanted)}")
    if found.get("error_msgs"):
        raise ValueError(f"{name}: cannot load the weights: {first_line(found['error_msgs'][0])}")
    if getattr(model.config, "auto_map", None):
        say(f"{name}: its own code (auto_map) is not run: transformers' {type(model).__name__} is")
    unexpected = sorted(found["unexpected_keys"])
    if unexpected:
        say(f"{name}: {_some(unexpected)} not used: the configured model has no place for them")
    return model


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turns what transformers and the readers of weights raise into one line."""
    import pickle

    import torch
    from safetensors import SafetensorError

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise ValueError(f"{name}: its weights do not fit into memory") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name}: the pickled weights are damaged or hold more than tensors: refused, nothing of them was run"
        ) from None
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{name}: cannot read the weights: {first_line(error)}") from None
    except OSError as error:
        raise OSError(f"cannot load {name}: {first_line(error)}") from None
    except Exception as error:  # of other people's code, on other people's files
        if "trust_remote_code" in str(error):
            raise ValueError(f"{name}: needs code of its own (auto_map), which is not run") from None
        if isinstance(error, ValueError | KeyError):
            raise ValueError(f"{name}: unsupported architecture: {first_line(error)}") from None
        raise ValueError(f"{name}: cannot load it: {type(error).__name__}: {first_line(error)}") from None


def first_line(error: object) -> str:
    """The first line of what was raised, its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _some(keys: list[str]) -> str:
    """``weight a.b is`` or ``3 weights (a.b, ...) are``."""
    return f"weight {keys[0]} is" if len(keys) == 1 else f"{len(keys)} weights ({keys[0]}, ...) are"
