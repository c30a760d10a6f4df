"""The results file: atomic, resumable, honest about what failed; and what a cache is weighed by."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from kvruntime.bench.report import tables  # noqa: E402
from kvruntime.bench.results import SCHEMA, Results, read  # noqa: E402
from kvruntime.bench.run import Interrupted, Task, run  # noqa: E402
from kvruntime.bench.weigh import weigh  # noqa: E402

HEADER = {"device": {"name": "card"}, "commit": None}
ROOT = Path(__file__).resolve().parents[1]


def counted(count, fail=None):
    """Three tasks that note their number in ``count``; number ``fail[0]`` raises ``fail[1]``."""

    def task(number):
        def measure(tick):
            count.append(number)
            if fail and number == fail[0]:
                raise fail[1]
            tick(1.0)
            return {"value": number}

        return Task({"kind": "test", "number": number}, measure, guest=True)

    return [task(number) for number in range(3)]


def test_resume_does_only_the_rest(tmp_path):
    path, count = tmp_path / "r.json", []
    with pytest.raises(Interrupted) as stop:
        run(counted(count, (2, KeyboardInterrupt())), Results(path, HEADER))
    assert (stop.value.done, stop.value.total) == (2, 3)
    assert [row["value"] for row in read(path)["rows"]] == [0, 1]
    rows = run(counted(count), Results(path, HEADER, resume=True))
    assert count == [0, 1, 2, 2]
    assert [row["value"] for row in rows] == [0, 1, 2]
    assert read(path)["schema"] == SCHEMA


def test_anew_keeps_what_this_commit_measured(tmp_path):
    """Rows of another commit stay until they are measured again, so that a run that stops loses nothing."""
    path, count = tmp_path / "r.json", []
    run(counted(count), Results(path, HEADER | {"commit": "one"}))
    with pytest.raises(Interrupted):
        run(counted(count, (1, KeyboardInterrupt())), Results(path, HEADER | {"commit": "two"}, anew=True))
    assert sorted((row["value"], row["commit"]) for row in read(path)["rows"]) == [(0, "two"), (1, "one"), (2, "one")]
    run(counted(count), Results(path, HEADER | {"commit": "two"}, anew=True))
    assert count == [0, 1, 2, 0, 1, 1, 2]
    assert {row["commit"] for row in read(path)["rows"]} == {"two"}


def test_a_failed_guest_is_a_row_and_is_tried_again(tmp_path):
    path, count = tmp_path / "r.json", []
    run(counted(count, (1, RuntimeError("no\nkernel"))), Results(path, HEADER))
    assert [row.get("failed") for row in read(path)["rows"]] == [None, "RuntimeError: no", None]
    assert "failed: test" in tables(read(path)["rows"])
    run(counted(count), Results(path, HEADER, resume=True))
    assert count == [0, 1, 2, 1]
    assert sorted(row["value"] for row in read(path)["rows"]) == [0, 1, 2]


def test_a_failure_of_our_own_is_raised(tmp_path):
    task = Task({"kind": "test"}, lambda tick: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run([task], Results(tmp_path / "r.json", HEADER))
    assert read(tmp_path / "r.json")["rows"] == []


def test_an_older_file_is_kept_beside(tmp_path):
    path = tmp_path / "r.json"
    run(counted([]), Results(path, HEADER))
    results = Results(path, HEADER)  # a run that is refused now has not touched the file
    assert len(read(path)["rows"]) == 3
    run(counted([])[:1], results)
    assert len(read(path)["rows"]) == 1
    assert len(read(tmp_path / "r.json.old")["rows"]) == 3


def test_the_file_may_be_read_by_whom_any_new_file_may(tmp_path):
    (tmp_path / "plain").write_text("")
    Results(tmp_path / "out.json", {}).write()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out.json", "plain"]
    assert (tmp_path / "out.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_refusals(tmp_path):
    path = tmp_path / "r.json"
    run(counted([]), Results(path, HEADER))
    with pytest.raises(ValueError, match="recorded on card, this is other"):
        Results(path, {"device": {"name": "other"}}, resume=True)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Results(path, HEADER, resume=True)
    path.write_text('{"schema": "x"}')
    with pytest.raises(ValueError, match="schema 'x'"):
        read(path)
    with pytest.raises(ValueError, match="is a directory"):
        Results(tmp_path, HEADER)
    with pytest.raises(ValueError, match="cannot write"):
        Results(path / "below" / "r.json", HEADER)


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "r.json"
    script = (
        "from kvruntime.bench.results import Results\n"
        f"results = Results({str(path)!r}, {HEADER!r})\n"
        "for number in range(10**9): results.add({'kind': 'test', 'number': number % 50}, {'pad': 'x' * 20000})\n"
    )
    for pause in (0.01, 0.03, 0.05):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
        deadline = time.monotonic() + 30
        while not (path.exists() and path.stat().st_size > 100_000) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rows = json.loads(path.read_text())["rows"]
        assert len(rows) > 4
        assert all(len(row["pad"]) == 20000 for row in rows)


def test_weighing_counts_storages_once_and_whole():
    big = torch.zeros(1000)

    class Slotted:
        __slots__ = ("held",)

    slotted, closed = Slotted(), torch.zeros(10)
    slotted.held = torch.zeros(7, dtype=torch.int64)

    class Holder:
        def __init__(self):
            self.view = big[3:5]  # keeps all 4000 bytes alive
            self.same = {"again": [big.view(10, 100)]}
            self.slotted = (slotted,)
            self.closure = lambda: closed
            self.partial = functools.partial(print, torch.zeros(2))
            self.model = torch.nn.Linear(50, 50)  # a model's weights are not a cache's
            self.loop = self

    assert weigh(Holder()) == 4000 + 56 + 40 + 8
