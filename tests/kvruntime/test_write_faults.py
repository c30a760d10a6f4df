"""Every file that kvruntime and validation write, with a fault at each step of writing it, one after the other.

A step is the making of a folder or a file, a write, a sync, a rename.  At each the disk is full, the permission is
gone, or the process is killed (and cleans up nothing).  Then: the old file is whole or the new one is, an error is one
line and exit code 2, and the same command afterwards ends well.
"""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from made_up_pull import pull_of_made_up
from write_faults import ERRORS, Killed, everything, failing, remove_all, steps, visible

from kvruntime import cli, commands
from kvruntime.bench.given import finish
from kvruntime.bench.harness.results import Results
from kvruntime.bench.harness.tasks import Task
from kvruntime.calibrate import card
from kvruntime.checkpoints.pull import pulled
from kvsim.latency.constants import constants
from validation import cli as validation_cli
from validation.claims import speed
from validation.claims import tasks as validation_tasks
from validation.documents import figures
from validation.latency import study
from validation.planners import compare
from validation.report import pages

HEADER = {"device": {"name": "card"}, "commit": None}


def torture(capsys, place, act, whole, prepare=lambda: None, program="kvruntime", kept=()):
    """Runs ``act`` with every fault at every step; ``whole(files)`` says whether the final names hold whole files.

    An error leaves no file beside those of before, of a good run, and ``kept``.
    """

    def start():
        remove_all(place)
        prepare()

    start()
    codes = []
    found = steps(place, lambda: codes.append(act()), every=True)
    assert codes == [0]
    assert len(found) >= 3, found
    good = everything(place)
    assert whole(good)
    capsys.readouterr()
    for at in found:
        for name, raised in ERRORS.items():
            start()
            before = everything(place)
            with failing(place, at, name):
                if name == "killed":
                    with pytest.raises(Killed):
                        act()
                else:
                    assert act() == 2, (at, name)
                    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
                    assert len(lines) == 1, lines
                    assert lines[0].startswith(f"{program}: error: ")
                    assert raised().strerror in lines[0], lines
            after = everything(place)
            assert whole(after, before), (at, name, sorted(after))
            if name != "killed":
                assert after.keys() <= {*before, *good, *kept}, at
            assert act() == 0, (at, name)
            assert visible(everything(place)) == visible(good), (at, name)
            assert whole(everything(place))
            capsys.readouterr()
    return len(found)


def old_or_new(old, *names):
    """Each of ``names`` is absent only where it was; it is ``old`` or what a run writes, JSON where it is so named."""

    def whole(files, before=None):
        for name in names:
            if name not in files:
                if before is None or name in before:
                    return False
            elif files[name] != old and name.endswith(".json"):
                json.loads(files[name])
            elif files[name] != old:
                assert files[name].endswith(b"end"), files[name]
        return True

    return whole


@pytest.mark.parametrize("words", [[], ["--resume"]], ids=["new", "resume"])
def test_results_of_a_benchmark(capsys, tmp_path, monkeypatch, words):
    """Rows stay whole and in order, the file of before is kept beside; ``--resume`` measures the rest only."""
    path, measured = tmp_path / "place" / "r.json", []

    def bench(methods, **given):
        def task(number):
            return Task({"kind": "test", "number": number}, lambda tick: measured.append(number) or {"value": number})

        results = Results(given["out"], HEADER, resume=given["resume"])
        return finish([task(number) for number in range(3)], results, lambda rows: "")

    def prepare():
        Results(path, HEADER).add({"kind": "test", "number": 0}, {"value": 0})
        measured.clear()

    def whole(files, before=None):
        for name, content in files.items():
            if not name.startswith("."):
                rows = json.loads(content)["rows"]
                assert [row["value"] for row in rows] == list(range(len(rows)))
        return "r.json" in files and (before is not None or len(json.loads(files["r.json"])["rows"]) == 3)

    def act():
        held = len(json.loads(path.read_bytes())["rows"]) if words else 0
        measured.clear()
        code = cli.run(["bench", "--out", str(path), *words])
        assert measured == list(range(held, held + len(measured)))
        return code

    monkeypatch.setattr(commands, "bench", bench)
    torture(capsys, tmp_path / "place", act, whole, prepare)


def test_plots(capsys, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, out, **named: out.write(b"picture end"))
    row = {"kind": "quality", "model": "m", "weights": "w", "dtype": "d", "text": "t", "method": "fp16", "ppl": 1.0}
    about = {"device": {"name": "card"}, "versions": {}}
    results, place = tmp_path / "r.json", tmp_path / "place"
    Results(results, about).add(row | {"num_tokens": 1}, {})

    def prepare():
        (place / "quality.png").write_bytes(b"old")

    def act():
        return cli.run(["plot", str(results), "--out", str(place)])

    whole = old_or_new(b"old", "quality.png", "summary.png")
    torture(capsys, tmp_path / "place", act, whole, prepare)


def test_a_profile(capsys, tmp_path, monkeypatch):
    path = tmp_path / "place" / "profile.json"
    monkeypatch.setattr(card, "calibrate", lambda out, *rest, **named: card.write(out, {"a": 1}))
    act = lambda: cli.run(["calibrate", "--out", str(path)])  # noqa: E731
    torture(capsys, tmp_path / "place", act, old_or_new(b"old", path.name), lambda: path.write_bytes(b"old"))


