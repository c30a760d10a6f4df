"""A benchmark's results: its rows in a :class:`Store`, written after every measurement, so that no run is ever lost."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvruntime.bench.harness.store import Row, Store, read_rows
from kvsim.finite_json import json_text

SCHEMA = "kvruntime.bench/1"

ROOT = Path(__file__).resolve().parents[3]
CODE = ("kvruntime/**/*.py", "kvsim/**/*.py", "kvsim/catalog/*.json")
"""What a measurement is made with."""


class Results:
    """The rows of one file.  A row is its *key* (what was asked for) and its figures, in one flat object.

    ``resume`` takes over the rows of an existing file that was recorded on the same device with the same versions;
    without it the first writing keeps an existing file beside as ``.old``.  ``anew`` takes over too, but takes for
    done only what this code measured with these versions.  Raises ``ValueError`` for a path that cannot be written, a
    file that is not of this schema, or one of another device, or with ``resume`` of other versions.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: Mapping[str, Any], *, resume: bool = False, anew: bool = False
    ) -> None:
        self.path, self.anew = Path(path), anew
        self.header = {"schema": SCHEMA, **header}
        self.store = Store(self.path, SCHEMA, "kind", fresh=not (resume or anew))
        if self.store.found is not None:
            self._take_over(self.store.found)

    @property
    def rows(self) -> list[Row]:
        """What the file holds, or will at the next writing."""
        return self.store.rows

    @rows.setter
    def rows(self, rows: list[Row]) -> None:
        self.store.rows = rows

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While tables are made of the rows: what those of an earlier file lack or have of another kind is one
        ``ValueError`` that names the file."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if self.store.found is None:
                raise
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.path} holds a row that no table can show ({what}): give another --out") from error

    def _take_over(self, old: Mapping[str, Any]) -> None:
        for name in ("device", "versions"):
            if not isinstance(old.get(name, {}), dict):
                raise ValueError(f"{self.path} is damaged: its {name} is {old[name]!r:.40}")
        here, there = (head.get("device", {}).get("name") for head in (self.header, old))
        if here != there:
            raise ValueError(f"{self.path} was recorded on {there}, this is {here}: give another --out")
        changed = [(name, _facts(old).get(name), value) for name, value in _facts(self.header).items()]
        changed = [(name, before, now) for name, before, now in changed if before != now]
        if changed and not self.anew:
            name, before, now = changed[0]
            raise ValueError(
                f"{self.path} was recorded with {name} {before}, this is {name} {now}: "
                "--anew measures its rows again, or give another --out"
            )
        for name in ORIGIN:
            if old.get(name) != self.header.get(name):
                for row in self.rows:
                    row.setdefault(name, old.get(name))
        if old.get("commit") != self.header.get("commit"):
            self.header["resumed_from_commit"] = old.get("commit")

    def done(self, key: Mapping[str, Any]) -> bool:
        """Whether a row with this key has its figures already (a failed one has none)."""
        return any("failed" not in row and _has(row, key) and self._mine(row) for row in self.rows)

    def _mine(self, row: Row) -> bool:
        """Whether the row counts: measured on this machine with these versions; with ``anew`` by this code, too."""
        facts = _facts(self.header)
        if any(_facts({**self.header, **row}).get(name) != value for name, value in facts.items()):
            return False
        return not self.anew or all(row.get(name) == self.header.get(name) for name in ("commit", "code"))

    def of_other_code(self) -> int:
        """How many finished rows other code than this measured."""
        names = ("commit", "code")
        return sum(
            "failed" not in row and any(name in row and row[name] != self.header.get(name) for name in names)
            for row in self.rows
        )

    def add(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Records one row, in place of an older one with the same key, and writes the file.

        The row says which commit, code and command measured it: a file that was resumed holds rows of several.
        """
        names = ("commit", "code", "command")
        origin: dict[str, Any] = {name: self.header[name] for name in names if name in self.header}
        self.store.put([{**key, **figures, **origin}], lambda old, _: _superseded(old, key), behind=True)
        self.write()

    def write(self) -> None:
        """Replaces the file: :meth:`Store.write`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.store.write(json_text({**self.header, "updated": now, "rows": self.rows}, indent=1) + "\n")


ORIGIN = ("commit", "code", "versions", "device")
"""What of the header a row keeps where a later run's differs."""


def _facts(header: Mapping[str, Any]) -> dict[str, Any]:
    """What makes times, and rounding, comparable: the versions, and the device but for its system's name."""
    device = {name: value for name, value in (header.get("device") or {}).items() if name != "system"}
    return {**(header.get("versions") or {}), **device}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A results file.  Raises ``ValueError`` for one that is missing, broken, or of another schema."""
    return read_rows(path, SCHEMA, "kind")


def describe(device: str, command: list[str]) -> dict[str, Any]:
    """The circumstances that belong beside every number: device, driver, versions, commit, command line.

    Of an absolute path on the command line only the name is kept: the folders of one machine say nothing elsewhere.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("kvsim", "torch", "triton", "transformers"):
        versions[package] = _version(package)
    words = [Path(word).name if Path(word).is_absolute() else word for word in command]
    about = {"commit": _commit(), "code": code_sha256()}
    return {"device": _device(device), "versions": versions, **about, "command": words}


def code_sha256(patterns: Sequence[str] = CODE) -> str:
    """SHA-256 of the source files that measure, names included: two states of a checkout have one commit."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _has(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in key.items())


def _superseded(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Whether the row has this key, or had it before keys said as much as they do."""
    return _has(row, {name: value for name, value in key.items() if name in row or name not in LATER})


LATER = ("model_sha256", "cache_dtype", "package_version", "max_seq_len", "repeats", "tries_splits")
"""Parts of keys that rows of earlier files lack."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package != "kvsim":
            return None
        from kvsim import __version__

        return __version__


def _device(device: str) -> dict[str, Any]:
    import torch

    if torch.device(device).type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return {
            "name": facts.name,
            "total_nbytes": facts.total_memory,
            "capability": f"{facts.major}.{facts.minor}",
            "cuda": torch.version.cuda,
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
        }
    return {"name": _cpu_name(), "threads": torch.get_num_threads(), "system": platform.platform()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if commit is None:
        return None
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _output(command: list[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
