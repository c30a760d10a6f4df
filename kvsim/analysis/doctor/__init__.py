"""Reconciles an engine's boot log with prediction: each line that gives a figure, what was predicted, and why not.

A figure is predicted from what the log says before it: the pool's tokens from the memory that was logged, not from the
memory that was predicted, so that an error stands where it arises.  A cause is given where the log or a trial bears it
out; else the figure is said to be not explained.  A boot that failed is reconciled as far as it came.
"""

from __future__ import annotations

from kvsim.analysis.doctor import llama_cpp, sglang, trtllm, vllm
from kvsim.analysis.doctor.log import Diagnosis, Finding, Log, Reader
from kvsim.hardware import Hardware
from kvsim.models.model import Model

__all__ = ["READERS", "Diagnosis", "Finding", "Log", "diagnose", "draft_of", "engine_of", "labels", "model_of"]

READERS: dict[str, Reader] = {
    "vllm": vllm.READER,
    "sglang": sglang.READER,
    "trtllm": trtllm.READER,
    "llama.cpp": llama_cpp.READER,
}
"""Engine -> who reads its boot logs; a log is of the first whose signs it has."""


def labels() -> str:
    """The engines whose logs are read: ``vLLM, SGLang or llama.cpp``."""
    *others, last = (reader.label for reader in READERS.values())
    return f"{', '.join(others)} or {last}"


def engine_of(text: str | Log) -> str | None:
    """The engine (of :data:`READERS`) whose log this is; ``None`` where it is none's."""
    log = Log.of(text)
    for name, reader in READERS.items():
        if any(log.find(sign) for sign in reader.signs):
            return name
    return None


def reader_of(log: Log) -> Reader:
    """Who reads this log.  Raises ``ValueError`` for a text that has no line of an engine's boot log."""
    name = engine_of(log)
    if name is None:
        raise ValueError(f"no line of a {labels()} boot log in it")
    return READERS[name]


def model_of(text: str | Log) -> str | None:
    """The model's name as the log gives it."""
    log = Log.of(text)
    return reader_of(log).model_name(log)


def draft_of(text: str | Log) -> str | None:
    """The draft model's name as the log gives it, where it is another than the model's."""
    log = Log.of(text)
    return reader_of(log).draft_name(log)


def diagnose(
    text: str | Log, model: Model | None, hardware: Hardware | None = None, draft: Model | None = None
) -> Diagnosis:
    """Reconciles a boot log.

    ``model``: predicted against; where a log holds its model's shape ``None`` serves, and in a log of two models it
    stands for the one whose layers and heads it has.  ``hardware``: the card, where the log does not say its memory.
    ``draft``: the model of :func:`draft_of`, where it is known.  Raises ``ValueError`` for a text that has no line of
    an engine's boot log, or a log that needs a model without one.
    """
    log = Log.of(text)
    return reader_of(log).diagnosis(log, model, hardware, draft)
