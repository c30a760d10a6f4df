"""Reconciles an engine's boot log with prediction: each line that gives a figure, what was predicted, and why not.

A figure is predicted from what the log says before it: the pool's tokens from the memory that was logged, not from the
memory that was predicted, so that an error stands where it arises.  A cause is given where the log or a trial bears it
out; else the figure is said to be not explained.  A boot that failed is reconciled as far as it came.
"""

from __future__ import annotations

from kvsim.analysis.doctor import llama_cpp, vllm, vllm_lines
from kvsim.analysis.doctor.log import Diagnosis, Finding, Log
from kvsim.hardware import Hardware
from kvsim.models.model import Model

__all__ = ["Diagnosis", "Finding", "Log", "diagnose", "draft_of", "engine_of", "model_of"]


def engine_of(text: str | Log) -> str | None:
    """``vllm`` or ``llama.cpp``, whichever log this is; ``None`` where it is neither."""
    log = Log.of(text)
    for name, signs in (("vllm", vllm_lines.SIGNS), ("llama.cpp", llama_cpp.SIGNS)):
        if any(log.find(sign) for sign in signs):
            return name
    return None


def model_of(text: str | Log) -> str | None:
    """The model's name as a vLLM log gives it."""
    return vllm_lines.model_name(vllm_lines.one_boot(Log.of(text))[0])


def draft_of(text: str | Log) -> str | None:
    """The draft model's name as a vLLM log gives it, where it is another than the model's."""
    draft = vllm_lines.draft(vllm_lines.one_boot(Log.of(text))[0])
    return draft.name if draft is not None and draft.name else None


def diagnose(
    text: str | Log, model: Model | None, hardware: Hardware | None = None, draft: Model | None = None
) -> Diagnosis:
    """Reconciles a boot log.

    ``model``: predicted against; needed for vLLM (see :func:`model_of`), for llama.cpp its own metadata serve where
    it is ``None``, and in a log of two models it stands for the one whose layers and heads it has.  ``hardware``: the
    card, where the log does not say its memory.  ``draft``: the model of :func:`draft_of`, where it is known.  Raises
    ``ValueError`` for a text that has no line of an engine's boot log, or a vLLM log without a model.
    """
    log = Log.of(text)
    engine = engine_of(log)
    if engine == "vllm":
        if model is None:
            raise ValueError("the log does not name its model: give --model")
        return vllm.diagnosis(log, model, hardware, draft)
    if engine == "llama.cpp":
        return llama_cpp.diagnosis(log, model)
    raise ValueError("no line of a vLLM or llama.cpp boot log in it")
