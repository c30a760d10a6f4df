"""The reliability runs, small, on this CPU; and that what they promise to find, they find."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from validation import cli  # noqa: E402
from validation.claims import phases as claimed  # noqa: E402
from validation.documents import reliability_table  # noqa: E402
from validation.reliability import memory, phases, processes, record, runs, subjects  # noqa: E402
from validation.reliability.findings import Broken, Findings  # noqa: E402
from validation.report.collection import Collection  # noqa: E402
from validation.run import parts  # noqa: E402
from validation.run.progress import RunProgress  # noqa: E402

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SMALL = subjects.CI._replace(decoded=24, sequences=14, calls=5)


def test_a_run_is_a_row_and_a_failure_another(tmp_path, monkeypatch, capsys) -> None:
    figures = [{"model": "gpt2", "measured": 1}]

    def fails(*_: Any) -> Findings:
        raise Broken("nothing\nholds", figures)

    monkeypatch.setattr(record, "RUNS", {"one": lambda *_: Findings("found"), "two": fails})
    out = tmp_path / "r.json"
    assert cli.run(["reliability", "--device", "cpu", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "holds  one: found" in said
    assert "FAILS  two: Broken: nothing (" in said
    assert cli.run(["reliability", "--device", "cpu", "--run", "one", "--out", str(out)]) == 0
    file = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["run"], row["holds"], row["size"]) for row in file["rows"]] == [
        ("one", True, "quick"),
        ("two", False, "quick"),
    ]
    assert [row.get("figures") for row in file["rows"]] == [None, figures]
    more = ["--run", "one", "--layout", "int8", "--out", str(out)]
    assert cli.run(["reliability", "--device", "cpu", *more]) == 0  # a row of its own
    assert len(json.loads(out.read_text(encoding="utf-8"))["rows"]) == 3
    capsys.readouterr()
    assert cli.run(["reliability", "--run", "three"]) == 2
    assert "unknown run 'three': allowed are one, two" in capsys.readouterr().err


def test_tokens_are_decoded_without_drift() -> None:
    said = runs.decoded(CPU, SMALL).said
    assert "24 tokens a row" in said
    assert "B exact" in said


def test_calls_in_any_order_agree_with_the_oracle() -> None:
    said = runs.fuzzed(CPU, SMALL).said
    assert "fp16: 2 sequences" in said
    assert said.count(" sequences, ") == len(subjects.every_layout())
    with pytest.raises(LookupError, match="unknown layout 'int7': allowed are fp16, "):
        runs.fuzzed(CPU, SMALL._replace(layouts=("int7",)))


def test_nan_stays_in_its_row(monkeypatch) -> None:
    monkeypatch.setattr(subjects, "every_layout", lambda scale: subjects.layouts(CPU, scale))
    assert "as without it" in runs.beside_nan(CPU, SMALL).said


def test_memory_that_ends_is_said_and_survived() -> None:
    assert "tokens would have fitted" in runs.out_of_memory(CPU, SMALL).said


RESIDENT = """
import torch
from validation.reliability import resident, subjects
from validation.reliability.findings import Broken
resident.WEIGHED = 12 << 20
own = subjects.CI._replace(layouts=("fp32", "int8"))
found = resident.resident(torch.device("cpu"), own)
assert [each["layers"] for each in found.figures] == [2, 6]
print(found.said)
resident.BAND = (1.2, 1.3)
try:
    resident.resident(torch.device("cpu"), own._replace(layouts=("fp32",)))
except Broken as error:
    print(error)
"""


def test_filled_layers_are_resident() -> None:
    """In a process of its own: one that has freed much has pages to give before it asks for more."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held, broken = done.stdout.splitlines()
    assert held.count("times as many") == 2
    assert "fp32: FAILS" in broken


def test_what_fits_fits() -> None:
    assert "do not" in memory.fits(CPU, SMALL).said


def test_memory_by_phase() -> None:
    """Every figure has the fields that its prediction is made from."""
    own = SMALL._replace(layouts=("kivi-2bit-g32-r64",))
    found = phases.phases(CPU, own)
    assert "worst" in found.said
    assert {each["phase"] for each in found.figures} == {"load", "prefill", "decode", "reuse", "beams", "growth"}
    assert not {"predicted", "error"} & set(found.figures[0])


