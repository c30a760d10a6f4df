"""The documents' tables of quality: what ``validation/results/quality`` holds, against the bars that were set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import groups, kernels
from kvruntime.bench.model.report import heading
from kvruntime.bench.quality import comparison
from kvruntime.bench.quality.answers import KIND as ANSWERS
from kvruntime.bench.quality.report import (
    answers_cells,
    harness_cells,
    harness_groups,
    harness_what,
    position_cells,
    uncompressed,
    windows_cells,
)
from kvruntime.eval.intervals import perplexity_change
from kvruntime.eval.tasks import TASKS
from kvsim.output.tables import compact
from validation.claims import quality_bars
from validation.claims.quality_bars import (
    BARS,
    QUALITY,
    candidates,
    is_prompted,
    is_uniform,
    recorded,
    window_groups,
)
from validation.documents.memory_tables import circumstances

COMMANDS = 2
"""Commands that a table's heading shows in full, at most."""


def block(arguments: str, folder: Path = QUALITY) -> str:
    """The table called ``arguments``, one of ``BLOCKS``, in Markdown.  Raises ``ValueError`` for other words."""
    if arguments.strip() not in BLOCKS:
        raise ValueError(f"table of quality {arguments.strip()!r}: allowed are {', '.join(BLOCKS)}")
    return BLOCKS[arguments.strip()](folder)


def bars(folder: Path) -> str:
    """Each bar, the best that was recorded within its bits, and whether it holds."""
    return compact(*quality_bars.bars_table(quality_bars.bars(folder)))


def short_bars(folder: Path) -> str:
    """A line a width: what was recorded in each length of window, and whether the bar holds."""
    lines: dict[float, list[str]] = {}
    for bar in quality_bars.bars(folder):
        said = "not recorded"
        if bar.best is not None:
            verdict = "holds" if bar.verdict == "holds" else "missed"
            said = f"{bar.best[1][0]:+.2%} (bar +{bar.limit:.2%}: {verdict})"
        lines.setdefault(bar.bits, [f"≤ {bar.bits:g}"]).append(said)
    return compact(["bits of an element", *(f"windows of {window:,}" for window in BARS[0][1])], list(lines.values()))


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
        ran = circumstances({**file, "rows": group}, COMMANDS)
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
        ran = circumstances({**file, "rows": group}, COMMANDS)
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
                ran = circumstances({**file, "rows": rows}, COMMANDS)
                what = f"{task.what}, {shared_examples(rows)} examples that all methods answered"
                parts += [f"{heading(name, rows[0], what)}; {ran} ({link}):", compact(*answers_cells(rows))]
                more = of_most_examples(rows)
                if len(answers_cells(more)[0]) > len(answers_cells(rows)[0]):
                    left = dict.fromkeys(row["method"] for row in rows if row not in more)
                    parts += [f"{shared_examples(more)} examples, without {', '.join(left)}:"]
                    parts += [compact(*answers_cells(more))]
                parts += [task.caveat.capitalize() + "."] * bool(task.caveat)
    return "\n\n".join(parts) or "Nothing is recorded yet."


def harness(folder: Path) -> str:
    """Every task of lm-evaluation-harness that was recorded: its metrics, a line a method."""
    parts = []
    for path, file in recorded(folder):
        for group in harness_groups(file["rows"]):
            link = f"[{path.name}](../validation/results/quality/{path.name})"
            ran = circumstances({**file, "rows": group}, COMMANDS)
            parts += [f"{heading('lm-eval', group[0], harness_what(group))}; {ran} ({link}):"]
            parts += [compact(*harness_cells(group))]
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
    """Every other library's cache, and plain KIVI, beside the best of ours that has no more bits."""
    head, body = quality_bars.besides_table(quality_bars.besides(folder))
    return compact(head, body) if body else "Nothing is recorded yet."


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
        ran = circumstances({**file, "rows": group}, COMMANDS)
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
    "harness": harness,
    "peers": peers,
    "compared": compared,
    "ablation": ablation,
}
