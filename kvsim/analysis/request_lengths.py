"""How long requests are: constants, lognormal lengths or a trace, as weighted pairs of input and output tokens."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import NormalDist

from kvsim.regular_files import TRACE_NBYTES, read_text
from kvsim.whole_numbers import LARGEST

INPUT_COLUMNS = ("input_len", "input_length", "input_tokens", "prompt_len", "prompt_tokens", "num_prefill_tokens")
OUTPUT_COLUMNS = ("output_len", "output_length", "output_tokens", "completion_tokens", "num_decode_tokens")
AZURE = {"contexttokens": "input_len", "generatedtokens": "output_len"}
TAIL = 1e-7
"""Share of a lognormal's requests beyond the last point, which takes their weight."""
POINTS = 192
OUTPUT_POINTS = 48


@dataclass(frozen=True)
class Lengths:
    """Requests as weighted points ``(input tokens, output tokens, weight)``; the weights add up to 1.

    ``label`` describes them in a line.
    """

    points: tuple[tuple[int, int, float], ...]
    label: str

    def __post_init__(self) -> None:
        if not self.points or any(given < 1 or made < 1 for given, made, _ in self.points):
            raise ValueError("request lengths: allowed are requests of 1 input and 1 output token and above")

    @property
    def mean_input(self) -> float:
        return sum(weight * given for given, _, weight in self.points)

    @property
    def mean_output(self) -> float:
        return sum(weight * made for _, made, weight in self.points)

    @property
    def mean_context(self) -> float:
        """Tokens that a decode step finds in the cache, on average: a long answer is seen more often."""
        return sum(weight * made * (given + made / 2) for given, made, weight in self.points) / self.mean_output

    @property
    def longest(self) -> int:
        """Input and output of the longest request."""
        return max(given + made for given, made, _ in self.points)

    def input_quantile(self, share: float) -> int:
        """The input length that ``share`` of the requests do not exceed."""
        below = 0.0
        for given, weight in sorted((given, weight) for given, _, weight in self.points):
            below += weight
            if below >= share - 1e-12:
                return given
        return max(given for given, _, _ in self.points)

    def cut(self, max_tokens: int) -> tuple[Lengths, float]:
        """Requests held to ``max_tokens`` in all (input first, at least one token of output), and the share cut."""
        if self.longest <= max_tokens:
            return self, 0.0
        if max_tokens < 2:
            raise ValueError(f"max tokens {max_tokens}: allowed are 2 and above")
        share, points = 0.0, defaultdict[tuple[int, int], float](float)
        for given, made, weight in self.points:
            if given + made > max_tokens:
                share += weight
                given = min(given, max_tokens - 1)
                made = min(made, max_tokens - given)
            points[given, made] += weight
        return Lengths(tuple((*pair, weight) for pair, weight in points.items()), self.label), share


def constant(input_len: int, output_len: int) -> Lengths:
    """Every request alike."""
    return Lengths(((input_len, output_len, 1.0),), f"{input_len:,} input and {output_len:,} output tokens")


def lognormal_outputs(mean: float, sigma: float) -> Lengths:
    """The output side of :func:`lognormal`: lengths as the inputs of requests of one token."""
    points = _lognormal_points(mean, sigma, None, OUTPUT_POINTS)
    return Lengths(tuple((length, 1, weight) for length, weight in points), f"mean {mean:g}, sigma {sigma:g}")


def lognormal(mean: float, sigma: float, output: Lengths | int, longest: int | None = None) -> Lengths:
    """Input lengths lognormal with this mean (tokens) and this sigma (of the logarithm), outputs independent.

    ``output``: a number, or :func:`lognormal_outputs`.  ``longest``: inputs beyond it count as that long.
    """
    inputs = _lognormal_points(mean, sigma, longest, POINTS)
    if isinstance(output, int):
        outputs, tail = [(output, 1.0)], f"{output:,} output tokens"
    else:
        outputs = [(given, weight) for given, _, weight in output.points]
        tail = f"output alike: {output.label}"
    points = tuple((given, made, one * other) for given, one in inputs for made, other in outputs)
    return Lengths(points, f"lognormal input, mean {mean:,g} and sigma {sigma:g}; {tail}")


