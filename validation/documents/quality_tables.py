"""The documents' tables of quality: what ``validation/results/quality`` holds, against the bars that were set."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

from kvruntime.bench.harness.results import Row, read
from kvruntime.bench.harness.tables import groups, kernels
from kvruntime.bench.model.report import heading
from kvruntime.bench.quality import comparison
from kvruntime.bench.quality.answers import KIND as ANSWERS
from kvruntime.bench.quality.report import answers_cells, change, position_cells, uncompressed, windows_cells
from kvruntime.bench.quality.windows import KIND as WINDOWS
from kvruntime.eval.intervals import perplexity_change
from kvruntime.eval.tasks import TASKS
from kvsim.output.tables import compact
from validation.documents.memory_tables import circumstances
from validation.recorded import FOLDER

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


def block(arguments: str, folder: Path = QUALITY) -> str:
    """The table called ``arguments``, one of ``BLOCKS``, in Markdown.  Raises ``ValueError`` for other words."""
    if arguments.strip() not in BLOCKS:
        raise ValueError(f"table of quality {arguments.strip()!r}: allowed are {', '.join(BLOCKS)}")
    return BLOCKS[arguments.strip()](folder)


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


def best(groups: Sequence[Sequence[Row]], bits: float) -> tuple[Row, tuple[float, float, float]] | None:
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


def bars(folder: Path) -> str:
    """Each bar, the best that was recorded within its bits, and whether it holds."""
    found = candidates(folder)
    body = []
    for bits, limits in BARS:
        for window, limit in limits.items():
            chosen = best(found.get(window, []), bits)
            cells = [f"≤ {bits:g}", f"{window:,}", f"≤ +{limit:.2%}"]
            if chosen is None:
                body.append([*cells, "not recorded", "", "", "not recorded"])
                continue
            row, (off, low, high) = chosen
            verdict = "holds" if off <= limit else f"missed by {100 * (off - limit):.2f} points"
            body.append(
                [*cells, row["method"], f"{row['bits']:.3f}", f"{off:+.2%} ({low:+.2%} to {high:+.2%})", verdict]
            )
    head = ["bits", "window", "bar", "best recorded", "its bits", "perplexity (95 % interval)", "verdict"]
    return compact(head, body)


def short_bars(folder: Path) -> str:
    """A line a width: what was recorded in each length of window, and whether the bar holds."""
    found = candidates(folder)
    body = []
    for bits, limits in BARS:
        cells = [f"≤ {bits:g}"]
        for window, limit in limits.items():
            chosen = best(found.get(window, []), bits)
            if chosen is None:
                cells.append("not recorded")
                continue
            off = chosen[1][0]
            cells.append(f"{off:+.2%} (bar +{limit:.2%}: {'holds' if off <= limit else 'missed'})")
        body.append(cells)
    return compact(["bits of an element", *(f"windows of {window:,}" for window in BARS[0][1])], body)


def is_prompted(group: Sequence[Row]) -> bool:
    """Whether a group's windows are prompts for the most part, as those are that evicting methods are judged on."""
    return bool(2 * group[0].get("prompt_length", 0) > group[0]["window"])


def windows(folder: Path) -> str:
    """Every text and length of window: bits, perplexity with its interval, KL, agreement."""
    parts = []
    for path, file, group in window_groups(folder):
        first = group[0]
        if is_prompted(group):
            continue
        what = f"{first['text']}, {first['num_windows']} windows of {first['window']:,}, {first['num_tokens']:,} tokens"
        prompt = first.get("prompt_length", 0)
        fed = f"{f'a prompt of {prompt}, then ' if prompt else ''}{first['chunk']} a step"
        fed += f", the reference {first['reference_chunk']}"
        link = f"[{path.name}](../validation/results/quality/{path.name})"
        ran = circumstances({**file, "rows": group})
        parts.append(f"{heading('Windows', first, f'{what}, {fed}')}; {ran} ({link}):")
        parts.append(compact(*windows_cells(group)))
        parts += [said] if (said := kernels(group).strip()) else []
    return "\n\n".join(parts) or "Nothing is recorded yet."


