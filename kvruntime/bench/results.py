"""Results on disk: one JSON object, rewritten atomically after every measurement, so that no run is ever lost."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = "kvruntime.bench/1"

Row = dict[str, Any]


class Results:
    """The rows of one file.  A row is its *key* (what was asked for) and its figures, in one flat object.

    ``resume`` takes over the rows of an existing file, if it was recorded on the same device; without it the first
    writing keeps an existing file beside as ``.old``.  ``anew`` takes over too, but takes for done only what this
    commit measured.  Raises ``ValueError`` for a path that cannot be written, a file that is not of this schema, or one
    of another device.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: Mapping[str, Any], *, resume: bool = False, anew: bool = False
    ) -> None:
        self.path, self.anew = Path(path), anew
        self.header = {"schema": SCHEMA, **header}
        self.rows: list[Row] = []
        check_writable(self.path)
        self._keep = self.path.exists() and not (resume or anew)
        if self.path.exists() and not self._keep:
            self.rows = self._taken_over()

    def _taken_over(self) -> list[Row]:
        old = read(self.path)
        here, there = (head.get("device", {}).get("name") for head in (self.header, old))
        if here != there:
            raise ValueError(f"{self.path} was recorded on {there}, this is {here}: give another --out")
        if old.get("commit") != self.header.get("commit"):
            self.header["resumed_from_commit"] = old.get("commit")
        return list(old["rows"])

    def done(self, key: Mapping[str, Any]) -> bool:
        """Whether a row with this key has its figures already (a failed one has none)."""
        mine = {"commit": self.header.get("commit")} if self.anew else {}
        return any("failed" not in row and _has(row, {**key, **mine}) for row in self.rows)

    def add(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Records one row, in place of an older one with the same key, and writes the file.

        The row says which commit and command measured it: a file that was resumed holds rows of several.
        """
        origin: dict[str, Any] = {name: self.header[name] for name in ("commit", "command") if name in self.header}
        self.rows = [row for row in self.rows if not _has(row, key)] + [{**key, **figures, **origin}]
        self.write()

    def write(self) -> None:
        """Replaces the file in one step: a reader, or a kill at any moment, finds the old or the new one whole."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({**self.header, "updated": now, "rows": self.rows}, indent=1)
        new = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            with new.open("w", encoding="utf-8") as file:  # with the permissions that any new file gets
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            if self._keep:  # only now: a run refused for its other options has not touched it
                shutil.copy2(self.path, self.path.with_name(self.path.name + ".old"))
                self._keep = False
            os.replace(new, self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A results file.  Raises ``ValueError`` for one that is missing, broken, or of another schema."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read results {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"results {path} are not valid JSON: {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}: expected {SCHEMA!r}")
    return found


def check_writable(path: Path) -> None:
    """Raises ``ValueError`` unless a file can be written (and replaced) at ``path``."""
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent):
            pass
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def describe(device: str, command: list[str]) -> dict[str, Any]:
    """The circumstances that belong beside every number: device, driver, versions, commit, command line.

    Of an absolute path on the command line only the name is kept: the folders of one machine say nothing elsewhere.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("kvsim", "torch", "triton", "transformers"):
        versions[package] = _version(package)
    words = [Path(word).name if Path(word).is_absolute() else word for word in command]
    return {"device": _device(device), "versions": versions, "commit": _commit(), "command": words}


def _has(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in key.items())


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
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    commit = _output(["git", "-C", str(here), "rev-parse", "HEAD"])
    if commit is None:
        return None
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _output(command: list[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