def _lognormal_points(mean: float, sigma: float, longest: int | None, count: int) -> list[tuple[int, float]]:
    """Whole lengths and their weights: the middle finely, each tail down to :data:`TAIL`."""
    if not mean >= 1 or mean > 1e9:
        raise ValueError(f"lognormal mean {mean:g}: allowed are 1 to 1e9 tokens")
    if not 0 < sigma <= 5:
        raise ValueError(f"lognormal sigma {sigma:g}: allowed are above 0 to 5")
    normal, mu = NormalDist(), log(mean) - sigma * sigma / 2
    reach = normal.inv_cdf(1 - TAIL)
    edges = [-reach + 2 * reach * step / count for step in range(count + 1)]
    points: defaultdict[int, float] = defaultdict(float)
    for left, right in pairwise(edges):
        low, high = normal.cdf(left), normal.cdf(right)
        # the mean of the lognormal within the slice, so that the whole keeps its mean
        inside = exp(mu + sigma**2 / 2) * (normal.cdf(right - sigma) - normal.cdf(left - sigma)) / (high - low)
        length = max(1, round(inside))
        points[min(length, longest) if longest else length] += (high - low) / (1 - 2 * TAIL)
    return list(points.items())


def read_trace(path: Path, output_len: int) -> Lengths:
    """A CSV file with a header: one request a line, columns such as ``input_len,output_len``.

    The names of vLLM's, Azure's and OpenAI's traces are understood; without an output column ``output_len`` is taken.
    Raises ``ValueError``, naming file and line.
    """
    if path.suffix == ".csv" and not path.exists():
        raise ValueError(f"lengths {str(path)!r}: no such file")
    if not path.exists() or path.is_dir():
        raise ValueError(f"lengths {str(path)!r}: neither lognormal:mean=...,sigma=... nor a CSV file")
    try:
        return _read_trace(path, output_len)
    except UnicodeDecodeError:
        raise ValueError(f"lengths {str(path)!r}: not UTF-8 text") from None
    except csv.Error as error:
        raise ValueError(f"lengths {str(path)!r}: not a CSV file: {error}") from None
    except OSError as error:
        raise ValueError(f"lengths {str(path)!r} cannot be read: {error.strerror}") from None


def _read_trace(path: Path, output_len: int) -> Lengths:
    pairs: Counter[tuple[int, int]] = Counter()
    with io.StringIO(read_text(path, TRACE_NBYTES, "utf-8-sig"), newline="") as file:
        reader = csv.reader(file)
        header = [name.strip().lower() for name in next(reader, [])]
        header = [AZURE.get(name, name) for name in header]
        given = next((header.index(name) for name in INPUT_COLUMNS if name in header), None)
        made = next((header.index(name) for name in OUTPUT_COLUMNS if name in header), None)
        if given is None:
            raise ValueError(f"{path}: no column of input lengths; allowed are {', '.join(INPUT_COLUMNS)}")
        for row in reader:
            if not row:
                continue
            try:
                pair = int(row[given]), int(row[made]) if made is not None else output_len
            except (ValueError, IndexError):
                raise ValueError(f"{path} line {reader.line_num}: no whole numbers of tokens") from None
            if min(pair) < 0 or max(pair) > LARGEST:
                raise ValueError(f"{path} line {reader.line_num}: allowed are lengths from 0 to {LARGEST:,}")
            pairs[max(1, pair[0]), max(1, pair[1])] += 1
    total = sum(pairs.values())
    if not total:
        raise ValueError(f"{path}: no requests")
    points = tuple((*pair, count / total) for pair, count in pairs.items())
    return Lengths(points, f"trace {path.name} of {total:,} requests")
