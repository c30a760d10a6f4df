"""Names that a misspelt one may mean."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """The ``n`` of ``known`` nearest to ``name``, whose likeness is ``cutoff`` (0 to 1) and above."""
    from difflib import get_close_matches  # only where a name is not known

    return get_close_matches(name, list(known), n=n, cutoff=cutoff)


def hint(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``did you mean a, b? ``, or nothing where no name is near."""
    near = nearest(name, known, cutoff=cutoff)
    return f"did you mean {', '.join(near)}? " if near else ""
