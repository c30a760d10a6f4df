"""What documents show between ``<!-- ... -->`` and ``<!-- end -->`` is what the code prints.

``<!-- kvsim ... -->`` and ``<!-- kvruntime ... -->`` are commands, ``<!-- models ... -->`` the families that
tests/support/hf_tables.py lists, ``<!-- results ... -->`` the tables of memory and quality of validation/results,
``<!-- quality ... -->`` those of ``kvruntime eval``,
``<!-- speed ... -->`` those of speed, ``<!-- time ... -->`` the errors and constants of the model of time,
``<!-- serving ... -->`` those of vLLM,
``<!-- ranks ... -->`` what several cards take,
``<!-- planners -->`` the recorded head-to-head of planners, ``<!-- mutants -->`` the recorded score of the tests,
``<!-- calibrated -->`` recorded steps by the stated constants and by a card's profile.
``python tests/house/test_docs.py`` writes all of them anew.
"""

import fnmatch
import re
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        *("README.md", "docs/kvsim.md", "docs/time.md", "docs/plans.md", "docs/speed.md"),
        *("docs/memory-and-quality.md", "docs/quality.md", "docs/models.md", "docs/results.md", "docs/methods.md"),
        *("docs/transformers.md", "docs/size-a-deployment.md", "docs/halve-memory.md", "docs/compare-methods.md"),
        *("docs/first-hour.md", "docs/reliability.md", "docs/validation.md", "docs/serving.md"),
    )
)
EXPERIMENTS = ROOT / "validation" / "experiments"
BLOCK = re.compile(
    r"(<!-- (kvsim|models|results|quality|time|planners|speed|extras|mutants|reliability|ranks|serving|calibrated)"
    r"(.*?) -->\n)(.*?)(<!-- end -->)",
    re.DOTALL,
)


def block(kind: str, arguments: str) -> str:
    if kind == "models":
        pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")
        from hf_tables import block as models

        return models(arguments)
    if kind == "results":
        from validation.documents import memory_tables

        return memory_tables.block(arguments)
    if kind == "quality":
        from validation.documents import quality_tables

        return quality_tables.block(arguments)
    if kind == "planners":
        from validation.planners.compare import table

        return table(short=arguments.strip() == "short")
    if kind == "time":
        pytest.importorskip("scipy", reason="scipy is not installed")
        from validation.latency import study

        if arguments.strip() == "constants":
            return study.constants_table()
        return study.markdown(study.recorded(), short=arguments.strip() == "short")
    if kind == "speed":
        from validation.documents import speed_tables

        return speed_tables.block(arguments)
    if kind == "mutants":
        from validation.documents import mutants_table

        return mutants_table.block()
    if kind == "reliability":
        from validation.documents import reliability_table

        return reliability_table.table()
    if kind == "ranks":
        from validation.documents import ranks_tables

        return ranks_tables.block(arguments)
    if kind == "calibrated":
        from kvsim.output.tables import compact
        from validation.report import calibrated
        from validation.report.points import collect

        return compact(*calibrated.beside(collect().points), left=(0, 1))
    if kind == "serving":
        from validation.documents import serving_tables

        return serving_tables.block(arguments)
    if kind == "extras":
        from validation.documents import extras_table

        return extras_table.block()
    from kvsim.cli import run

    first = re.match(r"-first (\d+) ", arguments)  # so many paragraphs of it
    arguments = arguments[first.end() :] if first else arguments
    out = StringIO()
    with redirect_stdout(out):
        assert run(shlex.split(arguments)) == 0
    shown = out.getvalue().strip()
    if first:
        shown = "\n\n".join(shown.split("\n\n")[: int(first[1])])
    return f"```text\n$ kvsim {arguments.strip()}\n\n{shown}\n```" if first else f"```text\n{shown}\n```"


