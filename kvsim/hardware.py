"""What a card can hold and move: memory, bandwidth, arithmetic, each with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvsim import catalog


@dataclass(frozen=True)
class Hardware:
    """One accelerator in SI base units: bytes, bytes a second, operations a second (dense).

    ``memory_nbytes`` is what a process sees where that is known, else the marketed size;
    ``memory_source`` says which.  ``num_sms`` are its multiprocessors (compute units), ``l2_nbytes`` its last
    cache before memory.  ``None`` where a figure is not known.
    """

    id: str
    vendor: str
    arch: str
    memory_nbytes: int | None
    memory_source: str
    bandwidth: float | None
    fp16_flops: float | None
    fp8_flops: float | None
    fp4_flops: float | None
    int8_ops: float | None
    link_bandwidth: float | None
    source: str
    note: str = ""
    num_sms: int | None = None
    l2_nbytes: int | None = None
    sms_source: str | None = None
    host_cards: int = 8
    """Cards that the links connect: a host's, or a rack's of 72."""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Hardware:
        """One row of ``catalog/hardware.json``."""
        usable, marketed = row.get("memory_usable_mib"), row.get("memory_gb")
        if usable is not None:
            memory, memory_source = int(usable) << 20, row["memory_usable_source"]
        elif marketed is not None:
            memory, memory_source = int(marketed * 10**9), "marketed size"
        else:
            memory, memory_source = None, "not known"

        def scaled(key: str, unit: float) -> float | None:
            return None if row.get(key) is None else row[key] * unit

        return cls(
            id=row["id"],
            vendor=row["vendor"],
            arch=row["arch"],
            memory_nbytes=memory,
            memory_source=memory_source,
            bandwidth=scaled("mem_bw_gbps", 1e9),
            fp16_flops=scaled("fp16_bf16_dense_tflops", 1e12),
            fp8_flops=scaled("fp8_dense_tflops", 1e12),
            fp4_flops=scaled("fp4_dense_tflops", 1e12),
            int8_ops=scaled("int8_dense_tops", 1e12),
            link_bandwidth=scaled("interconnect_gbps_bidirectional", 1e9),
            source=row["source"],
            note=row.get("note") or "",
            num_sms=row.get("num_sms"),
            l2_nbytes=None if row.get("l2_mib") is None else int(row["l2_mib"] * 2**20),
            sms_source=row.get("sms_source"),
            host_cards=row.get("host_cards", 8),
        )


MAKERS = frozenset({"nvidia", "geforce", "tesla", "amd", "instinct", "radeon", "intel"})
"""Words that drivers put before a card's name."""


def plain(name: str) -> str:
    """A card's name without what spellings differ in: case, makers, spaces, dashes and underscores."""
    words = name.lower().replace("_", " ").replace("-", " ").split()
    return "".join(word for word in words if word not in MAKERS)


def find_hardware(name: str) -> Hardware:
    """The card that answers to ``name``, a driver's spelling such as ``NVIDIA H100 80GB HBM3`` too.

    Raises ``LookupError`` with the nearest names.
    """
    row = catalog.find("hardware", name)
    if row is None and (wanted := plain(name)):
        rows = catalog.rows("hardware")
        row = next((row for row in rows if wanted in map(plain, catalog.names(row))), None)
    if row is None:
        raise LookupError(catalog.unknown("hardware", "GPU", name, "kvsim hardware"))
    return Hardware.from_row(row)


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
        machine = f"{self.min_cards} cards a machine" if self.min_cards > 1 else ""
        said = ", ".join(filter(None, (self.provider, self.terms, machine, self.date)))
        return f"${self.usd_per_hour:g} a card-hour ({said})"


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
