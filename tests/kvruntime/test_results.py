"""The results file: atomic, resumable, honest about what failed; and what a cache is weighed by."""

import functools
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from kvruntime.bench.harness import results as results_module  # noqa: E402
from kvruntime.bench.harness.results import SCHEMA, Results, read  # noqa: E402
from kvruntime.bench.harness.store import Store  # noqa: E402
from kvruntime.bench.harness.tasks import Interruption, Task, run  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.bench.model.caches import ours, stock  # noqa: E402
from kvruntime.bench.model.peers import package_version  # noqa: E402
from kvruntime.bench.model.report import tables  # noqa: E402
from kvruntime.bench.model.tasks import subject  # noqa: E402
from kvsim.methods import Kivi  # noqa: E402

HEADER = {"device": {"name": "card"}, "commit": None}
ROOT = Path(__file__).resolve().parents[2]


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
    with pytest.raises(Interruption) as stop:
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
    with pytest.raises(Interruption):
        run(counted(count, (1, KeyboardInterrupt())), Results(path, HEADER | {"commit": "two"}, anew=True))
    assert sorted((row["value"], row["commit"]) for row in read(path)["rows"]) == [(0, "two"), (1, "one"), (2, "one")]
    run(counted(count), Results(path, HEADER | {"commit": "two"}, anew=True))
    assert count == [0, 1, 2, 0, 1, 1, 2]
    assert {row["commit"] for row in read(path)["rows"]} == {"two"}


VERSIONS = {"torch": "2.13", "triton": None}
HERE = {"device": {"name": "card", "driver": "1", "system": "a"}, "versions": VERSIONS, "commit": "c", "code": "k"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"versions": VERSIONS | {"torch": "2.14"}}, "recorded with torch 2.13, this is torch 2.14: --anew measures"),
        ({"versions": VERSIONS | {"triton": "3.6"}}, "triton None, this is triton 3.6"),
        ({"device": {"name": "card", "driver": "2"}}, "driver 1, this is driver 2"),
        ({"device": {"name": "other"}}, "recorded on card, this is other"),
    ],
)
def test_resume_is_of_the_same_versions_and_device(tmp_path, changed, message):
    """Each row that is taken over under ``anew`` says what it was measured with, and is measured again."""
    path, count = tmp_path / "r.json", []
    run(counted(count), Results(path, HERE))
    with pytest.raises(ValueError, match=message):
        Results(path, HERE | changed, resume=True)
    if "card" in str(changed) or "versions" in changed:
        with pytest.raises(Interruption):
            run(counted(count, (1, KeyboardInterrupt())), Results(path, HERE | changed, anew=True))
        name = next(iter(changed))
        assert [row.get(name, changed[name]) for row in read(path)["rows"]] == [HERE[name], HERE[name], changed[name]]
        run(counted(count), Results(path, HERE | changed, resume=True))  # the rest is still the other's
        assert count == [0, 1, 2, 0, 1, 1, 2]


def test_resume_after_another_kernel_of_the_system(tmp_path):
    path, count = tmp_path / "r.json", []
    run(counted(count), Results(path, HERE))
    run(counted(count), Results(path, HERE | {"device": HERE["device"] | {"system": "b"}}, resume=True))
    assert count == [0, 1, 2]


def test_two_states_of_a_checkout_have_one_commit(tmp_path, capsys):
    """``--resume`` says that the rows are of other code, ``--anew`` measures them again."""
    path, count = tmp_path / "r.json", []
    run(counted(count), Results(path, HERE))
    run(counted(count), Results(path, HERE | {"code": "other"}, resume=True))
    assert count == [0, 1, 2]
    assert "3 rows there are of other code than this: --anew" in capsys.readouterr().err
    run(counted(count), Results(path, HERE | {"code": "other"}, anew=True))
    assert count == [0, 1, 2] * 2
    assert [row["code"] for row in read(path)["rows"]] == ["other"] * 3


def test_the_code_is_every_source_file(tmp_path, monkeypatch):
    (tmp_path / "kvsim" / "catalog").mkdir(parents=True)
    (tmp_path / "kvsim" / "a.py").write_text("1")
    monkeypatch.setattr(results_module, "ROOT", tmp_path)
    found = [results_module.code_sha256()]
    for name, content in (("kvsim/a.py", "2"), ("kvsim/b.py", ""), ("kvsim/catalog/x.json", "{}")):
        (tmp_path / name).write_text(content)
        found.append(results_module.code_sha256())
    (tmp_path / "kvsim" / "notes.md").write_text("")
    assert len(set(found)) == 4
    assert found[-1] == results_module.code_sha256()