def regenerated(text: str, path: Path) -> str:
    """``text`` with its blocks written anew; their links to recorded files lead there from where ``path`` lies."""

    def written(match: re.Match[str]) -> str:
        made = block(match[2], match[3])
        if path.parent != ROOT:
            made = made.replace("](validation/", "](../validation/")
        return f"{match[1]}{made}\n{match[5]}"

    return BLOCK.sub(written, text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_blocks_are_what_the_code_prints(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert BLOCK.findall(text)
    assert text == regenerated(text, path)


def test_the_picture_is_what_is_recorded() -> None:
    from validation.documents import step_picture

    assert step_picture.PICTURE.read_text(encoding="utf-8") == step_picture.svg()
    assert "prefers-color-scheme:dark" in step_picture.svg()


def test_the_readme_says_how_fast_as_recorded() -> None:
    """The least and the greatest factor of each method in the table in docs/results.md."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"runs ([\d.]+) to ([\d.]+) times as fast as the fastest of transformers' own caches .* 2.6 bits, "
        r"([\d.]+) to ([\d.]+) times with plain KIVI",
        text,
    )
    assert said is not None
    head, _, *lines = [line.split("|") for line in block("speed", " generate short").splitlines() if line[:1] == "|"]
    named = (["kivi-boost"], ["kivi-2bit-g64-r64", "kivi-2bit-g64-r128"])
    cells = [[line[head.index(f" {name} ")] for name in names for line in lines] for names in named]
    factors = [[float(factor) for factor in re.findall(r"\(([\d.]+)x\)", " ".join(column))] for column in cells]
    assert [float(each) for each in said.groups()] == [end(column) for column in factors for end in (min, max)]


def test_the_readme_says_what_serving_gains_as_recorded() -> None:
    """Requests that a pool holds, and three loads beside bf16, of the first run that is recorded."""
    from validation.claims import serving

    rows = serving.rows_of()
    run = next(row["run"] for row in rows if row["kind"] == "load")
    own = [row for row in rows if row["run"] == run]
    two, half = (next(row for row in own if row["method"]["name"] == name) for name in ("kivi-2bit-g32-r128", "bf16"))
    pairs = {serving.load_of(row): (row, base) for row, base in serving.in_one_run(own)}
    short, middle, long = (pairs[load] for load in serving.FLOORS)
    steps = [serving.steady(row["step_seconds"]) for row in middle]
    found = [two["concurrency"] / half["concurrency"], serving.gain(*short), steps[1] / steps[0], serving.gain(*long)]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"holds ([\d.]+) times as many .* are ([\d.]+) times as fast.* decode ([\d.]+) times .* are ([\d.]+) times",
        text,
    )
    assert said is not None
    assert list(said.groups()) == [f"{found[0]:.1f}", f"{found[1]:.2f}", f"{found[2]:.1f}", f"{found[3]:.1f}"]


def test_the_readme_says_how_far_peaks_are_off_as_recorded() -> None:
    from validation.report.points import collect

    points = collect([ROOT / "validation" / "results" / "nvidia-h100-80gb-hbm3.json"], []).points
    worst = max(abs(point.error) for point in points if point.claim == "peaks")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"under stock `generate\(\)` lie within ([\d.]+) %", text)
    assert said is not None
    assert 0.5 * float(said[1]) < 100 * worst <= float(said[1])


def test_the_readme_says_what_bits_cost_as_recorded() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"Two bits cost ([\d.]+) % of SmolLM2-135M's perplexity, four cost ([\d.]+) %", text)
    assert said is not None
    for words, nbits in zip(said.groups(), (2, 4), strict=True):
        table = re.search(rf"\| kivi-{nbits}bit-g32-r128 \| [\d.]+ \| \+([\d.]+)% \|", block("results", " quality"))
        assert table is not None
        digits = len(words.partition(".")[2])
        assert words == f"{float(table[1]):.{digits}f}"


def test_the_readme_shows_excerpts_alone() -> None:
    """Whole outputs of benchmarks stand in docs/: the page that a stranger reads holds tables."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- results benchmarks -->" not in text
    assert len(text.splitlines()) <= 150
    assert text.index("## When not to compress") < text.index("## Plan") < text.index("## Install")


def test_an_unknown_table_of_results_is_refused() -> None:
    from validation.documents.memory_tables import block as results_block

    with pytest.raises(ValueError, match="'memoory': allowed are claims, claims short, benchmarks, memory, "):
        results_block("memoory")


def test_links_lead_somewhere() -> None:
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), EXPERIMENTS / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), (path.name, target)


def test_every_file_of_an_experiment_is_named() -> None:
    """And each that is named is there; a name may end in a star."""
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXPERIMENTS.iterdir() if path.suffix in {".json", ".patch", ".py"}}
    named = re.findall(r"`((?:h\d+|cpu)-[\w*-]+\.json|[\w-]+\.patch|[\w-]+-[\w-]+\.py)`", text)
    found = {name: set(fnmatch.filter(files, name)) for name in named}
    assert all(found.values()), [name for name, matches in found.items() if not matches]
    assert set().union(*found.values()) == files


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    for document in DOCUMENTS:
        document.write_text(regenerated(document.read_text(encoding="utf-8"), document), encoding="utf-8")