def test_memory_is_judged_by_todays_predictions() -> None:
    """A recorded row's figures stand, its verdict is this checkout's; a figure that is 2 % off fails."""
    row = next(row for row in rows_of("nvidia-h200") if row["run"] == "memory by phase")
    found = claimed.judged(row | {"holds": False, "found": "of another day"})
    assert found["holds"]
    assert found["found"].startswith("llama-3.2-1b load: 2 figures, worst ")
    figures = [figure | {"measured": figure["measured"] * 1.02} for figure in row["figures"][:1]] + row["figures"][1:]
    off = claimed.judged(row | {"figures": figures})
    assert not off["holds"]
    assert off["found"].startswith("llama-3.2-1b load: FAILS, 2 figures, worst +2.0")
    assert off["figures"] == figures
    assert claimed.judged({"run": "two processes", "holds": False}) == {"run": "two processes", "holds": False}


def rows_of(name: str) -> list[Any]:
    path = ROOT / "validation" / "results" / "reliability" / f"{name}.json"
    rows: list[Any] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def test_the_documents_table_shows_whatever_fails() -> None:
    held = "; ".join(f"kivi-{bits}bit(fp16): {'1' * 90}" for bits in range(9))
    row = {"found": f"Broken: {held}; last-one: FAILS, OutOfMemoryError: no; reset() the cache, or give it fewer"}
    shown = reliability_table.found([row])
    assert shown.startswith("last-one: FAILS, OutOfMemoryError: no; kivi-0bit(fp16): 1")
    assert shown.endswith("; and 6 more that hold")
    cut = {"found": "llama-3  load peak 1 B", "figures": [{"model": "llama-3.2-1b"}]}
    assert reliability_table.found([cut]) == "llama-3.2-1b load peak 1 B"
    assert phases.told_of({"model": "qwen3-0.6b", "phase": "load", "what": "now", "measured": 1000, "error": 0.5}) == (
        "qwen3-0.6b load now 1,000 B, +50.00%"
    )


def test_a_killed_benchmark_goes_on() -> None:
    assert "which --resume kept" in processes.killed(CPU, SMALL).said


def test_two_processes_answer_as_one(monkeypatch) -> None:
    assert "the same tokens and bytes" in processes.together(CPU, SMALL).said


def test_a_layer_that_forgets_a_token_is_found(monkeypatch) -> None:
    """The fuzz and the drift are no decoration: a layer whose ring is off by a slot does not pass either."""
    stored = KiviLayer._store

    def wrong(self: Any, key: Any, value: Any, counts: Any, **more: Any) -> None:
        stored(self, key, value if key.shape[2] > 1 else value.flip(1), counts, **more)

    monkeypatch.setattr(KiviLayer, "_store", wrong)
    with pytest.raises(Broken, match="values of a row are not what they should") as found:
        runs.fuzzed(CPU, SMALL)
    assert re.search(r"int8: \d sequences", str(found.value))  # the others go on


def test_neighbours_of_nan_that_change_are_found(monkeypatch) -> None:
    attend = KiviLayer.attend

    def leaks(self: Any, *given: Any, **more: Any) -> Any:
        out = attend(self, *given, **more)
        return out + out.sum() * 0 if out.isnan().any() else out

    monkeypatch.setattr(KiviLayer, "attend", leaks)
    with pytest.raises(Broken, match="changes its neighbours"):
        runs.beside_nan(CPU, SMALL)


def test_the_parts_of_a_run_by_device() -> None:
    own, left = parts.chosen("cuda")
    names = [part.name for part in own]
    assert names == [part.name for part in parts.PARTS if not part.cpu]
    assert left == ["resident: it weighs a process's pages, and caches lie in the memory of cuda"]
    rounds = parts.rounds(own)
    assert [part.name for part in rounds[0]] == ["calibrate"]
    assert [[part.name for part in each] for each in rounds if len(each) > 1] == [["memory", "phases"]]
    assert sum(map(len, rounds)) == len(names)
    assert parts.chosen("cuda", ["memory", "calibrate"])[0] == [own[0], own[names.index("memory")]]
    assert sum(max(part.seconds for part in each) for each in rounds) <= 0.8 * 60 * parts.MINUTES
    here, left = parts.chosen("cpu")
    assert {"calibrate", "memory", "phases", "largest", "resident"} == {part.name for part in here}
    assert len(left) == len(parts.PARTS) - len(here)
    with pytest.raises(LookupError, match="unknown part 'all'"):
        parts.chosen("cpu", ["all"])


