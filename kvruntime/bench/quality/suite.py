"""``kvruntime eval``: options made into windows of text and tasks, and these into rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvruntime.bench.given import check_given, check_window, finish, given_or, text_given
from kvruntime.bench.harness.tasks import Task
from kvruntime.bench.model.peers import WIDTHS
from kvruntime.bench.quality.answers import answer_tasks, asked_of
from kvruntime.bench.quality.report import tables
from kvruntime.bench.quality.windows import Windows, window_tasks
from kvruntime.checkpoints.load import LoadedModel, pick_device
from kvruntime.eval.tasks import TASKS, TaskRequest, task_named
from kvruntime.eval.text import Text, load_text, token_windows
from kvruntime.eval.windows import PROMPT_LENGTH, REFERENCE_CHUNK
from kvsim.layout import Method
from kvsim.whole_numbers import check_whole

WINDOWS = (1024, 4096)
"""Lengths of window unless said otherwise: those that the model has positions for."""
CPU_TOKENS = 8192
"""Tokens of the text that a CPU scores unless said otherwise."""


def evaluate(methods: list[Method], **given: Any) -> int:
    """``kvruntime eval``; its exit code."""
    for window in given["window"]:
        check_whole("window", window, least=2)
    for length in given["length"]:
        check_whole("length", length)
    check_given({**given, "window": None})
    if given["lm_eval"]:
        from kvruntime.bench.quality.lm_harness import harness_tasks, tasks_named

        manager, named = tasks_named(given["lm_eval"], given["lm_eval_include"])  # before a model is loaded
    data = data_given(given["task"], given["data"])
    text = load_text(given["text_path"])
    device = pick_device(given["device"])
    default, windows = Path("kvruntime-eval.json"), given["window"]
    results, contenders, loaded = text_given(methods, device, given, default, WIDTHS, windows)
    tasks: list[Task] = []
    if given["window"] or not (given["task"] or given["lm_eval"]):
        tasks += window_tasks(loaded, contenders, text_windows(loaded, text, given), given["seed"])
    batch = given_or(given["batch"], 4 if device == "cpu" else 32)
    for name in given["task"]:
        asked = asked_of(loaded, given, text.content, data.get(name))
        tasks += answer_tasks(loaded, contenders, name, asked, batch, not given["plain"], results.rows)
    if given["lm_eval"]:
        chat = not given["plain"] and bool(getattr(loaded.tokenizer, "chat_template", None))
        how = {"batch": batch, "limit": given["examples"], "chat": chat, "seed": given["seed"]}
        tasks += harness_tasks(loaded, contenders, named, manager, **how)
    return finish(tasks, results, tables)


def data_given(names: Sequence[str], given: Sequence[str]) -> dict[str, Path]:
    """``--data``, ``PATH`` for the one task that needs it or ``TASK=PATH``: task -> path.

    Raises ``LookupError`` for an unknown task, ``ValueError`` for a task without the file that it needs, a file that no
    task needs, one that is not there and one that its task cannot read.
    """
    needing = [name for name in names if task_named(name).needs]
    found: dict[str, Path] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals and len(needing) == 1:
            name, path = needing[0], entry
        if name not in needing:
            of = f"TASK=PATH of {', '.join(needing)}" if needing else "none, no task here needs a file"
            raise ValueError(f"data {entry}: allowed is {of}")
        found[name] = Path(path)
        if not found[name].exists():
            raise ValueError(f"data {entry}: there is no {path}")
    for name in needing:
        if name not in found:
            raise ValueError(f"task {name} needs --data {name}=PATH: {TASKS[name].needs}")
        TASKS[name].parts(TaskRequest(len, (), "", data=found[name]))  # read before a model is loaded
    return found


def text_windows(loaded: LoadedModel, text: Text, given: dict[str, Any]) -> list[Windows]:
    """The text's windows, one entry a length.

    Raises ``ValueError`` for a window beyond the model's positions.
    """
    cpu, limit = loaded.device.type == "cpu", loaded.max_positions
    lengths = given["window"] or [window for window in WINDOWS if limit is None or window <= limit] or [limit]
    most = given_or(given["max_tokens"], CPU_TOKENS if cpu else 0) or None
    found: dict[tuple[int, ...], Windows] = {}
    for length in lengths:
        check_window(length, limit)
        ids = token_windows(loaded.tokenizer, text, length, most)
        count, window = ids.shape
        chunk = min(given_or(given["chunk"], 16 if cpu else 1), window)
        batch = min(given_or(given["batch"], 4 if cpu else 32), count)
        wide = -(-given_or(given["reference_chunk"], REFERENCE_CHUNK) // chunk) * chunk
        prompt = min(given_or(given.get("prompt_length"), PROMPT_LENGTH), window)
        found[tuple(ids.shape)] = Windows(text.name, text.sha256, ids, chunk, batch, wide, prompt)
    return list(found.values())
