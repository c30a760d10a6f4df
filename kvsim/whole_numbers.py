"""Whole numbers: how large they may be, and checks of those among the options of methods and engines."""

from __future__ import annotations

MOST = 10**15
"""No option is above this; it keeps a number of hundreds of digits from asking for endless work."""
LARGEST = 1 << 40
"""The largest number that is taken of anything: tokens, sequences, cards; products of three stay exact and finite."""


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raises ``ValueError`` unless ``value`` is a whole number from ``least``; ``True`` and ``1.0`` are none."""
    if type(value) is int and least <= value <= MOST:
        return
    if type(value) is int and value > MOST:
        raise ValueError(f"{name} of {len(f'{value:x}')} hexadecimal digits: allowed are up to {MOST:,}")
    given = str(value)[:40]
    raise ValueError(f"{name} {given}: allowed are {least} and above, in whole numbers")


def check_switch(name: str, value: object) -> None:
    """Raises ``ValueError`` unless ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} {str(value)[:40]}: allowed are true and false")