def test_a_row_of_before_keys_said_more_is_replaced(tmp_path):
    path = tmp_path / "r.json"
    Results(path, HEADER).add({"kind": "memory", "model": "tiny", "num_tokens": 8}, {"nbytes": 1})
    results = Results(path, HEADER, resume=True)
    key = {"kind": "memory", "model": "tiny", "model_sha256": "a", "num_tokens": 8}
    assert not results.done(key)
    results.add(key, {"nbytes": 2})
    results.add(key | {"model_sha256": "b"}, {"nbytes": 3})
    assert [row["nbytes"] for row in read(path)["rows"]] == [2, 3]


def test_the_key_says_what_the_names_leave_out():
    """The type of the exact tokens, another library's version."""
    loaded = SimpleNamespace(source=SimpleNamespace(name="n", weights="w"), dtype="float32", sha256="s")
    keys = [subject(loaded, ours(Kivi(dtype=dtype)), 0) for dtype in ("float16", "bfloat16")]
    assert keys[0]["method"] == keys[1]["method"]
    assert keys[0] != keys[1]
    assert subject(loaded, stock(), 0)["package_version"] == package_version("transformers")


def test_figures_that_are_no_numbers_are_a_failed_row(tmp_path):
    """Wherever in the row, of our own and of a guest; none of them reaches the file."""
    for number, value in enumerate((math.nan, [1.0, math.inf], {"a": [{"b": -math.inf}]})):
        task = Task({"kind": "test", "number": number}, lambda tick, value=value: {"value": value}, guest=number > 0)
        rows = run([task], Results(tmp_path / "r.json", HEADER, resume=True))
        assert re.match(r"value(\[1\]|\.a\[0\]\.b)? is -?(nan|inf): ", rows[0]["failed"])
    text = (tmp_path / "r.json").read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    results = Results(tmp_path / "r.json", HEADER)
    results.rows.append({"kind": "test", "value": math.nan})
    with pytest.raises(ValueError, match=r"rows\[0\]\.value is nan: JSON holds finite numbers only"):
        results.write()
    assert (tmp_path / "r.json").read_text() == text
    (tmp_path / "r.json").write_text(text.replace('"number": 1', '"number": NaN'))
    with pytest.raises(ValueError, match="not valid JSON: NaN is no number"):
        read(tmp_path / "r.json")


def test_want_of_memory_on_the_cpu_is_a_failed_row(tmp_path):
    def measure(tick):
        return {"value": torch.empty(1 << 60, dtype=torch.uint8).numel()}

    rows = run([Task({"kind": "test"}, measure)], Results(tmp_path / "r.json", HEADER))
    assert rows[0]["failed"] == "out of memory"


def test_two_runs_into_one_file_are_refused(tmp_path):
    path = tmp_path / "r.json"
    first, second = (Results(path, HEADER) for _ in range(2))
    first.add({"kind": "test", "number": 0}, {"value": 0})
    with pytest.raises(ValueError, match=r"r\.json was changed by another run meanwhile"):
        second.add({"kind": "test", "number": 1}, {"value": 1})
    first.add({"kind": "test", "number": 2}, {"value": 2})
    assert [row["value"] for row in read(path)["rows"]] == [0, 2]
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]


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


def test_rows_are_put_by_key_in_place_or_behind():
    for behind, want in ((False, ["0a", "1z", "2a", "3z"]), (True, ["0a", "2a", "1z", "3z"])):
        store = Store(None, SCHEMA, "kind")
        store.rows = [{"n": 0, "by": "a"}, {"n": 1, "by": "a"}, {"n": 1, "by": "b"}, {"n": 2, "by": "a"}]
        store.put([{"n": n, "by": "z"} for n in (1, 3)], lambda old, row: old["n"] == row["n"], behind=behind)
        assert [f"{row['n']}{row['by']}" for row in store.rows] == want
        store.write("")  # in memory alone


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
    for name, value in (("device", "x"), ("device", None), ("versions", [1])):
        path.write_text(json.dumps({"schema": SCHEMA, "rows": [], name: value}))
        with pytest.raises(ValueError, match=re.escape(f"is damaged: its {name} is {value!r}")):
            Results(path, HEADER, resume=True)
    with pytest.raises(ValueError, match="cannot write"):
        Results(path / "below" / "r.json", HEADER)


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "r.json"
    script = (
        "from kvruntime.bench.harness.results import Results\n"
        f"results = Results({str(path)!r}, {HEADER!r})\n"
        "for number in range(10**9): results.add({'kind': 'test', 'number': number % 50}, {'pad': 'x' * 20000})\n"
    )
    for pause in (0.01, 0.03, 0.05):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
        while not (path.exists() and path.stat().st_size > 100_000) and process.poll() is None:
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


def test_weighing_opens_what_a_packed_tensor_is_made_of():
    class Packed(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale):
            return torch.Tensor._make_wrapper_subclass(cls, (100,), dtype=torch.float32)

        def __init__(self, codes, scale):
            self.codes, self.scale = codes, scale

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    assert weigh([Packed(torch.zeros(25, dtype=torch.int8), torch.zeros(2)), torch.empty(9, device="meta")]) == 25 + 8
