"""``kvruntime compare``: bytes a token, quality and speed of every method, the ablation, and what it all supports.

Nothing here is an opinion: the table, the picture and the recommendation are made of the rows that were measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvruntime.bench.given import check_given, finish, given_or, say, text_given
from kvruntime.bench.harness.tasks import Task
from kvruntime.bench.model.caches import ours
from kvruntime.bench.model.peers import WIDTHS
from kvruntime.bench.model.tasks import Speed, speed_tasks
from kvruntime.bench.quality.comparison import ABLATION, ablation_methods, tables
from kvruntime.bench.quality.pictures import check_picture, draw_comparison
from kvruntime.bench.quality.suite import text_windows
from kvruntime.bench.quality.windows import window_tasks
from kvruntime.checkpoints.load import pick_device
from kvruntime.eval.text import load_text
from kvsim.layout import Method


def compare(methods: list[Method], **given: Any) -> int:
    """``kvruntime compare``; its exit code."""
    check_given(given)
    if given["picture"] is not None:
        check_picture(given["picture"])
    device = pick_device(given["device"])
    cpu = device == "cpu"
    text = load_text(given["text_path"])
    asked = () if given["window"] is None else (given["window"],)
    results, contenders, loaded = text_given(methods, device, given, Path("kvruntime-compare.json"), WIDTHS, asked)
    window = given["window"] or min(1024, loaded.max_positions or 1024)
    sizes = {**given, "window": [window], "reference_chunk": None}
    tasks: list[Task] = window_tasks(loaded, contenders, text_windows(loaded, text, sizes), given["seed"])
    speed = Speed(
        (given_or(given["speed_batch"], 1 if cpu else 32),),
        given_or(given["prompt_tokens"], 256 if cpu else 512),
        given_or(given["decode_tokens"], 16 if cpu else 64),
        warmup=1,
        repeats=given_or(given["repeats"], 3),
    )
    tasks += speed_tasks(loaded, contenders, speed, given["seed"])
    if given["ablation"]:
        grid = [ours(method) for method in (methods[0], *ablation_methods())]
        fewer = {**sizes, "max_tokens": given_or(given["ablation_tokens"], 2048 if cpu else 32768)}
        tasks += window_tasks(loaded, grid, text_windows(loaded, text, fewer), given["seed"], ABLATION)
    code = finish(tasks, results, tables)
    if given["picture"] is not None and code != 130:
        with results.shown():
            draw_comparison(results.rows, given["picture"])
        say(f"wrote {given['picture']}")
    return code
