"""Public list prices of cards by the hour, dated, with their sources (``catalog/prices.json``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Price:
    """US dollars a card and hour, of machines with ``min_cards`` cards and above.  ``date``: when it was read."""

    card: str
    usd_per_hour: float
    provider: str
    terms: str
    min_cards: int
    date: str
    source: str

    @property
    def label(self) -> str:
        machine = f", {self.min_cards} cards a machine" if self.min_cards > 1 else ""
        return f"${self.usd_per_hour:g} a card-hour ({self.provider}, {self.terms}{machine}, {self.date})"


@cache
def prices() -> tuple[Price, ...]:
    """All rows of the table."""
    path = Path(__file__).with_name("catalog") / "prices.json"
    return tuple(Price(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"])


def lowest(card: str, num_cards: int = 1) -> Price | None:
    """The lowest list price for machines of at most ``num_cards`` of this card; ``None`` where none is listed."""
    fitting = [price for price in prices() if price.card == card and price.min_cards <= num_cards]
    return min(fitting, key=lambda price: price.usd_per_hour, default=None)


def given(card: str, usd_per_hour: float) -> Price:
    """A price that the user names.  Raises ``ValueError`` for one that is not above 0."""
    if not 0 < usd_per_hour < 1e6:
        raise ValueError(f"price {usd_per_hour:g}: allowed are dollars a card-hour above 0")
    return Price(card, usd_per_hour, "as given", "--price", 1, "", "")
