"""RULER's kinds of synthetic tasks (arXiv 2404.06654), generated here: retrieval, tracing, counting, made-up facts.

Nothing is downloaded: haystacks are repeated sentences, records of the kind that is asked for, or the text given, words
are built from syllables, and the questions of ``qa_made`` are about invented people.  Scores are comparable between
caches, not with published RULER figures.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from kvruntime.eval.tasks.needle import boundary, stretch
from kvruntime.eval.tasks.passkey import FILLER
from kvruntime.eval.tasks.task import EvalTask, Example, Part, TaskRequest, fitted, share_found

EXAMPLES = 4
ONSETS, VOWELS, CODAS = "bdfgklmnprstvz", "aeiou", "lmnrst"

Maker = Callable[[TaskRequest, random.Random, int], Example]
"""``(asked, chance, length)`` -> an example of about ``length`` tokens."""


def parts(asked: TaskRequest) -> list[Part]:
    """One a kind and length."""
    return [part(asked, name, length) for length in asked.lengths for name in KINDS]


def part(asked: TaskRequest, name: str, length: int) -> Part:
    """The examples of one kind and length."""
    make, max_new_tokens = KINDS[name]
    count = asked.examples or EXAMPLES
    examples = tuple(make(asked, asked.random("ruler", name, length, index), length) for index in range(count))
    return Part(f"{name} {length:,}", examples, share_found, max_new_tokens, {"kind_of": name, "length": length})


def word(chance: random.Random) -> str:
    """A made-up word of three syllables."""
    return "".join(chance.choice(ONSETS) + chance.choice(VOWELS) for _ in range(3)) + chance.choice(CODAS)


def words(chance: random.Random, count: int) -> list[str]:
    """``count`` made-up words, all different."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(chance)] = None
    return list(found)


def number(chance: random.Random) -> str:
    return str(chance.randint(1_000_000, 9_999_999))


def spread(lines: list[str], needles: list[str], chance: random.Random) -> str:
    """``needles`` at places drawn anew among ``lines``."""
    places = sorted(chance.sample(range(len(lines) + len(needles)), len(needles)))
    out = list(lines)
    for place, needle in zip(places, chance.sample(needles, len(needles)), strict=True):
        out.insert(place, needle)
    return "\n".join(out)


