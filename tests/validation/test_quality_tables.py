"""The documents' tables of quality: bars judged from rows, and the README's figures those that are recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")

from kvruntime.bench.quality.comparison import ABLATION, ablation_methods
from kvruntime.bench.quality.report import change, uncompressed
from validation.claims import quality_bars
from validation.claims.quality_bars import BARS, EXACT, QUALITY, best, candidates, exact_tokens
from validation.documents import quality_picture, quality_tables

ROOT = Path(__file__).parents[2]


def row(method: str, bits: float, *nll: float, held: float | None = None, window: int = 1024, **more: object) -> dict:
    """Windows of text with these mean losses; 132 exact tokens unless ``held``."""
    exact = bits + (16 - bits) * 132 / window
    return {
        "kind": "windows", "model": "smollm2-135m", "weights": "w", "dtype": "float16", "text": "wiki.test.raw",
        "text_sha256": "x", "window": window, "num_windows": len(nll), "num_tokens": len(nll) * (window - 1),
        "chunk": 1, "reference_chunk": 128, "bits": bits, "held_bits": exact if held is None else held, "ppl": 2.0,
        "kl": 0.1, "agreement": 0.9, "window_nll": list(nll), "by_position": [[1, window - 1, 1.0, 0.1, 0.9]],
        "method": method, "package": "kvruntime", **more,
    }  # fmt: skip


def write(folder: Path, *rows: dict) -> Path:
    file = {
        "schema": "kvruntime.bench/1",
        "device": {"name": "card"},
        "versions": {"torch": "2", "triton": "3", "transformers": "5"},
        "commit": "c0ffee",
        "command": [],
    }
    folder.mkdir(exist_ok=True)
    (folder / "card.json").write_text(json.dumps({**file, "rows": rows}))
    return folder


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_bar_takes_the_best_within_its_bits(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "quality",
        row("fp16", 16, 3.0, 3.2),
        row("good", 2.6, 3.02, 3.22),
        row("better", 2.65, 3.01, 3.21),
        row("too many bits", 2.66, 3.001, 3.201),
        row("long residual", 2.6, 3.0, 3.2, held=6),
        row("other text", 2.0, 3.0, 3.2, text="novel", text_sha256="y"),
        row("evicts", 0, 3.0, 3.2),
    )
    first, second, third, *_ = cells(quality_tables.block("bars", folder))
    assert first[3:5] == ["better", "2.650"]
    assert first[5].startswith("+1.01%")
    assert first[6] == "holds"
    assert second[3] == "not recorded"  # no window of 4,096
    assert third[3] == "too many bits"
    short = cells(quality_tables.block("bars short", folder))
    assert short[0] == ["≤ 2.65", "+1.01% (bar +2.40%: holds)", "not recorded"]
    (groups,) = candidates(folder).values()
    assert best(groups, 2.6)[0]["method"] == "good"
    prompt = {"prompt_length": 128}
    write(
        folder, row("fp16", 16, 3.0), row("x", 2.6, 3.02), row("fp16", 16, 3.1, **prompt), row("y", 2.6, 3.11, **prompt)
    )
    assert cells(quality_tables.block("bars", folder))[0][3] == "y"  # each against the uncompressed cache fed as it was
    failing = write(folder, row("fp16", 16, 3.0), row("x", 2.6, 3.034))
    assert cells(quality_tables.block("bars", failing))[0][6] == "missed by 1.06 points"


def test_exact_tokens_are_what_is_held_beyond_the_bits() -> None:
    assert exact_tokens(row("x", 2.6, 1.0)) == pytest.approx(132)
    assert exact_tokens(row("fp16", 16, 1.0)) == 1024
    assert exact_tokens(row("x", 2.6, 1.0, window=4096)) == pytest.approx(132)
    assert EXACT == 136


def test_tables_without_rows_say_so(tmp_path: Path) -> None:
    for name in ("windows", "prompted", "positions", "answers", "peers", "compared"):
        assert quality_tables.block(name, tmp_path) == "Nothing is recorded yet."
    assert cells(quality_tables.block("bars", tmp_path))[0][3] == "not recorded"
    with pytest.raises(ValueError, match="table of quality 'bar': allowed are bars, bars short, windows"):
        quality_tables.block("bar", tmp_path)


def test_a_heading_shows_few_commands(tmp_path: Path) -> None:
    runs = [{"command": ["kvruntime", name], "commit": commit} for name, commit in (("a", "x1"), ("b", "x2"))]
    few = write(tmp_path / "q", row("fp16", 16, 3.0, **runs[0]), row("x", 2, 3.0, **runs[1]))
    assert "`kvruntime a` (commit x1), `kvruntime b` (commit x2) on card" in quality_tables.block("windows", few)
    third = {"command": ["kvruntime", "c"], "commit": "x2"}
    many = write(few, row("fp16", 16, 3.0, **runs[0]), row("x", 2, 3.0, **runs[1]), row("y", 2, 3.0, **third))
    assert "3 commands, which the rows name, of commits x1, x2 on card" in quality_tables.block("windows", many)


def test_what_follows_a_long_prompt_is_judged_alone(tmp_path: Path) -> None:
    """Half of the window's loss is the prompt's, which is the same for all; the change is that of the other half."""
    long = {"window": 9, "num_windows": 2, "prompt_length": 5}
    base = {"by_position": [[1, 4, 1.0, 0, 1.0], [5, 8, 3.0, 0.0, 1.0]]}
    own = {"by_position": [[1, 4, 1.0, 0, 1.0], [5, 6, 3.3, 0.2, 0.5], [7, 8, 3.5, 0.4, 0.7]]}
    folder = write(
        tmp_path / "q", row("fp16", 16, 2.0, 2.0, **long, **base), row("x", 0, 2.2, 2.2, held=4.0, **long, **own)
    )
    said = quality_tables.block("prompted", folder)
    fp16, x = cells(said[said.index("| method") :])
    assert fp16[:5] == ["fp16", "16.000", "20.086", "", ""]
    assert x == ["x", "4.000", "29.964", "+49.18%", "+49.18% to +49.18%", "0.3000", "60.00%"]
    assert quality_tables.block("windows", folder) == "Nothing is recorded yet."
    assert candidates(folder) == {}


def test_other_libraries_stand_beside_the_best_of_no_more_bits(tmp_path: Path) -> None:
    library = {"package": "hqq"}
    folder = write(
        tmp_path / "q",
        row("fp16", 16, 3.0, 3.2),
        row("hqq-2bit", 2.5, 3.3, 3.5, held=2.6, **library),
        row("hqq-4bit", 4.5, 3.01, 3.2, held=4.6, **library),
        row("kivi-2bit-g64-r128", 2.5, 3.2, 3.4),
        row("small", 2.5, 3.1, 3.3),
        row("better, larger", 2.6, 3.0, 3.2),
        row("coded", 2.25, 3.4, 3.4, held=2.25),
    )
    found = {(theirs, counted): rest for _, theirs, counted, *rest in cells(quality_tables.block("peers", folder))}
    assert found["hqq-2bit", "bits 2.500"][1:] == ["small", "2.500", "+10.52%", "ahead (-18.1%)"]
    assert found["hqq-2bit", "bits held 2.600"][1:3] == ["coded", "2.250"]
    assert found["hqq-2bit", "bits held 2.600"][4].startswith("level")
    assert found["hqq-4bit", "bits 4.500"][1] == "better, larger"
    assert found["hqq-4bit", "bits held 4.600"][1:] == ["better, larger", "4.327", "+0.00%", "level (-0.5%)"]
    assert found["kivi-2bit-g64-r128", "bits 2.500"][1] == "small"
    longer = [row("fp16", 16, 3.0, 9.0), row("long", 2.4, 2.9, 9.0), row("other", 2.4, 2.9, 9.0, prompt_length=128)]
    write(folder, row("fp16", 16, 3.0), row("hqq-2bit", 2.5, 3.3, **library), row("small", 2.4, 3.1), *longer)
    assert cells(quality_tables.block("peers", folder))[0][4:7] == ["long", "2.400", "-9.52%"]  # its first window
    folder = write(folder, row("fp16", 16, 3.0), row("hqq-2bit", 2.5, 3.3, kernel="unfused", **library))
    assert quality_tables.block("windows", folder).endswith("kernels: hqq-2bit: unfused")
    bare = write(folder, row("fp16", 16, 3.0), row("x", 2.0, 3.0), row("quanto", 1.5, 3.1, **library))
    assert {tuple(line[4:]) for line in cells(quality_tables.block("peers", bare))} == {
        ("none of so few", "", "", "not judged"),
        ("none of so few", "", "", "not judged"),
    }


def test_what_the_report_holds_of_quality(tmp_path: Path) -> None:
    """A bar that is missed, a library ahead of ours, and windows without one: each fails."""
    library, long = {"package": "hqq"}, {"window": 4096}
    held = [row("fp16", 16, 3.0, 3.2), row("x", 2.5, 3.001, 3.201), row("hqq", 2.5, 3.1, 3.3, **library)]
    far = [row("fp16", 16, 2.0, 2.2, **long), row("x", 2.5, 2.001, 2.201, **long)]
    theirs = row("hqq", 2.5, 2.1, 2.3, **long, **library)

    def judged(*rows: dict) -> tuple[list[str], str]:
        folder = write(tmp_path / "q", *rows)
        given = quality_bars.bars(folder), quality_bars.besides(folder)
        return quality_bars.broken(*given), quality_bars.kept(*given)

    assert judged(*held, *far, theirs) == (
        [],
        "All 8 bars of quality hold as recorded; of 4 comparisons at equal bits with other libraries and plain KIVI "
        "4 are ahead, 0 level, none behind.",
    )
    assert judged(*held, *far)[0] == ["windows of 4,096: no other library is recorded"]
    better = row("hqq", 2.5, 2.0005, 2.2005, **long, **library)
    wrong, said = judged(*held, *far, better)
    assert wrong == [f"hqq, {name}, windows of 4,096: x is behind" for name in ("bits 2.500", "bits held 2.935")]
    assert said.startswith("Quality FAILS in 2 of 12 verdicts as recorded: hqq, bits 2.500")
    few = row("hqq", 2.25, 2.1, 2.3, **long, **library)
    assert judged(*held, *far, few)[1].endswith("none behind, 2 not judged (none of ours holds so few).")
    lossy = row("x", 2.5, 2.04, 2.24, **long)
    assert judged(*held, far[0], lossy, theirs)[0][0] == "≤ 2.65 bits, windows of 4,096: missed by 0.78 points"


def test_every_bar_and_comparison_that_is_recorded_holds() -> None:
    assert quality_bars.broken(quality_bars.bars(), quality_bars.besides()) == []


def test_what_is_compared_has_speeds_where_they_are_recorded(tmp_path: Path) -> None:
    rows = [row("fp16", 16, 3.0, 3.2, elements=1000), row("x", 2, 3.01, 3.21, elements=1000)]
    mixed = row("mix-l1(y,z)", 1.5, 3.0, 3.2, elements=1000)
    folder = write(tmp_path / "quality", *rows, mixed)
    said = quality_tables.block("compared", folder)
    assert "tok/s" not in said
    assert "mix" not in said
    assert "3.0%: x (+1.01%, 8.00x fewer bytes than fp16)" in said
    speed = {
        "kind": "speed", "model": "smollm2-135m", "weights": "w", "dtype": "float16", "batch_size": 32,
        "prompt_tokens": 512, "decode_tokens": 64, "repeats": 3,
    }  # fmt: skip
    speeds = [
        {**speed, "method": name, "tokens_per_second": [rate] * 3} for name, rate in (("fp16", 10.0), ("x", 12.0))
    ]
    said = quality_tables.block("compared", write(folder, *rows, *speeds))
    assert "| x | 250 | +1.01% |" in said
    assert "1.20x" in said
    assert "3.0%: x (+1.01%, 8.00x fewer bytes than fp16, 1.20x its speed)" in said


def test_the_ablation_says_how_much_of_it_is_there(tmp_path: Path) -> None:
    names = [method.name for method in ablation_methods()]
    rows = [
        row(name, 2.5 if place else 16, 2 + place / 100, 2.1 + place / 100, kind=ABLATION)
        for place, name in enumerate(["fp16", *names])
    ]
    said = quality_tables.block("ablation", write(tmp_path / "q", *rows))
    assert "16 of 16 combinations" in said
    assert "| group_size | 32 |" in said
    few = quality_tables.block("ablation", write(tmp_path / "r", *rows[:-1]))
    assert "15 of 16 combinations" in few
    assert "group_size" not in few
    assert quality_tables.block("ablation", write(tmp_path / "s", *rows[:0])) == "Nothing is recorded yet."


def test_the_pictures_name_what_is_recorded() -> None:
    drawn, found = quality_picture.NEEDLES.read_text(encoding="utf-8"), quality_picture.needles()
    assert {row["length"] for row in found} == {1024, 2048, 4096}
    assert all(f">{row['method']}<" in drawn for row in found)
    picture = quality_picture.PICTURE.read_text(encoding="utf-8")
    _, rows = quality_picture.shown()
    assert len(rows) > 15
    assert all(f">{each['method']}<" in picture for each in rows)
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in text for path in (quality_picture.PICTURE, quality_picture.NEEDLES))


def test_recorded_answers_come_with_what_they_are_worth(tmp_path: Path) -> None:
    task = {
        "kind": "answers", "task": "needle", "model": "m", "weights": "w", "dtype": "float16", "num_examples": 2,
        "examples_sha256": "1", "length": 1024, "depth": 0.5, "scores": [1.0, 0.0],
    }  # fmt: skip
    said = quality_tables.block("answers", write(tmp_path / "q", {**task, "method": "fp16"}, {**task, "method": "x"}))
    assert "Needles discriminate little" in said
    assert "50.0%" in said
    assert "without" not in said
    second = {**task, "examples_sha256": "2", "length": 2048}
    rows = [{**each, "method": name} for each in (task, second) for name in ("fp16", "x", "y")][:-1]
    said = quality_tables.block("answers", write(tmp_path / "q", *rows))
    assert "2 examples that all methods answered" in said
    assert "4 examples, without y:" in said


def test_what_is_recorded_is_of_the_whole_split() -> None:
    """Both lengths of window, every bar with a method, one token a step, a floor far below every method."""
    found = candidates(QUALITY)
    assert set(found) == {1024, 4096}
    for window, groups in found.items():
        assert all(best(groups, bits) is not None for bits, _ in BARS), window
    for group in (group for groups in found.values() for group in groups):
        base = uncompressed(group)
        assert base is not None
        assert base["num_tokens"] > 300_000
        assert {row["chunk"] for row in group} == {1}
        assert base["kl"] < 1e-4
        assert base["agreement"] > 0.99
        for row in group:
            assert row is base or row["kl"] > 20 * base["kl"]  # of int8 30 times


def test_the_readme_says_what_is_recorded() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"plain KIVI's 2\.5 bits cost \+([\d.]+) %, its 3\.0 bits \+([\d.]+) % "
        r"and `kivi-boost`'s 2\.6 bits \+([\d.]+) %; in windows of 4,096 `kivi-boost` costs \+([\d.]+) %\.",
        text,
    )
    assert said is not None
    found = candidates(QUALITY)
    wanted = [(1024, "kivi-2bit-g64-r128"), (1024, "kivi-2bit-g32-r128")]
    wanted += [(window, "kivi-k2+2v2-rotv-g64-r128-s4") for window in (1024, 4096)]
    for words, (window, method) in zip(said.groups(), wanted, strict=True):
        group, row = next(
            (group, row) for group in found[window] for row in group if row["method"] == method
        )  # of the longest prompt
        off = change(row, uncompressed(group))
        assert off is not None
        assert words == f"{100 * off[0]:.1f}"


def test_tasks_of_lm_eval_are_a_table_each_with_what_ran_them(tmp_path: Path) -> None:
    about = {"kind": "lm-eval", "model": "m", "weights": "w", "dtype": "float32", "limit": 4, "lm_eval": "0.4.13"}
    rows = [
        {**about, "task": task, "num_examples": {task: 4}, "method": method, "command": [method, task],
         "metrics": {task: {"acc,none": score, "acc_stderr,none": 0.25}}}
        for task in ("one", "two") for method, score in (("fp16", 0.5), ("kivi", 0.25))
    ]  # fmt: skip
    first, *_, second, table = quality_tables.block("harness", write(tmp_path, *rows)).split("\n\n")
    assert "m, weights: w, float32; one of lm_eval 0.4.13, 4 examples; `fp16 one` (commit c0ffee), `kivi one`" in first
    assert "two of lm_eval" in second
    assert cells(table) == [["fp16", "0.5000 ± 0.2500"], ["kivi", "0.2500 ± 0.2500"]]
    assert quality_tables.block("harness", tmp_path / "none") == "Nothing is recorded yet."
