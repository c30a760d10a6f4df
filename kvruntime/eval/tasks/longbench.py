"""LongBench (arXiv 2308.14508) from a user's copy: its data, its own prompts and lengths of answers, its metrics.

The copy is a folder with ``data/<dataset>.jsonl`` and, as in LongBench's repository, ``config/dataset2prompt.json`` and
``config/dataset2maxlen.json``.  Every dataset there that :data:`METRICS` has a metric for is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvruntime.eval.tasks import longbench_metrics as metrics
from kvruntime.eval.tasks.task import EvalTask, Example, Part, TaskRequest, in_blocks, read_examples
from kvsim.finite_json import read_json

BLOCK = 16
NEEDS = "a LongBench folder: data/<dataset>.jsonl, config/dataset2prompt.json, config/dataset2maxlen.json"
FIELDS = ("input", "context", "answers")

METRICS: dict[str, metrics.Metric] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), metrics.qa_f1),
    **dict.fromkeys(("triviaqa",), metrics.qa_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), metrics.rouge_l),
    "trec": metrics.classification,
    "passage_retrieval_en": metrics.retrieval,
    "passage_count": metrics.count,
    **dict.fromkeys(("lcc", "repobench-p"), metrics.code_similarity),
}
"""Dataset -> metric.  The Chinese datasets are not among them: their metrics need a word segmenter."""
FEW_SHOT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
"""Datasets whose prompts are no questions of a user, and go into no chat template."""
FIRST_LINE = ("trec", "triviaqa", "samsum")
"""Datasets of whose answers the first line counts."""


def parts(asked: TaskRequest) -> list[Part]:
    """Blocks of each dataset's examples, in the folder's order of names."""
    assert asked.data is not None
    folder = asked.data
    prompts, lengths = (config(folder, name) for name in ("dataset2prompt", "dataset2maxlen"))
    found = [path for path in sorted((folder / "data").glob("*.jsonl")) if path.stem in METRICS]
    if not found:
        raise ValueError(f"LongBench folder {folder}: no data/<dataset>.jsonl of {', '.join(METRICS)}")
    return [part for path in found for part in dataset(asked, path, prompts, lengths)]


def config(folder: Path, name: str) -> Mapping[str, Any]:
    """``config/<name>.json``: dataset -> value.  Raises ``ValueError`` where it is no such object."""
    path = folder / "config" / f"{name}.json"
    found = read_json(path, "LongBench config")
    if not isinstance(found, dict):
        raise ValueError(f"LongBench config {path} is no object")
    return found


def dataset(asked: TaskRequest, path: Path, prompts: Mapping[str, Any], lengths: Mapping[str, Any]) -> list[Part]:
    """The parts of one dataset; a prompt beyond the model's positions loses its middle, as LongBench has it."""
    name = path.stem
    prompt, most = prompts.get(name), lengths.get(name)
    if not isinstance(prompt, str) or type(most) is not int or most < 1:
        raise ValueError(f"LongBench config: no prompt and length of an answer for {name}")
    room = None if asked.longest is None else asked.longest - most
    if room is not None and room < 1:
        raise ValueError(f"{name}: answers of {most} tokens do not fit the model's {asked.longest} positions")
    examples, classes = [], set[str]()
    for row in read_examples(path, FIELDS, "LongBench file")[: asked.examples]:
        classes.update(row.get("all_classes") or ())
        text = filled(prompt, row)
        answers = tuple(map(str, row["answers"]))
        if not answers:
            raise ValueError(f"LongBench file {path}: an example without answers")
        examples.append(Example(text if room is None else asked.cut(text, room), answers))
    score = judged(METRICS[name], frozenset(classes), name in FIRST_LINE)
    stop = ("\n",) if name == "samsum" else ()
    chat = name not in FEW_SHOT
    return [
        Part(f"{name} {block}", rows, score, most, {"dataset": name}, chat=chat, stop=stop)
        for block, rows in in_blocks(examples, BLOCK)
    ]


def filled(prompt: str, row: Mapping[str, Any]) -> str:
    """``prompt`` with ``{context}`` and ``{input}`` of ``row``, which may hold braces themselves."""
    out, rest = "", prompt
    while rest:
        places = {word: rest.find("{" + word + "}") for word in ("context", "input")}
        there = {word: place for word, place in places.items() if place >= 0}
        if not there:
            return out + rest
        word = min(there, key=lambda each: there[each])
        out += rest[: there[word]] + str(row[word])
        rest = rest[there[word] + len(word) + 2 :]
    return out


def judged(metric: metrics.Metric, classes: frozenset[str], first_line: bool) -> Any:
    """The best of the metric over the right answers."""

    def score(answer: str, example: Example) -> float:
        text = answer.lstrip("\n").split("\n")[0] if first_line else answer
        return max(metric(text, right, classes) for right in example.answers)

    return score


TASK = EvalTask("LongBench's English datasets and code, with its prompts and metrics", parts, NEEDS)
