"""The probability that so many requests of random length do not fit into memory, and the most that fit at a risk.

Requests are independent; each takes the bytes of its own tokens.  The distribution of one request's bytes, on
``BINS`` bins of the room, is convolved with itself (FFT, repeated squaring): no normal approximation, so heavy
tails count.  Bytes between two bins are split so that the mean is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kvsim.analysis.request_lengths import Lengths
from kvsim.vectorize import VectorFormula

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]

BINS = 1 << 14
OCCUPANCIES = ("full", "steady")
FLOOR = 1e-11
"""Below this the convolution's rounding speaks, not the probability."""


class MemoryRisk:
    """Requests drawn from ``lengths`` in a room of ``available`` bytes.

    ``weigh(batch_size, num_tokens)``: bytes of the cache.  ``occupancy``: ``"full"``, every request at the end of its
    answer (an upper bound for any moment); ``"steady"``, requests found at random moments of their answers.
    """

    def __init__(
        self, weigh: Callable[[int, int], int], lengths: Lengths, available: int, occupancy: str = "full"
    ) -> None:
        import numpy as np

        if occupancy not in OCCUPANCIES:
            raise ValueError(f"occupancy {occupancy!r}: allowed are {', '.join(OCCUPANCIES)}")
        tokens, weights = _tokens_held(lengths, occupancy)
        nbytes = VectorFormula(weigh)(np.ones((1, 1), np.int64), tokens[:, None])[:, 0]
        self.available = available
        self.mean_nbytes = float(nbytes @ weights)
        self.largest_nbytes = int(nbytes.max())
        self.constant = int(nbytes[0]) if len(nbytes) == 1 else None
        self._one = _binned(nbytes, weights, available)
        self._powers = [self._one]

    def runs_out(self, num_requests: int) -> float:
        """P(the bytes of ``num_requests`` requests exceed the room), from 0 to 1."""
        if num_requests * self.largest_nbytes <= self.available:
            return 0.0
        if self.constant is not None:
            return 1.0
        total: Float64 | None = None
        for bit in range(num_requests.bit_length()):
            if num_requests >> bit & 1:
                total = self._power(bit) if total is None else _convolve(total, self._power(bit))
        return _missing(cast("Float64", total))

    def most(self, risk: float) -> int:
        """The most requests with ``runs_out(n) <= risk``."""
        if not 0 <= risk < 1:
            raise ValueError(f"risk {risk:g}: allowed are 0 to below 1")
        if self.available < 0:
            return 0
        if self.constant is not None or risk < FLOOR:
            return self.available // self.largest_nbytes
        bit = 0
        while _missing(self._power(bit)) <= risk:
            bit += 1
        count, total = 0, None
        for lower in reversed(range(bit)):
            wider = self._power(lower) if total is None else _convolve(total, self._power(lower))
            if _missing(wider) <= risk:
                count, total = count + (1 << lower), wider
        return count

    def _power(self, bit: int) -> Float64:
        while len(self._powers) <= bit:
            self._powers.append(_convolve(self._powers[-1], self._powers[-1]))
        return self._powers[bit]


def _tokens_held(lengths: Lengths, occupancy: str) -> tuple[NDArray[np.int64], Float64]:
    """Distinct numbers of tokens that a request is found with, and their probabilities."""
    import numpy as np

    given, made, weight = (np.array(column) for column in zip(*lengths.points, strict=True))
    if occupancy == "full":
        tokens, place = np.unique(given + made, return_inverse=True)
        return tokens.astype(np.int64), np.bincount(place.ravel(), weight).astype(np.float64)
    change = np.zeros(lengths.longest + 1)
    np.add.at(change, given, weight)  # one step at each length from the input on ...
    np.add.at(change, given + made, -weight)  # ... until the answer is complete
    found = np.cumsum(change)
    tokens = np.flatnonzero(found > 1e-15)
    return tokens.astype(np.int64), found[tokens] / found[tokens].sum()


def _binned(nbytes: NDArray[np.int64], weights: Float64, available: int) -> Float64:
    """Probabilities of 0 to BINS bins; a request larger than the room is in none of them."""
    import numpy as np

    out = np.zeros(BINS + 1)
    if available <= 0:
        return out
    position = nbytes * (BINS / available)
    inside = position <= BINS
    position, weights = position[inside], weights[inside]
    low = np.minimum(position.astype(np.int64), BINS - 1)
    np.add.at(out, low, weights * (1 - (position - low)))
    np.add.at(out, low + 1, weights * (position - low))
    return out


def _convolve(one: Float64, other: Float64) -> Float64:
    import numpy as np

    size = 1 << (2 * BINS + 1).bit_length()
    product = np.fft.irfft(np.fft.rfft(one, size) * np.fft.rfft(other, size), size)
    return cast("Float64", np.maximum(product[: BINS + 1], 0.0))


def _missing(inside: Float64) -> float:
    risk = 1.0 - float(inside.sum())
    return 0.0 if risk < FLOOR else min(1.0, risk)
