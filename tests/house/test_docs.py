"""What documents show between ``<!-- ... -->`` and ``<!-- end -->`` is what the code prints.

``<!-- kvsim ... -->`` and ``<!-- kvruntime ... -->`` are commands, ``<!-- models ... -->`` the families that
tests/support/hf_tables.py lists, ``<!-- results ... -->`` the tables of memory and quality of validation/results,
``<!-- quality ... -->`` those of ``kvruntime eval``,
``<!-- speed ... -->`` those of speed, ``<!-- time ... -->`` the errors and constants of the model of time,
``<!-- planners -->`` the recorded head-to-head of planners.
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
        *("docs/memory-and-quality.md", "docs/quality.md", "docs/models.md", "docs/methods.md"),
    )
)
EXPERIMENTS = ROOT / "validation" / "experiments"
BLOCK = re.compile(
    r"(<!-- (kvsim|models|results|quality|time|planners|speed)(.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL
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
    from kvsim.cli import run

    out = StringIO()
    with redirect_stdout(out):
        assert run(shlex.split(arguments)) == 0
    return f"```text\n{out.getvalue().strip()}\n```"


def regenerated(text: str) -> str:
    return BLOCK.sub(lambda match: f"{match[1]}{block(match[2], match[3])}\n{match[5]}", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_blocks_are_what_the_code_prints(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) >= 2
    assert text == regenerated(text)


def test_the_readme_says_what_bits_cost_as_recorded() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"Two bits cost ([\d.]+) % of SmolLM2-135M's perplexity, four cost ([\d.]+) %", text)
    assert said is not None
    for words, nbits in zip(said.groups(), (2, 4), strict=True):
        table = re.search(rf"\| kivi-{nbits}bit-g32-r128 \| [\d.]+ \| \+([\d.]+)% \|", text)
        assert table is not None
        digits = len(words.partition(".")[2])
        assert words == f"{float(table[1]):.{digits}f}"


def test_the_readme_shows_excerpts_alone() -> None:
    """Whole outputs of benchmarks stand in docs/: the page that a stranger reads holds tables."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- results benchmarks -->" not in text
    assert len(text.splitlines()) < 400


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
    named = re.findall(r"`(h\d+-[\w*-]+\.json|[\w-]+\.patch|[\w-]+-[\w-]+\.py)`", text)
    found = {name: set(fnmatch.filter(files, name)) for name in named}
    assert all(found.values()), [name for name, matches in found.items() if not matches]
    assert set().union(*found.values()) == files


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    for document in DOCUMENTS:
        document.write_text(regenerated(document.read_text(encoding="utf-8")), encoding="utf-8")
