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
from torch import Tensor

POINTS = 1 << 16
SEED = 2504_19874


@lru_cache(maxsize=64)
def magnitudes(dim: int, nbits: int) -> tuple[float, ...]:
    """The ``2**(nbits - 1)`` positive levels, ascending, rounded to float16: they stand for themselves and, with a
    minus, for the other half.

    Each level is the mean of what is nearer to it than to any other (Lloyd 1982, Max 1960): found by iteration over the
    distribution function, whose partial means have a closed form.

    >>> magnitudes(128, 2)
    (0.452392578125, 1.5048828125)
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
    return tuple(float(np.float16(level)) for level in levels * dim**0.5)


def lookup_table(dim: int, nbits: int, device: torch.device) -> Tensor:
    """``[kvsim.methods.token.LOOKUP]`` int32: what :mod:`kvruntime.methods.token.lookup` holds in registers.

    Four tables of the levels' bytes, of four bits low bytes of levels 0 to 3, of 4 to 7, and high bytes alike; of fewer
    bits low bytes, high bytes, and those two again the other way round.  Then, for sixteen words, by how many bits they
    are shifted that lie two in one 16-bit word, and four in one.
    """
    raw = np.array(magnitudes(dim, nbits), np.float16).view(np.uint8).reshape(-1, 2)
    low, high = (np.resize(np.append(each, [0] * (-len(each) % 4)), -(-len(each) // 4) * 4) for each in raw.T)
    low, high = (each.astype(np.uint8).view(np.int32).tolist() for each in (low, high))
    tables = [*low, *high] if nbits == 4 else [*low, *high, *high, *low]
    shifts = [k // size * size for size in (8, 4) for k in range(16)]
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
    return torch.from_numpy(2 * drawn[:dim] - 1).to(device)
