"""LAMBADA: the last word of a passage, which takes all of it to guess (arXiv 1606.06031), from a user's file."""

from __future__ import annotations

from kvruntime.eval.tasks.task import EvalTask, Example, Part, TaskRequest, in_blocks, read_examples

BLOCK = 64
NEEDS = 'a JSON-lines file with "text" a line'


def parts(asked: TaskRequest) -> list[Part]:
    """Blocks of passages."""
    assert asked.data is not None
    examples = []
    for number, row in enumerate(read_examples(asked.data, ["text"], "LAMBADA file"), 1):
        context, space, last = str(row["text"]).strip().rpartition(" ")
        if not space:
            raise ValueError(f"LAMBADA file {asked.data}, line {number}: a passage of one word")
        examples.append(Example(context, (f" {last}",)))
    blocks = in_blocks(examples[: asked.examples], BLOCK)
    return [Part(name, block, greedy, 0, continues=True, chat=False) for name, block in blocks]


def greedy(answer: str, example: Example) -> float:
    """1 where the model's own continuation is the right one (the answer is empty otherwise)."""
    return float(answer == example.answers[0])


TASK = EvalTask(
    "the last word of a passage, scored token by token",
    parts,
    NEEDS,
    caveat="passages of about 80 tokens lie within the exact newest tokens of most methods, for which they are a "
    "control, not a test; a method without exact tokens is tested by them",
)
