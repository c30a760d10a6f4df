"""Reading a config.json strictly: every number from a named key, every refusal in one line that names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsim.layout import LayerShape, StateShape

Switch = bool | tuple[str, bool]
"""A fact of the family, or ``(config key, its value where the key is absent)``."""

Keys = str | tuple[str, ...]
"""A config key, or several of which the first that is given counts."""

LARGEST = 10**9
"""No size of a model is above this; it keeps a hostile config from asking for endless work."""


class AbsentKeyError(ValueError):
    """A number was asked for that the config does not give."""


class ConfigReader:
    """The keys of one ``config.json`` object, remembering which were read.

    ``defaults`` holds what the model's class in transformers fills in for an absent key.  Patterns and switches
    always take it (:meth:`value`); sizes do only where ``lenient``, in a nested config, which transformers writes
    without the keys that equal the class's.  ``sources`` holds, for every number asked for by name, the key that
    it came from.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
        lenient: bool = False,
    ) -> None:
        self.config = config
        self.prefix = prefix
        self.defaults = defaults or {}
        self.lenient = lenient
        self.used: set[str] = set()
        self.sources: dict[str, str] = {}
        self.filled: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """The value as given, ``None`` where the key is absent or null."""
        self.used.add(key)
        return self.config.get(key)

    def value(self, key: str) -> Any:
        """The value as given; where the key is absent, what the class fills in (else ``None``)."""
        self.used.add(key)
        if key in self.config:
            return self.config[key]
        default = self.defaults.get(key)
        if default is not None:
            self.filled[key] = default
        return default

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

    def first(self, keys: Keys) -> str:
        """The first of ``keys`` that is given; where none is, the first that the class fills in."""
        each = (keys,) if isinstance(keys, str) else keys
        self.used.update(each)
        filled = (key for key in each if key in self.defaults and key not in self.config)
        return next((key for key in each if self.has(key)), next(filled, each[0]))

    def count(self, name: str, keys: Keys, *, zero: bool = False, fill: bool = False) -> int:
        """A whole number above 0 (``zero``: from 0), which becomes ``name``.

        ``fill``: an absent key takes the class's value.  Raises ``ValueError`` where it is no such number,
        :class:`AbsentKeyError` where there is none.
        """
        key = self.first(keys)
        value = self.value(key) if fill or self.lenient else self.get(key)
        if value is None:
            raise AbsentKeyError(*self.error(key, "a whole number is needed").args)
        least = 0 if zero else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self.error(key, f"allowed are whole numbers from {least} to {LARGEST:,}")
        self.sources[name] = self.label(key) + ("" if key in self.config else f" (absent: {value} by its class)")
        return value

    def count_or_none(self, name: str, keys: Keys, *, zero: bool = False, fill: bool = False) -> int | None:
        """The same, ``None`` where the key is absent or null."""
        key = self.first(keys)
        given = self.value(key) if fill or self.lenient else self.get(key)
        return None if given is None else self.count(name, keys, zero=zero, fill=fill)

    def switch(self, switch: Switch) -> bool:
        """A fact of the family, or the config key that decides it; null is false, as it is to the classes."""
        if isinstance(switch, bool):
            return switch
        key, default = switch
        value = self.get(key)
        if value is None:
            return default and key not in self.config
        if not isinstance(value, bool):
            raise self.error(key, "allowed are true and false")
        return value

    def listed(self, key: str, length: int | None = None) -> list[Any] | None:
        """A list, of ``length`` entries where that is given; ``None`` where the key is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.error(key, "allowed is a list")
        if length is not None and len(value) != length:
            raise self.error(key, f"{len(value)} entries for {length} layers")
        return list(value)

    def indices(self, key: str) -> set[int] | None:
        """A list of whole numbers as a set; ``None`` where the key is absent or null."""
        value = self.listed(key)
        if value is None:
            return None
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in value):
            raise self.error(key, "allowed is a list of layer numbers")
        return set(value)

    def child(self, key: str) -> ConfigReader | None:
        """A reader of the nested object under ``key``; ``None`` where it is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "allowed is a JSON object")
        return ConfigReader(value, f"{self.label(key)}.")


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
