"""Quality as recorded, and what is held of it: perplexity at so many bits, and that no other library's cache, nor plain
KIVI, loses less than ours in no more bits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from kvruntime.bench.harness.results import Row, read
from kvruntime.bench.harness.tables import groups
from kvruntime.bench.quality.report import change, uncompressed
from kvruntime.eval.intervals import perplexity_change
from validation.recorded import FOLDER

WINDOWS = "windows"
"""The kind of rows that are judged."""
QUALITY = FOLDER / "quality"
BARS: tuple[tuple[float, dict[int, float]], ...] = (
    (2.65, {1024: 0.024, 4096: 0.033}),
    (3.15, {1024: 0.011, 4096: 0.016}),
    (3.5, {1024: 0.006, 4096: 0.0065}),
    (4.25, {1024: 0.003, 4096: 0.0045}),
)
"""Bits of an element, everything counted -> window -> the most that perplexity may rise (SmolLM2-135M-Instruct,
WikiText-2's test split)."""
MODEL = "smollm2-135m"
"""The model that bars are of."""
JUDGED = "wiki"
"""How the name of the text begins that bars are of."""
PLAIN_KIVI = re.compile(r"kivi-\d+bit-g\d+-r\d+$")
"""Names of KIVI as its paper has it: judged beside other libraries, not among ours."""
COUNTED = {"bits": "bits", "bits held": "held_bits"}
"""What is equal where methods are compared -> the field of a row."""
EXACT = 136
"""Most exact tokens of a method that a bar takes: bars were set with a residual of 128 and four first tokens, which the
bits of an element do not show."""

Change = tuple[float, float, float]
"""Perplexity against another's: ``(share, low, high)``."""


@dataclass(frozen=True)
class Bar:
    """Of ``bits`` and a length of ``window``: the most that perplexity may rise, and the best that was recorded."""

    bits: float
    window: int
    limit: float
    best: tuple[Row, Change] | None

    @property
    def verdict(self) -> str:
        if self.best is None:
            return "not recorded"
        off = self.best[1][0]
        return "holds" if off <= self.limit else f"missed by {100 * (off - self.limit):.2f} points"


@dataclass(frozen=True)
class Beside:
    """Another library's cache, or plain KIVI, beside the best of ours that has no more of what is ``counted``, over the
    same windows: ``less`` is our perplexity against theirs."""

    theirs: Row
    ours: Row | None
    counted: str
    their_loss: Change | None
    our_loss: Change | None
    less: Change | None

    @property
    def verdict(self) -> str:
        """``ahead`` and ``behind`` where the interval leaves out zero."""
        if self.less is None:
            return "not judged"
        _, low, high = self.less
        return "ahead" if high < 0 else "level" if low <= 0 else "behind"


def recorded(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The recorded files, by name."""
    return [(path, read(path)) for path in sorted(folder.glob("*.json"))]


def window_groups(folder: Path) -> list[tuple[Path, dict[str, Any], list[Row]]]:
    """Every text and length of window that was recorded."""
    return [(path, file, group) for path, file in recorded(folder) for group in groups(file["rows"], WINDOWS)]


def candidates(folder: Path) -> dict[int, list[list[Row]]]:
    """Length of window -> every group of rows that bars are judged over, those that were fed the longest prompt first:
    of the model and text, with as many tokens as the largest recording has, and the uncompressed cache among them."""
    found: dict[int, list[list[Row]]] = {}
    for _, _, group in window_groups(folder):
        first = group[0]
        if is_prompted(group) or uncompressed(group) is None:
            continue
        if first["model"] == MODEL and first["text"].startswith(JUDGED):
            found.setdefault(first["window"], []).append(group)
    for window, several in found.items():
        most = max(group[0]["num_tokens"] for group in several)
        whole = [group for group in several if group[0]["num_tokens"] == most]
        found[window] = sorted(whole, key=lambda group: -group[0].get("prompt_length", 0))
    return found


def best(groups: Sequence[Sequence[Row]], bits: float) -> tuple[Row, Change] | None:
    """The row of at most ``bits`` and :data:`EXACT` exact tokens whose perplexity rises least against that of its own
    group's uncompressed cache, and by how much."""
    there = []
    for group in groups:
        base = uncompressed(group)
        for row in group:
            off = change(row, base)
            if off is not None and 0 < row["bits"] <= bits and exact_tokens(row) <= EXACT:
                there.append((row, off))
    return min(there, key=lambda one: one[1][0], default=None)


def exact_tokens(row: Row) -> float:
    """Tokens of a window that the row's cache holds in 16 bits, from what it holds in all."""
    if row["bits"] >= 16:
        return float(row["window"])
    return float((row["held_bits"] - row["bits"]) * row["window"] / (16 - row["bits"]))


def is_prompted(group: Sequence[Row]) -> bool:
    """Whether a group's windows are prompts for the most part, as those are that evicting methods are judged on."""
    return bool(2 * group[0].get("prompt_length", 0) > group[0]["window"])


def is_uniform(row: Row) -> bool:
    """Whether all layers have one setting, which was not chosen for this model."""
    return not row["method"].startswith("mix-")


def is_library(row: Row) -> bool:
    """Whether a row is of another library's compressed cache."""
    return row["package"] != "kvruntime" and row["bits"] < 16


def bars(folder: Path = QUALITY) -> list[Bar]:
    """Each bar with the best that was recorded within its bits."""
    found = candidates(folder)
    return [
        Bar(bits, window, limit, best(found.get(window, []), bits))
        for bits, limits in BARS
        for window, limit in limits.items()
    ]


def besides(folder: Path = QUALITY) -> list[Beside]:
    """Every other library's cache, and plain KIVI, beside the best of ours that has no more bits: of a further element,
    and of all that is held at the window."""
    out = []
    everything = [group for _, _, group in window_groups(folder)]
    for group in everything:
        if not any(is_library(row) for row in group):
            continue
        group = [*group, *(row for other in everything for row in beginnings(other, group))]
        base = uncompressed(group)
        judged = [row for row in group if 0 < row["bits"] < 16 and (is_library(row) or PLAIN_KIVI.match(row["method"]))]
        own = [row for row in group if 0 < row["bits"] < 16 and row not in judged and is_uniform(row)]
        for theirs in sorted(judged, key=lambda row: (not is_library(row), row["method"])):
            for name, counted in COUNTED.items():
                within = [row for row in own if row[counted] <= theirs[counted] + 5e-4]
                chosen = min(within, key=lambda row: fmean(row["window_nll"]), default=None)
                if chosen is None:
                    out.append(Beside(theirs, None, name, change(theirs, base), None, None))
                    continue
                less = perplexity_change(chosen["window_nll"], theirs["window_nll"])
                out.append(Beside(theirs, chosen, name, change(theirs, base), change(chosen, base), less))
    return out


def beginnings(longer: Sequence[Row], group: Sequence[Row]) -> list[Row]:
    """Of rows over more windows of the same text, fed alike, the windows that ``group`` is of: the first ones.  Methods
    that ``group`` holds are left out."""
    first, held = group[0], {row["method"] for row in group}
    same = ("model", "model_sha256", "dtype", "text_sha256", "window", "chunk", "prompt_length")
    count = first["num_windows"]
    if longer[0]["num_windows"] <= count or any(longer[0].get(name) != first.get(name) for name in same):
        return []
    rows = [row for row in longer if row["method"] not in held]
    return [{**row, "num_windows": count, "window_nll": row["window_nll"][:count]} for row in rows]


def broken(judged: Sequence[Bar], beside: Sequence[Beside]) -> list[str]:
    """A line for each bar that does not hold, for each cache that is ahead of ours, and for each length of window of
    the bars in which no other library was judged."""
    out = [f"≤ {bar.bits:g} bits, windows of {bar.window:,}: {bar.verdict}" for bar in judged if bar.verdict != "holds"]
    for each in beside:
        if each.ours is not None and each.verdict == "behind":
            what = f"{each.theirs['method']}, {each.counted} {each.theirs[COUNTED[each.counted]]:.3f}"
            out.append(f"{what}, windows of {each.theirs['window']:,}: {each.ours['method']} is behind")
    seen = {each.theirs["window"] for each in beside if is_library(each.theirs)}
    missing = dict.fromkeys(bar.window for bar in judged if bar.window not in seen)
    return out + [f"windows of {window:,}: no other library is recorded" for window in missing]


def kept(judged: Sequence[Bar], beside: Sequence[Beside]) -> str:
    """One sentence over the bars and the comparisons at equal bits."""
    wrong = broken(judged, beside)
    if wrong:
        return f"Quality FAILS in {len(wrong)} of {len(judged) + len(beside)} verdicts as recorded: {'; '.join(wrong)}."
    counts = Counter(each.verdict for each in beside)
    said = f"All {len(judged)} bars of quality hold as recorded; of {len(beside)} comparisons at equal bits with other"
    said += f" libraries and plain KIVI {counts['ahead']} are ahead, {counts['level']} level, none behind"
    return f"{said}, {few} not judged (none of ours holds so few)." if (few := counts["not judged"]) else f"{said}."


def bars_table(judged: Sequence[Bar]) -> tuple[list[str], list[list[str]]]:
    """Each bar, the best that was recorded within its bits, and whether it holds."""
    body = []
    for bar in judged:
        cells = [f"≤ {bar.bits:g}", f"{bar.window:,}", f"≤ +{bar.limit:.2%}"]
        if bar.best is None:
            body.append([*cells, "not recorded", "", "", bar.verdict])
            continue
        row, off = bar.best
        body.append([*cells, row["method"], f"{row['bits']:.3f}", interval(off), bar.verdict])
    return ["bits", "window", "bar", "best recorded", "its bits", "perplexity (95 % interval)", "verdict"], body


def interval(off: Change) -> str:
    return f"{off[0]:+.2%} ({off[1]:+.2%} to {off[2]:+.2%})"


def share(off: Change | None) -> str:
    return "" if off is None else f"{off[0]:+.2%}"


def besides_table(beside: Sequence[Beside]) -> tuple[list[str], list[list[str]]]:
    """A line a comparison: theirs, ours of no more bits, and who is ahead by how much."""
    body = []
    for each in beside:
        theirs, counted = each.theirs, COUNTED[each.counted]
        cells = [f"{theirs['num_windows']} x {theirs['window']:,}", theirs["method"]]
        cells += [f"{each.counted} {theirs[counted]:.3f}", share(each.their_loss)]
        if each.ours is None or each.less is None:
            body.append([*cells, "none of so few", "", "", each.verdict])
            continue
        cells += [each.ours["method"], f"{each.ours[counted]:.3f}", share(each.our_loss)]
        body.append([*cells, f"{each.verdict} ({each.less[0]:+.1%})"])
    return ["windows", "theirs", "counted", "perplexity", "ours, of no more", "its bits", "perplexity", "verdict"], body
