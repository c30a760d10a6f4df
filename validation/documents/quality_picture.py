"""The picture of docs/quality.md: what bytes a token cost in perplexity, from the recorded rows, as SVG.

``python -m validation.documents.quality_picture`` draws it anew, as ``kvruntime compare --picture`` does.
"""

from __future__ import annotations

from pathlib import Path

from kvruntime.bench.harness.results import Row
from kvruntime.bench.quality.pictures import draw_comparison
from validation.claims.quality_bars import QUALITY, candidates, is_uniform, recorded
from validation.documents.quality_tables import ablation_groups

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "quality-bytes.svg"
WINDOW = 1024


def shown() -> tuple[list[Row], list[Row]]:
    """``(speeds of the judged file, rows of the whole judged text that all layers have one setting of)``."""
    group = [row for row in candidates(QUALITY)[WINDOW][0] if is_uniform(row)]
    file = next(file for _, file in recorded(QUALITY) if group[0] in file["rows"])
    return [row for row in file["rows"] if row["kind"] == "speed"], group


def draw() -> None:
    """Writes the picture, its words as text.  Raises ``ValueError`` without matplotlib."""
    from matplotlib import rc_context

    speeds, group = shown()
    studied = [row for *_, rows in ablation_groups(QUALITY) for row in rows]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": PICTURE.name}):
        draw_comparison([*group, *speeds, *studied], PICTURE)


if __name__ == "__main__":
    draw()
