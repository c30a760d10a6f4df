"""Which parts of a run are done: a file beside its report, so that a run that was cut is gone on with.

A part is done where it ended well by this code, with these versions, on this device.  What it recorded lies in a file
of its own, which has to be there still.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvsim.atomic import replace_file
from kvsim.finite_json import json_text, read_json
from validation.run.parts import Outcome, Part

SCHEMA = "validation.run/1"
SAME = ("device_name", "driver", "versions", "code", "results")
"""What two runs have to have alike; ``results``: in which of the two places they record."""


class Done:
    """The parts that ended well, by name, with their seconds; ``resume``: those that the file holds count.

    ``facts``: the circumstances of this run.  Raises ``ValueError`` for a file that is none of a run's, or one where
    its folder should be.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], resume: bool) -> None:
        if path.parent.exists() and not path.parent.is_dir():
            raise ValueError(f"out {path.parent} is a file: allowed is a folder, or a name that is not taken")
        self.path, self.facts = path, {name: facts.get(name) for name in SAME}
        self.seconds: dict[str, float] = {}
        self.other = ""
        """What the run in the file has otherwise than this one, so that none of its parts counts."""
        if resume and path.exists():
            found: dict[str, Any] = read_json(path, "run")
            if found.get("schema") != SCHEMA or not isinstance(found.get("parts"), dict):
                raise ValueError(f"{path} is no run's (schema {SCHEMA!r}): leave --resume out, or give another --out")
            if not all(isinstance(taken, (int, float)) for taken in found["parts"].values()):
                raise ValueError(f"{path}: the seconds of a part are a number, given {found['parts']}")
            if found.get("facts") == self.facts:
                self.seconds = {str(name): float(taken) for name, taken in found["parts"].items()}
            else:
                self.other = next(name for name in SAME if (found.get("facts") or {}).get(name) != self.facts[name])

    def of(self, part: Part, file: Path) -> Outcome | None:
        """How it ended in an earlier run; None where it has to run."""
        if part.name not in self.seconds or not file.exists():
            return None
        return Outcome(part, 0, self.seconds[part.name], file, "", before=True)

    def forget(self, parts: Iterable[Part]) -> None:
        """These have to run, whatever becomes of this run."""
        for part in parts:
            self.seconds.pop(part.name, None)
        self.put(())

    def put(self, outcomes: Iterable[Outcome]) -> None:
        """Notes those that ended well, in one step."""
        for outcome in outcomes:
            self.seconds.pop(outcome.part.name, None)
            if outcome.code == 0:
                self.seconds[outcome.part.name] = round(outcome.seconds, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(
            self.path, json_text({"schema": SCHEMA, "facts": self.facts, "parts": self.seconds}, indent=1) + "\n"
        )