def test_a_part_may_say_bytes_that_are_no_text() -> None:
    """A compiler's or a driver's own words, in whatever encoding: told as far as they can be, the part's code kept."""
    said: list[str] = []
    words = [sys.executable, "-c", "import sys; sys.stderr.buffer.write(b'caf\\xe9\\n'); sys.exit(3)"]
    assert parts._process(words, 60, said.append, []) == (3, "caf\ufffd")
    assert said == ["caf\ufffd"]


def test_a_part_that_is_stopped_leaves_no_process_behind() -> None:
    """One that it began says its number and would hold the card, and the line that it writes to, for a minute."""
    said: list[str] = []
    begin = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    begun = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"
    running: list[Any] = []
    words = [sys.executable, "-c", begin, begun]

    def stop_then(line: str) -> None:
        said.append(line)
        parts._kill(running[0])

    assert parts._process(words, 60, stop_then, running)[0] == -signal.SIGKILL
    assert not running
    stat = Path("/proc", said[0], "stat")
    for _ in range(500):  # its files are closed a moment before it has ended
        if ended(stat):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {said[0]} is still there")


def ended(stat: Path) -> bool:
    """One that has ended and whom nobody has waited for is no process."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_run_ends_with_its_minutes(tmp_path, monkeypatch) -> None:
    """A part gets half as much again as it should take, more where later ones leave it, or what is left; none is begun
    after that."""
    now, limits = [0.0], []

    def process(command: Any, seconds: float, say: Any, begun: Any) -> tuple[int, str]:
        limits.append(seconds)
        now[0] += 50
        return 0, ""

    monkeypatch.setattr(parts, "clock", lambda: now[0])
    monkeypatch.setattr(parts, "_process", process)
    own = [parts.Part(name, (), 60, "", together=name == "a") for name in "bacd"]
    found = list(parts.carry_out(own, tmp_path, "card", "cpu", print, minutes=2))
    assert [[outcome.part.name for outcome in each] for each in found] == [["b"], ["a"], ["c"], ["d"]]
    assert limits == [90, 70, 20]
    assert [each[0].line for each in found][2:] == [
        "c: done in 50 s, nothing recorded",
        "d: no time was left for it",
    ]
    limits.clear()
    list(parts.carry_out(own, tmp_path, "card", "cpu", print, minutes=6))
    assert limits == [180, 190, 200, 210]


def test_a_run_that_was_cut_goes_on(tmp_path, monkeypatch, capsys) -> None:
    """What ended well is not run again, what was cut goes on in its file; without --resume everything is anew."""
    own = [parts.Part(name, (name,), 60, name, again=("more",)) for name in ("one", "two", "three")]
    ran: list[list[str]] = []

    def process(command: list[str], seconds: float, say: Any, begun: Any) -> tuple[int | None, str]:
        ran.append(command[2:-2])
        kind = command[2]
        (tmp_path / "out" / "results" / kind / "cpu.json").write_text('{"schema": "none"}')
        if kind == "two" and len(ran) < 3:
            raise KeyboardInterrupt
        return 0, ""

    monkeypatch.setattr(parts, "PARTS", tuple(own))
    monkeypatch.setattr(parts, "_process", process)
    monkeypatch.setattr("validation.report.points.collect", lambda *files: Collection())
    monkeypatch.setattr("validation.report.pages.write", lambda *given, **named: [tmp_path / "report.html"])
    monkeypatch.setattr("validation.report.records.memory_rows", lambda files: [])
    monkeypatch.setattr("validation.report.records.reliability_rows", lambda files: [])
    ask = ["run", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.run(ask) == 130
    said = capsys.readouterr()
    assert "--resume" in said.err
    assert "report.html" in said.out
    assert ran == [["one"], ["two"]]
    assert cli.run([*ask, "--resume"]) == 0
    assert "one: done before" in capsys.readouterr().err
    assert ran[2:] == [["two", "more"], ["three", "more"]]
    assert cli.run(ask) == 0
    assert ran[4:] == [["one"], ["two"], ["three"]]
    state = tmp_path / "out" / "run.json"
    state.write_text(state.read_text().replace('"code": "', '"code": "0'))
    assert cli.run([*ask, "--resume"]) == 0
    assert "is of another code: every part runs anew" in capsys.readouterr().err
    assert len(ran) == 10
    for text, why in (("{}", "is no run's"), (state.read_text().replace(": 0.0", ': "x"'), "seconds of a part")):
        state.write_text(text)
        assert cli.run([*ask, "--resume"]) == 2
        assert why in capsys.readouterr().err
    state.unlink()
    assert cli.run([*ask, "--resume"]) == 2
    assert "no run in" in capsys.readouterr().err
    state.touch()
    assert cli.run([*ask[:-1], str(state)]) == 2
    assert f"out {state} is a file: allowed is a folder" in capsys.readouterr().err


def test_a_run_begun_anew_counts_nothing_of_an_earlier_one(tmp_path, monkeypatch, capsys) -> None:
    """Also where it is cut at once.  One part alone leaves the others'; what adds to a file begun anew runs again."""
    own = [parts.Part("one", ("one",), 60, "one"), parts.Part("more", ("more",), 60, "one", extends="one")]
    own.append(parts.Part("two", ("two",), 60, "two"))
    ran: list[str] = []
    cut = [""]

    def process(command: list[str], seconds: float, say: Any, begun: Any) -> tuple[int | None, str]:
        ran.append(command[2])
        for folder in ("one", "two"):
            path = tmp_path / "out" / "results" / folder / "cpu.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"schema": "none"}')
        if command[2] == cut[0]:
            raise KeyboardInterrupt
        return 0, ""

    monkeypatch.setattr(parts, "PARTS", tuple(own))
    monkeypatch.setattr(parts, "_process", process)
    monkeypatch.setattr("validation.report.points.collect", lambda *files: Collection())
    monkeypatch.setattr("validation.report.pages.write", lambda *given, **named: [])
    monkeypatch.setattr("validation.report.records.memory_rows", lambda files: [])
    monkeypatch.setattr("validation.report.records.reliability_rows", lambda files: [])

    def run(*words: str) -> list[str]:
        ran.clear()
        cli.run(["run", "--device", "cpu", "--out", str(tmp_path / "out"), *words])
        return list(ran)

    assert run() == ["one", "more", "two"]
    assert run("--part", "two") == ["two"]
    assert run("--resume") == []
    assert run("--part", "one") == ["one"]
    assert run("--resume") == ["more"]
    cut[0] = "one"
    assert run() == ["one"]
    cut[0] = ""
    assert run("--resume") == ["one", "more", "two"]


def test_a_run_says_what_is_left_while_a_part_runs(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr("validation.run.progress.clock", lambda: now[0])
    monkeypatch.setattr("kvruntime.bench.harness.progress.clock", lambda: now[0])
    with RunProgress([100.0, 100.0]) as progress:
        progress.begin("calibrate")
        for second in (10, 20, 25, 80, 1000):
            now[0] = second
            progress.passed_on(f"at {second}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:4] == ["at 10", "at 20  about 4 min left", "at 25"]  # 1.2 times the rest
    assert lines[4:] == ["at 80  about 2 min left", "at 1000  about 2 min left"]  # never more than before


def test_a_run_reports_what_its_parts_left_behind(tmp_path, monkeypatch, capsys) -> None:
    words = ("validation", "report", "--check", "{file}")  # ends with 2: there is no such file
    own = (parts.Part("memory", words, 60, ""),)
    monkeypatch.setattr(parts, "PARTS", own)
    assert cli.run(["run", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "memory: exit code 2" in said.err
    assert "nothing recorded" in said.err
    assert "about 1 minutes" in said.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("Validation: cpu") == 2
    assert "Bytes in full" not in page  # nor what other machines recorded
    assert "No claim has a recorded figure here." in page