def test_a_profile_of_what_is_no_number(tmp_path):
    with pytest.raises(ValueError, match="read is nan: JSON holds finite numbers only"):
        card.write(tmp_path / "profile.json", {"read": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_pull(capsys, tmp_path, monkeypatch):
    """From nothing, and over what was damaged: afterwards it is there, whole, and nothing is left beside it."""
    place = tmp_path / "place"
    wheel = f"downloads/{pull_of_made_up(tmp_path, monkeypatch)[1].name}"  # a finished stage is kept
    monkeypatch.setenv("KVRUNTIME_CACHE", str(place))

    def whole(files, before=None):
        there = pulled("made-up") is not None
        damaged = before is not None and files.get("made-up/copy.bin") == before.get("made-up/copy.bin")
        assert there or damaged or not any(name.startswith("made-up/") for name in files)
        return there or before is not None

    def act():
        code = cli.run(["pull", "made-up"])
        if code == 0:
            assert sorted(everything(place)) == ["made-up/copy.bin", "made-up/pulled.json"]
        return code

    assert torture(capsys, tmp_path / "place", act, whole, kept=[wheel]) > 10

    def prepare():
        assert cli.run(["pull", "made-up"]) == 0
        (place / "made-up" / "copy.bin").write_bytes(b"old")

    assert torture(capsys, tmp_path / "place", act, whole, prepare, kept=[wheel]) > 10


def test_rows_of_validation(capsys, tmp_path, monkeypatch):
    path, measured = tmp_path / "place" / "rows.json", []

    def tasks(*given):
        def task(number):
            rows = [{"kind": "speed", "measured": float(number)}]
            return validation_tasks.Task(f"t{number}", 1, "t", lambda: measured.append(number) or rows)

        return [task(number) for number in range(2)]

    def whole(files, before=None):
        rows = json.loads(files["rows.json"])["rows"] if path.name in files else []
        assert [row["measured"] for row in rows] == list(range(len(rows)))
        return before is not None or len(rows) == 2

    def act():
        held = len(json.loads(path.read_bytes())["rows"]) if path.exists() else 0
        measured.clear()
        words = ["speed", "--model", "gpt2", "--device", "cpu", "--json", "--resume", "--out", str(path)]
        code = validation_cli.run(words)
        assert measured == list(range(held, held + len(measured)))
        return code

    monkeypatch.setattr(speed, "speed_tasks", tasks)
    facts = {"device_name": "card", "driver": None, "versions": {}, "commit": None, "code": "k"}
    monkeypatch.setattr("validation.recorded.circumstances", lambda *given: facts)
    torture(capsys, tmp_path / "place", act, whole, program="validation")


def test_a_report(capsys, tmp_path, monkeypatch):
    place, rows = tmp_path / "place", tmp_path / "rows.json"
    rows.write_text('{"schema": "validation/1", "rows": []}')
    names = ("agreement.png", "report.md", "report.html")
    monkeypatch.setattr(figures, "draw", lambda rows: {"agreement": b"picture end"})
    monkeypatch.setattr(pages, "markdown", lambda *given: "text end")
    monkeypatch.setattr(pages, "html", lambda *given: "page end")
    act = lambda: validation_cli.run(["report", str(rows), "--out", str(place)])  # noqa: E731
    whole = old_or_new(b"old", *names)
    torture(
        capsys, tmp_path / "place", act, whole, lambda: (place / "report.md").write_bytes(b"old"), program="validation"
    )


def test_fitted_constants(capsys, tmp_path, monkeypatch):
    place, fixed = tmp_path / "place", constants()
    table = study.table_of(fixed)
    monkeypatch.setattr(study, "study", lambda *given: (fixed, {"errors": 0.1}))
    monkeypatch.setattr(study, "absent", lambda *given: [])  # the published loads need not lie beside the checkout
    monkeypatch.setattr(study, "table_of", lambda fixed: table)
    monkeypatch.setattr(study, "fails", lambda found: [])
    monkeypatch.setattr(study, "CONSTANTS", place / "timing.json")
    monkeypatch.setattr(study, "RECORDED", place / "time" / "errors.json")
    act = lambda: validation_cli.run(["time", "--record", "--json"])  # noqa: E731
    whole = old_or_new(b"old", "timing.json", "time/errors.json")

    def prepare():
        (place / "timing.json").write_bytes(b"old")

    torture(capsys, tmp_path / "place", act, whole, prepare, program="validation")


def test_answers_of_planners(capsys, tmp_path, monkeypatch):
    record, configs = tmp_path / "place" / "planners" / "kv-bytes.json", tmp_path / "configs.json"
    configs.write_text("[]")
    monkeypatch.setattr(compare, "RECORD", record)
    monkeypatch.setattr(compare, "measure", lambda *given: {"a": 1})
    monkeypatch.setattr(compare, "table", lambda record: "")
    monkeypatch.setattr("sys.argv", ["planners", "--configs", str(configs), "--peers", str(tmp_path)])

    def act():
        try:
            compare.main()
        except SystemExit as end:
            return end.code
        return 0

    whole = old_or_new(b"old", "planners/kv-bytes.json")
    torture(capsys, tmp_path / "place", act, whole, program="validation.planners.compare")
