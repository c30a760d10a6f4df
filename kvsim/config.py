"""Reading a config.json strictly: every number from a named key, every refusal in one line that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsim.families import Switch


class AbsentKeyError(ValueError):
    """A number was asked for that the config does not give."""


class ConfigReader:
    """The keys of one ``config.json`` object, remembering which were read.

    ``sources`` holds, for every number asked for by name, the key that it came from.
    """

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self.config = config
        self.prefix = prefix
        self.used: set[str] = set()
        self.sources: dict[str, str] = {}

    def get(self, key: str) -> Any:
        """The value, ``None`` where the key is absent or null."""
        self.used.add(key)
        return self.config.get(key)

    def has(self, key: str) -> bool:
        return self.config.get(key) is not None

    def label(self, key: str) -> str:
        return self.prefix + key

    def error(self, key: str, why: str) -> ValueError:
        """One line: the key, what was given, and what is allowed (``why``)."""
        given = repr(self.config[key]) if key in self.config else "absent"
        if len(given) > 60:
            given = given[:57] + "..."
        return ValueError(f"config key {self.label(key)} is {given}: {why}")

    def count(self, name: str, key: str, *, zero: bool = False) -> int:
        """A whole number above 0 (``zero``: from 0), which becomes ``name``.  Raises ``ValueError``."""
        value = self.get(key)
        if value is None:
            raise AbsentKeyError(*self.error(key, "a whole number is needed").args)
        if isinstance(value, bool) or not isinstance(value, int) or value < (0 if zero else 1):
            raise self.error(key, f"allowed are whole numbers from {0 if zero else 1}")
        self.sources[name] = self.label(key)
        return value

    def count_or_none(self, name: str, key: str) -> int | None:
        """The same, ``None`` where the key is absent or null."""
        return self.count(name, key) if self.get(key) is not None else None

    def switch(self, switch: Switch) -> bool:
        """A fact of the family, or the config key that decides it."""
        if isinstance(switch, bool):
            return switch
        key, default = switch
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "allowed are true and false")
        return value
