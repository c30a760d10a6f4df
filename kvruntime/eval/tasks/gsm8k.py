"""GSM8K (arXiv 2110.14168) from a user's file: problems solved in writing, long generation, exact match."""

from __future__ import annotations

import re

from kvruntime.eval.tasks.task import EvalTask, Example, Part, TaskRequest, in_blocks, read_examples

BLOCK = 32
MAX_NEW_TOKENS = 400
NEEDS = 'a JSON-lines file with "question" and "answer" a line, the answer ending in #### and a number'
ASK = "Solve the problem step by step. End with the answer as a number after ####."
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def parts(asked: TaskRequest) -> list[Part]:
    """Blocks of problems."""
    assert asked.data is not None
    examples = []
    for number, row in enumerate(read_examples(asked.data, ["question", "answer"], "GSM8K file"), 1):
        right = last_number(str(row["answer"]).rpartition("####")[2])
        if right is None:
            raise ValueError(f"GSM8K file {asked.data}, line {number}: no number after ####")
        examples.append(Example(f"{row['question']}\n\n{ASK}", (right,)))
    blocks = in_blocks(examples[: asked.examples], BLOCK)
    return [Part(name, block, right_number, MAX_NEW_TOKENS, stop=("\nQuestion:",)) for name, block in blocks]


def right_number(answer: str, example: Example) -> float:
    """1 where the number after the last ####, or else the last number at all, is the right one."""
    _, marked, after = answer.rpartition("####")
    found = first_number(after) if marked else last_number(answer)
    return float(found is not None and found == example.answers[0])


def first_number(text: str) -> str | None:
    return next((plain(found) for found in NUMBER.findall(text)), None)


def last_number(text: str) -> str | None:
    found = NUMBER.findall(text)
    return plain(found[-1]) if found else None


def plain(number: str) -> str:
    """``$1,200.00`` -> ``1200``."""
    digits = number.replace(",", "").replace("$", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


TASK = EvalTask("problems solved in writing: long generation, exact match of the number", parts, NEEDS)
