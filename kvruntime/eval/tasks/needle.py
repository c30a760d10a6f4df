"""A needle in a haystack: a sentence with a number somewhere in long prose, asked for at the end (depth x length)."""

from __future__ import annotations

from kvruntime.eval.tasks.task import NEEDLES_SAY_LITTLE, EvalTask, Example, Part, TaskRequest, fitted, share_found

CITIES = ("Amsterdam", "Bogota", "Cairo", "Dublin", "Edinburgh", "Florence", "Geneva", "Havana", "Istanbul", "Jakarta")
EXAMPLES = 4


def parts(asked: TaskRequest) -> list[Part]:
    """One a length and depth."""
    return [part(asked, length, depth) for length in asked.lengths for depth in depths(asked)]


def depths(asked: TaskRequest) -> list[float]:
    """Places of the needle, 0 at the start and 1 at the end."""
    most = max(1, asked.depths - 1)
    return [index / most for index in range(asked.depths)]


def part(asked: TaskRequest, length: int, depth: float) -> Part:
    """The cell of one length and depth."""
    examples = []
    for index in range(asked.examples or EXAMPLES):
        chance = asked.random("needle", length, depth, index)
        city, number = chance.choice(CITIES), chance.randint(1_000_000, 9_999_999)
        offset = chance.randrange(max(1, len(asked.haystack) // 2))
        needle = f"The special number of {city} is {number}."
        question = f"What is the special number of {city}? Answer with the number only."

        def build(size: int, offset: int = offset, needle: str = needle, question: str = question) -> str:
            hay = stretch(asked.haystack, offset, 8 * size)
            cut = boundary(hay, round(depth * len(hay)))
            text = f"{hay[:cut].rstrip()} {needle} {hay[cut:].lstrip()}".strip()
            return f"Read the text and remember the special numbers in it.\n\n{text}\n\n{question}"

        examples.append(Example(fitted(build, asked.count, length), (str(number),)))
    about = {"length": length, "depth": round(depth, 4)}
    return Part(f"{length:,} at {depth:.0%}", tuple(examples), share_found, 24, about)


def stretch(text: str, offset: int, size: int) -> str:
    """``size`` characters of ``text`` from ``offset`` on, over and over where it ends."""
    text = text[offset:] + "\n" + text[:offset] + "\n"
    return (text * (size // max(1, len(text)) + 1))[:size]


def boundary(text: str, near: int) -> int:
    """The end of a sentence, or of a word, at or before ``near``."""
    if near >= len(text):
        return len(text)
    for mark in (". ", " "):
        found = text.rfind(mark, 0, near)
        if found >= 0:
            return found + len(mark)
    return 0


TASK = EvalTask("a number in long prose, by depth and length", parts, caveat=NEEDLES_SAY_LITTLE, grid=True)
