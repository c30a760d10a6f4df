"""The pictures of docs/quality.md, from the recorded rows, as SVG: what bytes a token cost in perplexity, and needles
found by depth and length.

``python -m validation.documents.quality_picture`` draws them anew, as ``kvruntime compare --picture`` and ``kvruntime
plot`` do.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from kvruntime.bench.harness.results import Row
from kvruntime.bench.quality.answers import KIND as ANSWERS
from kvruntime.bench.quality.pictures import draw_comparison, grid
from kvsim.atomic import replace_file
from validation.claims.quality_bars import QUALITY, candidates, is_uniform, recorded
from validation.documents.quality_tables import ablation_groups

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "quality-bytes.svg"
NEEDLES = PICTURE.with_name("needles.svg")
WINDOW = 1024


def shown() -> tuple[list[Row], list[Row]]:
    """``(speeds of the judged file, rows of the whole judged text that all layers have one setting of)``."""
    group = [row for row in candidates(QUALITY)[WINDOW][0] if is_uniform(row)]
    file = next(file for _, file in recorded(QUALITY) if group[0] in file["rows"])
    return [row for row in file["rows"] if row["kind"] == "speed"], group


def needles() -> list[Row]:
    """The recorded rows of needles in prose."""
    rows = [row for _, file in recorded(QUALITY) for row in file["rows"] if row["kind"] == ANSWERS]
    return [row for row in rows if row["task"] == "needle"]


def draw() -> None:
    """Writes the pictures, their words as text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    speeds, group = shown()
    studied = [row for *_, rows in ablation_groups(QUALITY) for row in rows]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": PICTURE.name}):
        draw_comparison([*group, *speeds, *studied], PICTURE)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": NEEDLES.name}):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        grid(needles(), figure.subplots())
        drawn = BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        replace_file(NEEDLES, drawn.getvalue(), regular=True)


if __name__ == "__main__":
    draw()
