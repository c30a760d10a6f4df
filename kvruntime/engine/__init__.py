"""The decode engine: a fixed batch of ragged sequences, static buffers, one CUDA graph a step (:class:`Engine`)."""

from kvruntime.engine.loop import Engine

__all__ = ["Engine"]
