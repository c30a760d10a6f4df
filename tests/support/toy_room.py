"""A method that the house has never heard of: the uncompressed layout under another type, one row in ``LAYERS``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvruntime.methods import LAYERS, full
from kvsim.methods import METHODS, Full


@dataclass(frozen=True)
class Toy(Full):
    @property
    def name(self) -> str:
        return "toy"


def move_in(monkeypatch: Any, **offers: Any) -> Toy:
    """Gives the method a row on each side, with what its room ``offers`` besides a layer and an example."""
    without: dict[str, Any] = {"transients": None, "measures": None, "benched": (), "claims": None}
    room = full.ROOM._replace(examples=(Toy(),), **without | offers)
    monkeypatch.setitem(LAYERS, Toy, room)
    monkeypatch.setitem(METHODS, "toy", Toy)
    return Toy()
