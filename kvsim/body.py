"""The sizes that every part of one model shares, read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvsim.models.config import ConfigReader

if TYPE_CHECKING:
    from kvsim.layout import LayerShape, StateShape

MAX_LAYERS = 4096


@dataclass(frozen=True)
class Body:
    """One model's reader and its common sizes: what a mixer or an MLP needs to know beside its own keys.

    ``norm_vectors``: vectors a norm has (1: weight, 2: weight and bias, 0: none).  ``dtype``: of the activations,
    in which short convolutions keep their state (16-bit where the config does not say).
    """

    reader: ConfigReader
    num_layers: int
    hidden: int
    num_q_heads: int
    max_positions: int | None
    norm_vectors: int
    dtype: str
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


Shapes = tuple["LayerShape | StateShape", ...]
Count = Callable[[Body], int]
"""A further number of parameters that a family has."""
