"""The README's picture: milliseconds a step of stock ``generate()`` with each cache, from the recorded rows, as SVG.

``python -m validation.documents.step_picture`` writes it anew.  One file for light and dark: the colours follow the
reader's scheme.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from kvruntime.bench.generate.report import call, label, seconds

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "validation" / "results" / "generate" / "nvidia-h200.json"
PICTURE = ROOT / "docs" / "step-time.svg"
SHOWN = (("llama-3-8b", 1, 32768), ("llama-3.2-1b", 8, 16384), ("llama-3.2-1b", 1, 4096))
"""Model, batch and tokens of the prompt, a group of bars each."""
STOCK = ("DynamicCache, second run", "static cache, compiled")
"""What the picture calls transformers' own caches, in the rows' order; this project's have their methods' names."""
WIDTH, LEFT, RIGHT, BAR, GROUP = 720, 210, 110, 18, 114
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1b1f24}.soft{fill:#57606a}.b0{fill:#8b949e}.b1{fill:#57606a}"
    ".b2{fill:#0b5cad}.b3{fill:#6ea3d8}"
    "@media(prefers-color-scheme:dark){text{fill:#e8eaed}.soft{fill:#a3adb8}.b0{fill:#6e7681}.b1{fill:#a3adb8}"
    ".b2{fill:#6cb6ff}.b3{fill:#3b7cc0}}"
)


def milliseconds(rows: list[dict[str, Any]], model: str, batch: int, tokens: int) -> dict[str, float]:
    """Of a step with each cache, by what the picture calls it.  Raises ``LookupError`` without two stock caches and
    two of this project's."""
    wanted = {"kind": "generate", "model": model, "batch_size": batch, "num_tokens": tokens}
    found = [row for row in rows if call(row) == "greedy" and all(row.get(k) == v for k, v in wanted.items())]
    stock = [row for row in found if row["package"] == "transformers"]
    own = [row for row in found if row["package"] == "kvruntime" and not row["runs"]]
    if (len(stock), len(own)) != (2, 2):
        raise LookupError(f"{RESULTS.name} has {len(stock)} and {len(own)} rows of {wanted}")
    names = (*STOCK, *map(label, own))
    return {name: 1e3 * seconds(row) for name, row in zip(names, stock + own, strict=True)}


def svg() -> str:
    """The picture."""
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    figures = [milliseconds(recorded["rows"], *size) for size in SHOWN]
    most, room = max(max(each.values()) for each in figures), WIDTH - LEFT - RIGHT
    height = 44 + GROUP * len(SHOWN)
    title = f"Milliseconds a step of stock generate(), bfloat16, on one {recorded['device']['name']}"
    size = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text x="0" y="18" font-weight="600">{escape(title)}</text>',
    ]
    for group, ((model, batch, tokens), steps) in enumerate(zip(SHOWN, figures, strict=True)):
        top = 44 + GROUP * group
        length = f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)
        what = f"{model}: batch {batch}, {length} tokens"
        out.append(f'<text x="0" y="{top + 8}" font-weight="600">{what}</text>')
        best = min(steps[name] for name in STOCK)
        for place, (name, step) in enumerate(steps.items()):
            y, width = top + 14 + place * (BAR + 4), step / most * room
            factor = "" if name in STOCK else f" ({best / step:.2f}x)"
            out.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
            out.append(f'<rect class="b{place}" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>')
            out.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 14}">{step:.2f}{factor}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
