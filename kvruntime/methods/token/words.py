"""How a head's codes lie in bytes, for the kernels that write them and those that read them."""

from __future__ import annotations

import triton

from kvruntime.methods.token import coding
from kvruntime.methods.token.coding import PIECE, PLANES
from kvruntime.methods.token.levels import magnitudes
from kvruntime.methods.token.reference import Layout

sections = triton.constexpr_function(coding.sections)  # wrapped, their source counts in the kernels' cache key
planes = triton.constexpr_function(coding.planes)
chunks = triton.constexpr_function(coding.chunks)
rotation = triton.constexpr_function(coding.rotation)


@triton.constexpr_function
def num_bytes(name, dim):
    """Bytes of a head's codes."""
    return sum(section[1] * section[2] // 8 for section in sections(name, dim))


@triton.constexpr_function
def pieces(name, dim):
    """``(first channel, section, bits, fields, words)`` of what is read as one tile: a power of two of channels,
    ``PIECE`` at most, within a section.  A token has ``words`` words of it, ``fields`` codes in each.

    A word has up to 16 bits, and a piece 16 words at least, as many as a matrix product wants.
    """
    out = []
    for number, section in enumerate(sections(name, dim)):
        for first, width in chunks(section[1]):
            size = min(width, PIECE)
            fields = min(16 // PLANES[section[2]][0], size // 16)
            for start in range(section[0] + first, section[0] + first + width, size):
                out.append((start, number, section[2], fields, size // fields))
    return tuple(out)


@triton.constexpr_function
def num_pieces(name, dim):
    return len(pieces(name, dim))


@triton.constexpr_function
def piece_first(name, dim, number):
    return pieces(name, dim)[number][0]


@triton.constexpr_function
def piece_section(name, dim, number):
    return pieces(name, dim)[number][1]


@triton.constexpr_function
def piece_bits(name, dim, number):
    return pieces(name, dim)[number][2]


@triton.constexpr_function
def piece_fields(name, dim, number):
    return pieces(name, dim)[number][3]


@triton.constexpr_function
def piece_words(name, dim, number):
    return pieces(name, dim)[number][4]


@triton.constexpr_function
def piece_planes(name, dim, number):
    """``(bits, byte at which it begins)`` of each plane of the ``number``th piece."""
    piece = pieces(name, dim)[number]
    section = sections(name, dim)[piece[1]]
    return tuple((bits, at + (piece[0] - section[0]) * bits // 8) for bits, _, at in planes(section))


@triton.constexpr_function
def word_sizes(name, dim, number):
    """Bits of a word of each plane of the ``number``th piece."""
    return tuple(bits * pieces(name, dim)[number][3] for bits, _ in piece_planes(name, dim, number))


@triton.constexpr_function
def piece_fields_of(width):
    """Codes that a word of a chunk's pieces has each time that it is read, where the first plane has two bits."""
    return min(PIECE, width) // 16


@triton.constexpr_function
def first_bits(nbits):
    """Bits of the first plane of codes."""
    return PLANES[nbits][0]


@triton.constexpr_function
def fields_before(name, dim, number):
    """Fields of the pieces before the ``number``th."""
    return sum(piece[3] for piece in pieces(name, dim)[:number])


@triton.constexpr_function
def chunk_planes(name, dim, number, first):
    """``(bits, lowest bit of the code, byte)`` of the planes of the ``number``th section, of the chunk that begins with
    channel ``first`` where there is one section; of two each is half of the only chunk."""
    found = sections(name, dim)
    start = first if len(found) == 1 else 0
    return tuple((bits, low, at + start * bits // 8) for bits, low, at in planes(found[number]))


@triton.constexpr_function
def num_chunks(dim):
    return len(chunks(dim))


@triton.constexpr_function
def chunk_first(dim, number):
    return chunks(dim)[number][0]


@triton.constexpr_function
def chunk_width(dim, number):
    return chunks(dim)[number][1]


@triton.constexpr_function
def num_sections(name, dim):
    return len(sections(name, dim))


@triton.constexpr_function
def section_levels(levels, number):
    """The magnitudes of the ``number``th section, of :func:`levels_of`."""
    return levels[number]


@triton.constexpr_function
def is_lloyd(name):
    return name.startswith("lloyd")


def levels_of(name: str, dim: int) -> tuple[tuple[float, ...], ...]:
    """The magnitudes of each section's Lloyd-Max levels; of other codings none."""
    if not name.startswith("lloyd"):
        return ()
    return tuple(magnitudes(dim, nbits) for _, _, nbits, _ in coding.sections(name, dim))


def layout_constants(layout: Layout) -> dict[str, object]:
    """What every kernel is told of a layout at compile time."""
    return {
        "KEY_CODING": layout.key,
        "VALUE_CODING": layout.value,
        "KEY_DIM": layout.key_dim,
        "VALUE_DIM": layout.value_dim,
        "KEY_LEVELS": levels_of(layout.key, layout.key_dim),
        "VALUE_LEVELS": levels_of(layout.value, layout.value_dim),
    }
