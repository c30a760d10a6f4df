"""What a user types of times, cards and servers: ``30ms``, ``2s``, ``h100-sxm:2``, ``vllm:block_size=32``."""

from __future__ import annotations

import re

from kvsim.engines import Engine
from kvsim.engines.vllm import server_defaults
from kvsim.hardware import Hardware, find_hardware
from kvsim.specs import brief, parse_engine

SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min)?")
UNIT = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
BARE = 10.0
"""A bare number from here on is more likely meant as milliseconds."""
MAX_RANKS = 1024


def parse_seconds(text: str, what: str) -> float:
    """``30ms``, ``2s``, ``1.5 min``; a bare number is seconds, below ``BARE``.  Raises ``ValueError``."""
    match = SECONDS.fullmatch(text.strip())
    if match and not match[2] and float(match[1]) >= BARE:
        raise ValueError(f"{what} {brief(text)}: seconds or milliseconds? write {text.strip()}s or {text.strip()}ms")
    seconds = float(match[1]) * UNIT[match[2] or "s"] if match else 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{what} {brief(text)}: allowed are times such as 30ms or 2s")
    return seconds


def parse_share(text: str, what: str) -> float:
    """``1%`` or ``0.01`` -> 0.01, from 0 to below 10.  Raises ``ValueError``."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise ValueError(f"{what} {brief(text)}: allowed are shares such as 1% or 0.01")
    return share


def check_weight_bits(bits: float | None) -> None:
    """Raises ``ValueError`` for bits a weight that cannot be; ``None`` stands for the model's own."""
    if bits is not None and not 0 < bits <= 64:
        raise ValueError(f"weight-bits {bits:g}: allowed are above 0 to 64")


def parse_card(text: str) -> tuple[Hardware, int | None]:
    """``h100-sxm`` or ``h100-sxm:2``: a card, and how many share the model.  Raises ``LookupError``, ``ValueError``."""
    name, colon, count = text.partition(":")
    if not colon:
        return find_hardware(name), None
    if not re.fullmatch("[0-9]{1,4}", count) or not 1 <= int(count) <= MAX_RANKS:
        allowed = f"CARD:COUNT with a count of 1 to {MAX_RANKS}, such as h100-sxm:2"
        raise ValueError(f"gpu {brief(text)}: allowed is {allowed}")
    return find_hardware(name), int(count)


def parse_serving(spec: str, card: Hardware | None, num_cards: int = 1) -> Engine:
    """``vllm``, or with its options ``vllm:block_size=32``, as it starts on ``num_cards`` of this card by default.

    Raises ``LookupError`` for an unknown engine, ``ValueError`` for an option that it does not have.
    """
    flags: dict[str, int | float] = {"tensor_parallel_size": num_cards}
    if card is not None and spec.partition(":")[0].strip().lower() == "vllm":
        flags = dict(server_defaults(card.memory_nbytes, card.id)) | flags
    return parse_engine(spec, flags)


def milliseconds(seconds: float) -> str:
    """Three significant digits, in ms."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
