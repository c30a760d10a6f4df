"""LongBench's metrics: ``(prediction, right answer, classes)`` -> 0 to 1."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Collection

Metric = Callable[[str, str, Collection[str]], float]


def qa_f1(prediction: str, right: str, classes: Collection[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles (SQuAD's)."""
    own, wanted = normalized(prediction).split(), normalized(right).split()
    same = sum((Counter(own) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(own), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def normalized(text: str) -> str:
    """Lower case, without punctuation and the articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def rouge_l(prediction: str, right: str, classes: Collection[str] = ()) -> float:
    """ROUGE-L's F1 at the level of summaries, as the package ``rouge`` has it: of every right sentence the words that
    some longest common subsequence with a predicted sentence holds, each distinct word counted once."""
    own, wanted = sentences(prediction), sentences(right)
    if not own or not wanted:
        return 0.0
    common = {word for sentence in wanted for other in own for word in common_subsequence(sentence, other)}
    num_own = len({word for sentence in own for word in sentence})
    num_wanted = len({word for sentence in wanted for word in sentence})
    recall, precision = len(common) / num_wanted, len(common) / num_own
    return 2 * precision * recall / (precision + recall + 1e-8)


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence, which end with a full stop; of blanks between two, an empty word."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def common_subsequence(one: list[str], other: list[str]) -> list[str]:
    """A longest common subsequence; of several the one that leaves out of ``one`` first when traced from the end."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one, 1):
        for j, right in enumerate(other, 1):
            same = left == right
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if same else max(lengths[i - 1][j], lengths[i][j - 1])
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def classification(prediction: str, right: str, classes: Collection[str] = ()) -> float:
    """1 / n where the right class is among the n that the prediction names; names within the right one do not count."""
    named = [each for each in classes if each in prediction]
    named = [each for each in named if not (each in right and each != right)]
    return 1 / len(named) if right in named else 0.0


def retrieval(prediction: str, right: str, classes: Collection[str] = ()) -> float:
    """The share of the prediction's numbers that are the right paragraph's."""
    wanted = re.findall(r"Paragraph (\d+)", right)
    numbers = re.findall(r"\d+", prediction)
    return sum(number == wanted[0] for number in numbers) / len(numbers) if numbers and wanted else 0.0


def count(prediction: str, right: str, classes: Collection[str] = ()) -> float:
    """The share of the prediction's numbers that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, right: str, classes: Collection[str] = ()) -> float:
    """How alike the first line of code is to the right one: twice the matching letters over all letters."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(mark in each for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, right).ratio()) / 100
