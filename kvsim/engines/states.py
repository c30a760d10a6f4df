"""A layer's constant state as serving engines hold it, which is not quite as transformers does."""

from __future__ import annotations

from dataclasses import replace

from kvsim.layout import StateShape


def served(state: StateShape, conv_dtype: str | None = None, recurrent_dtype: str | None = None) -> StateShape:
    """``state`` with the convolution's kernel less one inputs (the newest is at hand), in the types given.

    vLLM 0.32 (``MambaStateShapeCalculator``) and llama.cpp (``n_embd_r``) keep ``kernel - 1`` of them, transformers
    the whole kernel.  ``None`` leaves a type as it is.
    """
    tensors = []
    for name, shape, dtype in state.tensors:
        if name == "conv":
            tensors.append((name, (*shape[:-1], max(0, shape[-1] - 1)), conv_dtype or dtype))
        else:
            tensors.append((name, shape, recurrent_dtype or dtype))
    return replace(state, tensors=tuple(tensors))
