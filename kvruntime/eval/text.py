"""Text to measure on: a file, or the reference prose that every Python carries."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from kvsim.regular_files import read_named

DEFAULT = "pydoc"


@dataclass(frozen=True)
class Text:
    """``content`` with a short ``name`` and its SHA-256, which say beside a number what it was measured on."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(path: str | os.PathLike[str] | None = None) -> Text:
    """The file's text, or Python's own language reference (``pydoc_data.topics``, some 700 KB) without one.

    Raises ``ValueError`` for a file that is missing, empty, not UTF-8 or not a regular one.
    """
    if path is None:
        from pydoc_data.topics import topics

        return Text(DEFAULT, "\n".join(topics[key] for key in sorted(topics)))
    path = Path(path)
    try:
        content = read_named(path, "text file").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {path} is not UTF-8 (byte {error.start})") from None
    if not content.strip():
        raise ValueError(f"text file {path} is empty")
    return Text(path.name, content)


def token_windows(tokenizer, text: Text, window: int, max_tokens: int | None = None):
    """Token ids cut into non-overlapping windows: int64 ``[num_windows, window]``.

    A tail shorter than a window is left out; a text shorter than one window makes a single shorter one.
    ``max_tokens`` bounds the tokens used.  Raises ``ValueError`` for a text of fewer than two tokens.
    """
    import torch

    if window < 2:
        raise ValueError(f"window {window}: allowed are 2 and above")
    content = text.content
    if max_tokens is not None:  # no tokenizer makes tokens longer than this on average: spare the rest the work
        content = content[: 16 * max_tokens]
    ids = torch.tensor(tokenizer(content, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if max_tokens is not None:
        ids = ids[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"text {text.name} has {len(ids)} tokens: at least 2 are needed")
    window = min(window, len(ids))
    return ids[: len(ids) // window * window].view(-1, window)