def record(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def retrieval(keys: int, values: int, asked_keys: int, distractors: bool = False, prose: bool = False) -> Maker:
    """Numbers by key among sentences that repeat, records of other keys (``distractors``) or the haystack's prose.

    ``keys`` hidden keys with ``values`` numbers each, of which ``asked_keys`` are asked for.
    """

    def make(asked: TaskRequest, chance: random.Random, length: int) -> Example:
        names = words(chance, keys)
        held = {name: [number(chance) for _ in range(values)] for name in names}
        wanted = names[:asked_keys]
        needles = [record(name, value) for name, found in held.items() for value in found]
        answers = tuple(value for name in wanted for value in held[name])
        seed, offset = chance.random(), chance.randrange(max(1, len(asked.haystack) // 2))
        said = ", ".join(wanted)
        tail = f"What are all the special magic numbers for {said} mentioned in the text? Answer with numbers only."

        def build(count: int) -> str:
            own = random.Random(seed)
            if prose:
                text = stretch(asked.haystack, offset, 64 * count)
                lines = [text[start : start + 256] for start in range(0, len(text), 256)]
                lines = [line[: boundary(line, len(line))] for line in lines]
            elif distractors:
                lines = [record(other, number(own)) for other in words(own, count) if other not in held]
            else:
                lines = [FILLER] * count
            head = "Some special magic numbers are hidden in the following text. Memorize them."
            return f"{head}\n{spread(lines, needles, own)}\n{tail}"

        return Example(fitted(build, asked.count, length), answers)

    return make


def variable_tracking(asked: TaskRequest, chance: random.Random, length: int) -> Example:
    """A chain of assignments among sentences that repeat: which variables hold the first one's value?"""
    names = [name.upper() for name in words(chance, 5)]
    value, seed = str(chance.randint(10_000, 99_999)), chance.random()
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]

    def build(count: int) -> str:
        own = random.Random(seed)
        lines = [FILLER] * count
        places = sorted(own.sample(range(len(lines) + len(chain)), len(chain)))
        for place, line in zip(places, chain, strict=True):  # a chain stays in order
            lines.insert(place, line)
        text = "\n".join(lines)
        return (
            f"Memorize and track the chains of variable assignments hidden in the following text.\n\n{text}\n\n"
            f"Find all variables that are assigned the value {value}, directly or through others. "
            "Answer with their names."
        )

    return Example(fitted(build, asked.count, length), tuple(names))


def common_words(asked: TaskRequest, chance: random.Random, length: int) -> Example:
    """A numbered list in which ten words come thirty times and all others three times.

    Where thirty times ten words exceed ``length``, the ten come three times and the others once.
    """
    common, seed = words(chance, 10), chance.random()

    def listing(often: int, seldom: int) -> Callable[[int], str]:
        def build(count: int) -> str:
            own = random.Random(seed)
            listed = common * often + [other for other in words(own, count) if other not in common] * seldom
            own.shuffle(listed)
            text = " ".join(f"{place}. {each}" for place, each in enumerate(listed, 1))
            return f"Below is a numbered list of words.\n{text}\nWhat are the 10 most common words in the list above?"

        return build

    build = listing(30, 3)
    if asked.count(build(0)) > length:
        build = listing(3, 1)
    return Example(fitted(build, asked.count, length), tuple(common))


def frequent_words(asked: TaskRequest, chance: random.Random, length: int) -> Example:
    """A coded text whose words come as Zipf's law has them (exponent 2): which three come most?"""
    vocabulary, seed = words(chance, 60), chance.random()

    def build(count: int) -> str:
        own = random.Random(seed)
        weights = [1 / rank**2 for rank in range(1, len(vocabulary) + 1)]
        head = [each for each, times in zip(vocabulary, (9, 6, 4), strict=False) for _ in range(times)]
        listed = head + own.choices(vocabulary, weights, k=count)
        own.shuffle(listed)
        return (
            "Read the following coded text and track the frequency of each coded word.\n"
            f"{' '.join(listed)}\nWhat are the three most frequently appeared words in the coded text above?"
        )

    text = fitted(build, asked.count, length)
    body = text.split("\n")[1].split()
    ranked = sorted(set(body), key=lambda each: (-body.count(each), each))
    return Example(text, tuple(ranked[:3]))


def made_up_facts(asked: TaskRequest, chance: random.Random, length: int) -> Example:
    """Short documents about invented people, a question about one of them."""
    seed = chance.random()
    name = word(chance).capitalize()
    town, trade = word(chance).capitalize(), chance.choice(TRADES)

    def document(who: str, where: str, work: str, year: int) -> str:
        return f"{who} was born in {year} in the town of {where}. {who} worked there as a {work} for many years."

    def build(count: int) -> str:
        own = random.Random(seed)
        others = [each.capitalize() for each in words(own, count)]
        lines = [
            document(each, word(own).capitalize(), own.choice(TRADES), own.randint(1700, 1990))
            for each in others
            if each != name
        ]
        text = spread(lines, [document(name, town, trade, own.randint(1700, 1990))], own)
        return (
            f"Answer the question with the given documents.\n{text}\nQuestion: in which town was {name} born? Answer:"
        )

    return Example(fitted(build, asked.count, length), (town,))


TRADES = ("baker", "carpenter", "doctor", "fisher", "gardener", "mason", "painter", "sailor", "tailor", "weaver")

KINDS: dict[str, tuple[Maker, int]] = {
    "niah_single": (retrieval(1, 1, 1), 24),
    "niah_single_prose": (retrieval(1, 1, 1, prose=True), 24),
    "niah_multikey": (retrieval(4, 1, 1), 24),
    "niah_multikey_records": (retrieval(1, 1, 1, distractors=True), 24),
    "niah_multivalue": (retrieval(1, 4, 1), 64),
    "niah_multiquery": (retrieval(4, 1, 4), 64),
    "variable_tracking": (variable_tracking, 48),
    "common_words": (common_words, 96),
    "frequent_words": (frequent_words, 48),
    "qa_made": (made_up_facts, 24),
}
"""Kind -> (its maker, tokens of an answer)."""

TASK = EvalTask("retrieval, variable tracking, word counts and made-up facts, by length", parts)