def prompted(folder: Path) -> str:
    """Of windows that are prompts for the most part: what follows the prompt, which alone reads what was kept."""
    parts = []
    for path, file, group in window_groups(folder):
        base, first = uncompressed(group), group[0]
        if not is_prompted(group) or base is None:
            continue
        prompt, window = first["prompt_length"], first["window"]
        share = (window - 1) / (window - prompt)
        body = []
        for row in sorted(group, key=lambda row: (row is not base, row["held_bits"])):
            there = [entry for entry in row["by_position"] if entry[0] >= prompt]
            counts = [last - begin + 1 for begin, last, *_ in there]
            nll, kl, agreed = (
                sum(count * entry[place] for count, entry in zip(counts, there, strict=True)) / sum(counts)
                for place in (2, 3, 4)
            )
            cells = [row["method"], f"{row['held_bits']:.3f}", f"{exp(nll):.3f}"]
            if row is base:
                cells += ["", ""]
            else:  # the prompt's own predictions are the same
                behind = [
                    theirs + share * (own - theirs)
                    for own, theirs in zip(row["window_nll"], base["window_nll"], strict=True)
                ]
                off, low, high = perplexity_change(behind, base["window_nll"])
                cells += [f"{off:+.2%}", f"{low:+.2%} to {high:+.2%}"]
            body.append([*cells, f"{kl:.4f}", f"{agreed:.2%}"])
        head = ["method", "bits held", "perplexity", "against fp16", "95 % interval", "KL, nats", "top-1"]
        link = f"[{path.name}](../validation/results/quality/{path.name})"
        what = f"{first['text']}, {first['num_windows']} windows of {window:,}: a prompt of {prompt:,}, then"
        what += f" {first['chunk']} a step, scored behind the prompt"
        ran = circumstances({**file, "rows": group})
        parts += [f"{heading('Prompted', first, what)}; {ran} ({link}):", compact(head, body)]
    return "\n\n".join(parts) or "Nothing is recorded yet."


def positions(folder: Path) -> str:
    """Perplexity against fp16 by position, of the longest window of the judged text."""
    found = candidates(folder)
    if not found:
        return "Nothing is recorded yet."
    group = found[max(found)][0]
    return f"{group[0]['text']}, windows of {group[0]['window']:,}:\n\n{compact(*position_cells(group))}"


def answers(folder: Path) -> str:
    """The tasks that were recorded, over the examples that all methods answered; without the methods that answered
    fewest, where that shows more lengths or kinds.  What the scores are worth stands under each."""
    parts = []
    for path, file in recorded(folder):
        for name, task in TASKS.items():
            rows = [row for row in file["rows"] if row["kind"] == ANSWERS and row["task"] == name]
            rows = [row for row in rows if "failed" not in row]
            if rows:
                link = f"[{path.name}](../validation/results/quality/{path.name})"
                ran = circumstances({**file, "rows": rows})
                what = f"{task.what}, {shared_examples(rows)} examples that all methods answered"
                parts += [f"{heading(name, rows[0], what)}; {ran} ({link}):", compact(*answers_cells(rows))]
                more = of_most_examples(rows)
                if len(answers_cells(more)[0]) > len(answers_cells(rows)[0]):
                    left = dict.fromkeys(row["method"] for row in rows if row not in more)
                    parts += [f"{shared_examples(more)} examples, without {', '.join(left)}:"]
                    parts += [compact(*answers_cells(more))]
                parts += [task.caveat.capitalize() + "."] * bool(task.caveat)
    return "\n\n".join(parts) or "Nothing is recorded yet."


def shared_examples(rows: Sequence[Row]) -> int:
    """How many examples of a task's rows every one of their methods answered."""
    answered: dict[str, set[str]] = {}
    for row in rows:
        answered.setdefault(row["examples_sha256"], set()).add(row["method"])
    methods = {row["method"] for row in rows}
    first = rows[0]["method"]
    return sum(
        len(row["scores"]) for row in rows if row["method"] == first and answered[row["examples_sha256"]] == methods
    )


def of_most_examples(rows: Sequence[Row]) -> list[Row]:
    """The rows but those of the methods that answered fewest examples."""
    answered = dict.fromkeys(dict.fromkeys(row["method"] for row in rows), 0)
    for row in rows:
        answered[row["method"]] += len(row["scores"])
    return [row for row in rows if answered[row["method"]] > min(answered.values())] or list(rows)


