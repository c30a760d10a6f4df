"""Lloyd-Max levels of a random unit vector's coordinates, and the signs of the rotation that makes vectors random.

A coordinate t of a point drawn evenly from the unit sphere in ``dim`` dimensions has the density
``(1 - t**2)**((dim - 3) / 2)`` on -1 to 1, up to a factor.  Levels and thresholds here are in units of the root mean
square, ``dim**-0.5``.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POINTS = 1 << 16
SEED = 2504_19874


LARGEST_STEP = {2: 127, 3: 127, 4: 63}
"""A positive level is so many steps and a half at most: with its sign it fits a byte, of 4 bits seven bits, because a
kernel joins two tables of them (:mod:`kvruntime.methods.token.fast_words`)."""


def best_levels(dim: int, nbits: int) -> NDArray[np.float64]:
    """The ``2**(nbits - 1)`` positive levels of least squared error, ascending.

    Each level is the mean of what is nearer to it than to any other (Lloyd 1982, Max 1960): found by iteration over the
    distribution function, whose partial means have a closed form.
    """
    number, power = 1 << (nbits - 1), (dim - 3) / 2
    t = np.linspace(0.0, 1.0, POINTS + 1)
    density = (1 - t * t) ** power
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)]) * t[1]
    levels = (np.arange(number) + 0.5) / number * 3 * dim**-0.5
    for _ in range(2000):
        edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        below = (1 - edges * edges) ** (power + 1) / (2 * (power + 1))
        found = (below[:-1] - below[1:]) / np.diff(np.interp(edges, t, mass))
        moved, levels = np.abs(found - levels).max(), found
        if moved < 1e-12:
            break
    return levels * dim**0.5


@lru_cache(maxsize=64)
def steps(dim: int, nbits: int) -> tuple[float, tuple[int, ...]]:
    """``(unit, numbers)``: levels are ``(number + 1/2) * unit``, so that products can be taken in whole numbers.

    Of all units the one of least squared error, weighted by how often a level is met; a multiple of 2**-20, with which
    every level is a float32.  The squared error grows by 0.004 % (2 and 3 bits) and 0.6 % (4 bits) at most.

    >>> steps(128, 2)[1]
    (33, 111)
    """
    levels = best_levels(dim, nbits)
    often = np.diff(np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]]))
    often = np.exp(-(levels**2) / 2) * np.where(np.isinf(often), 1.0, often)
    least = levels[-1] / (LARGEST_STEP[nbits] + 0.5)
    units = np.unique(np.ceil(np.linspace(least, 1.25 * least, 1000) * 2.0**20)) / 2.0**20
    numbers = np.floor(levels / units[:, None])
    off = (((numbers + 0.5) * units[:, None] - levels) ** 2 * often).sum(1)
    off[numbers[:, -1] > LARGEST_STEP[nbits]] = np.inf
    best = int(off.argmin())
    return float(units[best]), tuple(int(number) for number in numbers[best])


def magnitudes(dim: int, nbits: int) -> tuple[float, ...]:
    """The positive levels, ascending, as float32 has them: they stand for themselves and, with a minus, for the other
    half.

    >>> [round(level, 4) for level in magnitudes(128, 2)]
    [0.4523, 1.5055]
    """
    unit, numbers = steps(dim, nbits)
    return tuple((number + 0.5) * unit for number in numbers)


def level_bytes(dim: int, nbits: int) -> tuple[int, ...]:
    """The levels of codes in order, less half a step, in bytes: signed ones of 2 and 3 bits, and of 4 bits the distance
    from below the lowest, 0 to 127."""
    numbers = steps(dim, nbits)[1]
    if nbits == 4:
        return (*(64 + number for number in numbers), *(63 - number for number in numbers))
    return (*numbers, *(-1 - number for number in numbers))


def lookup_table(dim: int, nbits: int, device: torch.device) -> Tensor:
    """``[kvsim.methods.token.LOOKUP]`` int32: what :mod:`kvruntime.methods.token.lookup` holds in registers.

    Four tables of the levels' bytes, of four bits low bytes of levels 0 to 3, of 4 to 7, and high bytes alike; of fewer
    bits low bytes, high bytes, and those two again the other way round.  Then, for sixteen words, by how many bits they
    are shifted: those of 8 bits, and those of a second plane of 4 bits.
    """
    raw = np.array(magnitudes(dim, nbits), np.float16).view(np.uint8).reshape(-1, 2)
    low, high = (np.resize(np.append(each, [0] * (-len(each) % 4)), -(-len(each) // 4) * 4) for each in raw.T)
    low, high = (each.astype(np.uint8).view(np.int32).tolist() for each in (low, high))
    tables = [*low, *high] if nbits == 4 else [*low, *high, *high, *low]
    shifts = [k // 8 * 8 for k in range(16)] + [k // 8 * 8 + k % 8 // 4 * 2 for k in range(16)]
    return torch.tensor([*tables, *shifts], dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def thresholds(dim: int, nbits: int) -> tuple[float, ...]:
    """Magnitudes above the nth belong to level n + 1 or higher: midpoints, as float32 has them."""
    levels = magnitudes(dim, nbits)
    return tuple(float(np.float32((a + b) / 2)) for a, b in pairwise(levels))


def signs(dim: int, device: torch.device) -> Tensor:
    """``[dim]`` int8, each 1 or -1: a row of a fixed random table, the same on every machine."""
    drawn = np.random.Generator(np.random.PCG64(SEED)).integers(0, 2, 1 << 12, dtype=np.int8)
    if dim > len(drawn):
        raise ValueError(f"a rotation of {dim} channels: allowed are up to {len(drawn)}")
    return torch.from_numpy(2 * drawn[:dim] - 1).to(device, copy=True)  # PyTorch's own memory, which it counts
