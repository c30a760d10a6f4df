"""Which test reaches which line, and tests run in a fork of a process that has the libraries already.

A run of pytest pays seconds for PyTorch and transformers before the first test.  Here one process imports them once;
each run is a child of it that reads the project's own code from a folder.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

LIBRARIES = ("torch", "triton", "transformers", "numpy", "hypothesis", "pytest", "click")
OURS = ("kvsim", "kvruntime", "validation")


def warm() -> None:
    """Imports what the tests import, so that children have it."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # tests/conftest.py, before Triton is imported
    torch.set_num_threads(1)
    for name in LIBRARIES:
        import_module(name)


def run_tests(folder: Path, tests: Sequence[str], seconds: float, plugins: Sequence[Any] = ()) -> int | None:
    """pytest's exit code for ``tests`` of the tree in ``folder``; None where it took longer than ``seconds``.

    The child's output is in ``folder / "pytest.log"``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
        child = os.fork()
    if not child:
        code = 70
        try:
            code = _in_child(folder, tests, plugins)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(folder: Path, tests: Sequence[str], plugins: Sequence[Any]) -> int:
    os.setpgid(0, 0)
    gc.freeze()  # what the parent left in cycles ends with it: a CUDA graph cannot end in another process
    log = os.open(folder / "pytest.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    root = str(Path(__file__).resolve().parents[2])
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in ("", root, str(folder)))]
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    os.chdir(folder)
    pytest = import_module("pytest")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


class Lines:
    """A plugin of pytest: the lines of some files that each test executes, and how long it takes, into a JSON file."""

    def __init__(self, files: Sequence[Path], out: Path) -> None:
        self.files = {str(file): set() for file in files}  # type: dict[str, set[int]]
        self.out, self.tests = out, {}  # type: ignore[var-annotated]

    def pytest_runtest_protocol(self, item: Any) -> None:
        """A test begins: the lines of the one before are kept."""
        self._end()
        self.name, self.started = item.nodeid, time.monotonic()
        sys.settrace(self._trace)

    def pytest_sessionfinish(self) -> None:
        """The last one ended."""
        self._end()
        self.out.write_text(json.dumps(self.tests), encoding="utf-8")

    def _end(self) -> None:
        sys.settrace(None)
        if hasattr(self, "name"):
            reached = {file: sorted(lines) for file, lines in self.files.items() if lines}
            self.tests[self.name] = {"seconds": round(time.monotonic() - self.started, 3), "lines": reached}
        for lines in self.files.values():
            lines.clear()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        lines = self.files.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)

        def each(frame: FrameType, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            return each

        return each


def covered(folder: Path, modules: Sequence[str], tests: Sequence[str], seconds: float) -> dict[str, Any]:
    """Test -> its ``seconds`` and the ``lines`` of each of ``modules`` that it reaches.

    Raises ``RuntimeError`` where a test of the tree as it is fails.
    """
    found: dict[str, Any] = {}
    for test in tests:
        out = folder / "lines.json"
        code = run_tests(folder, [test], seconds, [Lines([folder / module for module in modules], out)])
        if code not in (0, 5):  # 5: there is none
            log = (folder / "pytest.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{test} fails on the tree as it is:\n{log[-2000:]}")
        for name, of in json.loads(out.read_text(encoding="utf-8")).items():
            lines = {str(Path(file).relative_to(folder)): reached for file, reached in of["lines"].items()}
            found[name] = {"seconds": of["seconds"], "lines": lines}
    return found


def reaching(cover: Mapping[str, Any], module: str, lines: range, seconds: float) -> Iterator[str]:
    """The tests that reach one of ``lines`` of ``module``, the quickest first, up to ``seconds`` of them together; the
    quickest in any case."""
    wanted, spent = set(lines), 0.0
    hits = [(of["seconds"], name) for name, of in cover.items() if wanted & set(of["lines"].get(module, ()))]
    for number, (took, name) in enumerate(sorted(hits)):
        spent += took
        if number and spent > seconds:
            return
        yield name
