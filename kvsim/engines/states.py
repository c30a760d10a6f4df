"""A layer's constant state as engines hold it: serving engines not quite as transformers does."""

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


CONVOLUTIONS = ("conv", "shift_mlp", "shift_attention")
"""States that transformers keeps in the activations' type."""


def in_transformers(state: StateShape, dtype: str) -> StateShape:
    """``state`` as transformers holds it where activations are of ``dtype``."""
    tensors = [(name, shape, dtype if name in CONVOLUTIONS else own) for name, shape, own in state.tensors]
    return replace(state, tensors=tuple(tensors))
