"""The decode engine: a fixed batch of ragged sequences, static buffers, one CUDA graph a step (:class:`Engine`)."""

from kvruntime.engine.engine import Engine

__all__ = ["Engine"]