def peers(folder: Path) -> str:
    """Every other library's cache, and plain KIVI, beside the best of ours that has no more bits: of a further element,
    and of all that is held at the window."""
    body = []
    everything = [group for _, _, group in window_groups(folder)]
    for group in everything:
        if not any(is_library(row) for row in group):
            continue
        base = uncompressed(group)
        group = [*group, *(row for other in everything for row in beginnings(other, group))]
        here = f"{group[0]['num_windows']} x {group[0]['window']:,}"
        judged = [row for row in group if 0 < row["bits"] < 16 and (is_library(row) or PLAIN_KIVI.match(row["method"]))]
        own = [row for row in group if 0 < row["bits"] < 16 and row not in judged and is_uniform(row)]
        for theirs in sorted(judged, key=lambda row: (not is_library(row), row["method"])):
            for name, counted in COUNTED.items():
                within = [row for row in own if row[counted] <= theirs[counted] + 5e-4]
                chosen = min(within, key=lambda row: fmean(row["window_nll"]), default=None)
                off = change(theirs, base)
                cells = [
                    here,
                    theirs["method"],
                    f"{name} {theirs[counted]:.3f}",
                    "" if off is None else f"{off[0]:+.2%}",
                ]
                if chosen is None:
                    body.append([*cells, "none of so few", "", "", "not judged"])
                    continue
                ours, less = change(chosen, base), perplexity_change(chosen["window_nll"], theirs["window_nll"])
                cells += [chosen["method"], f"{chosen[counted]:.3f}", "" if ours is None else f"{ours[0]:+.2%}"]
                verdict = "ahead" if less[2] < 0 else "level" if less[1] <= 0 else "behind"
                body.append([*cells, f"{verdict} ({less[0]:+.1%})"])
    head = ["windows", "theirs", "counted", "perplexity", "ours, of no more", "its bits", "perplexity", "verdict"]
    return compact(head, body) if body else "Nothing is recorded yet."


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


def is_uniform(row: Row) -> bool:
    """Whether all layers have one setting, which was not chosen for this model."""
    return not row["method"].startswith("mix-")


def is_library(row: Row) -> bool:
    """Whether a row is of another library's compressed cache."""
    return row["package"] != "kvruntime" and row["bits"] < 16


def compared(folder: Path) -> str:
    """Bytes a token, quality and, where they were recorded, speed of every method of the whole judged text, and what
    they support."""
    parts = []
    files = recorded(folder)
    for window in sorted(found := candidates(folder)):
        group = [row for row in found[window][0] if is_uniform(row)]
        path, file = next(entry for entry in files if group[0] in entry[1]["rows"])
        parts += compared_group(path, file, group)
    return "\n\n".join(parts) or "Nothing is recorded yet."


def compared_group(path: Path, file: Mapping[str, Any], group: list[Row]) -> list[str]:
    first, speeds = group[0], comparison.speeds_of(file["rows"], group)
    entries = comparison.entries(group, speeds)
    what = f"{first['text']}, {first['num_windows']} windows of {first['window']:,}"
    if speeds:
        what += f"; speed: batch {speeds[0]['batch_size']}, {speeds[0]['prompt_tokens']} prompt tokens"
    link = f"[{path.name}](../validation/results/quality/{path.name})"
    head, body = comparison.comparison_cells(entries)
    shown = [place for place, name in enumerate(head) if any(cells[place] for cells in body)]
    table = compact([head[place] for place in shown], [[cells[place] for place in shown] for cells in body])
    told = f"{heading('Compared', first, what)} ({link}):"
    return [told, table, f"```text\n{comparison.recommendation(entries)}\n```"]


def ablation_groups(folder: Path) -> list[tuple[Path, dict[str, Any], list[Row]]]:
    """Every text and length of window that the ablation was recorded on."""
    return [
        (path, file, group) for path, file in recorded(folder) for group in groups(file["rows"], comparison.ABLATION)
    ]


def ablation(folder: Path) -> str:
    """Every combination of plain KIVI's options that was recorded, and what an option does in the mean over the others
    where all were."""
    parts = []
    for path, file, group in ablation_groups(folder):
        first, count = group[0], len(comparison.ablation_methods())
        there = len(body := comparison.ablation_cells(group)[1])
        what = f"{there} of {count} combinations, {first['text']}, {first['num_windows']} windows of"
        what += f" {first['window']:,}, {first['chunk']} a step"
        link = f"[{path.name}](../validation/results/quality/{path.name})"
        ran = circumstances({**file, "rows": group})
        parts += [f"{heading('Ablation', first, what)}; {ran} ({link}):"]
        parts += [compact(comparison.ablation_cells(group)[0], body)]
        if comparison.effects(group):
            parts += ["In the mean over all other options, as a logarithm of perplexity against fp16:"]
            parts += [compact(*comparison.effect_cells(group))]
    return "\n\n".join(parts) or "Nothing is recorded yet."


BLOCKS: dict[str, Callable[[Path], str]] = {
    "bars": bars,
    "bars short": short_bars,
    "windows": windows,
    "prompted": prompted,
    "positions": positions,
    "answers": answers,
    "peers": peers,
    "compared": compared,
    "ablation": ablation,
}
