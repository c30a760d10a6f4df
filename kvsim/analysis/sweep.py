"""A grid of configurations, evaluated chunk by chunk with NumPy: bytes, what fits, seconds a token.

A *cell* is one model, method and card; within it contexts and batches span a table.  Bytes are those of
:func:`kvsim.memory.estimate.estimate`, exactly (:mod:`kvsim.vectorize`), seconds
those of :func:`kvsim.latency.steps.decode_step`.
A chunk holds at most ``CHUNK_ROWS`` rows, so memory is bounded on any grid, and chunks may run anywhere: any
``concurrent.futures.Executor`` takes :func:`evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import kvsim
from kvsim.analysis.plan import NoRoomError, site
from kvsim.engines import Engine, EngineChoice
from kvsim.hardware import Hardware
from kvsim.latency.constants import constants
from kvsim.latency.roofline import Serving
from kvsim.latency.steps import decode_seconds, decode_step
from kvsim.layout import Method
from kvsim.memory.estimate import estimate
from kvsim.models.model import Model
from kvsim.models.weight_storage import check_weight_bits
from kvsim.vectorize import VectorFormula

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK_ROWS = 1 << 18
NBYTES_LIMIT = 1 << 55
"""Bytes up to which int64 arithmetic is exact at every step (bits and products of a few bytes included)."""

NAMED = 3
"""Models that a note names before it counts the rest."""

ANY_IDEAL = EngineChoice()
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Cell:
    """One model, method and card of a grid.  ``notes`` says why a column is empty."""

    model: Model
    method: Method
    card: Hardware | None
    engine: Engine
    available_nbytes: int | None
    timed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Every combination of models, methods, cards, contexts and batches.

    ``contexts`` (tokens) and ``batches`` (sequences) are tuples or ranges of numbers from 1.  ``cards`` may be
    empty: bytes only.  ``weight_bits``: bits a weight (``None``: the config's).  ``reserve``: share of a card's
    memory held back (``None``: as the engine does).  ``engine``: whose bytes, with the options given.  Raises
    ``ValueError`` for an empty axis, a number below 1, bits or a share that cannot be, or bytes beyond int64.
    """

    models: tuple[Model, ...]
    methods: tuple[Method, ...]
    contexts: Sequence[int]
    batches: Sequence[int] = (1,)
    cards: tuple[Hardware, ...] = ()
    weight_bits: float | None = None
    reserve: float | None = None
    engine: EngineChoice = ANY_IDEAL

    def __post_init__(self) -> None:
        for name in ("models", "methods", "contexts", "batches"):
            if not len(getattr(self, name)):
                raise ValueError(f"sweep without {name}")
        for name, axis in (("contexts", self.contexts), ("batches", self.batches)):
            if _ends(axis)[0] < 1:
                raise ValueError(f"{name} {_ends(axis)[0]}: allowed are 1 and above")
        check_weight_bits(self.weight_bits)
        if self.reserve is not None and not 0 <= self.reserve < 1:
            raise ValueError(f"reserve {self.reserve:g}: allowed are 0 to below 1")

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The cells in order; combinations that a method cannot hold are left out (see :attr:`left_out`)."""
        return tuple(cell for cell in self._all if isinstance(cell, Cell))

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """What no row is made for: a line a reason and the models and methods that it concerns."""
        models: dict[tuple[str, str], list[str]] = {}
        for found in self._all:
            if isinstance(found, tuple):
                model, method, reason = found
                models.setdefault((method, reason), []).append(model)
        methods: dict[tuple[str, str], list[str]] = {}
        for (method, reason), names in models.items():
            shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            methods.setdefault((shown, reason), []).append(method)
        return tuple(f"{shown} with {', '.join(names)} left out: {why}" for (shown, why), names in methods.items())

    @cached_property
    def _all(self) -> list[Cell | tuple[str, str, str]]:
        found: list[Cell | tuple[str, str, str]] = []
        for model in self.models:
            for method in self.methods:
                try:
                    most, longest = _ends(self.batches)[1], _ends(self.contexts)[1]
                    largest = estimate(model, method, most, longest, self.engine.on(None)).total_nbytes
                except ValueError as error:
                    found.append((model.name, method.name, str(error)))
                    continue
                if largest > NBYTES_LIMIT:
                    raise ValueError(f"the largest cache of {model.name} has {largest:,} bytes: too many to count here")
                for card in self.cards or (None,):
                    found.append(self._cell(model, method, card))
        return found

    def _cell(self, model: Model, method: Method, card: Hardware | None) -> Cell:
        notes: list[str] = []
        engine = self.engine.on(card)
        available, timed = None, False
        if card is not None:
            try:
                available = site(model, card, 1, self.weight_bits, self.reserve, engine).cache_nbytes
            except NoRoomError:
                available = -1
            except ValueError as error:
                notes.append(str(error))
            try:
                decode_step(model, method, card, 1, 1, Serving(self.weight_bits, engine=engine))
                timed = True
            except ValueError as error:
                notes.append(str(error))
        return Cell(model, method, card, engine, available, timed, tuple(notes))

    @property
    def notes(self) -> list[str]:
        """What was left out, and why a column is empty: a line each."""
        return list(dict.fromkeys([*self.left_out, *(note for cell in self.cells for note in cell.notes)]))

    @property
    def num_rows(self) -> int:
        return len(self.cells) * len(self.contexts) * len(self.batches)

    @property
    def _blocks(self) -> tuple[int, int]:
        """Contexts and batches a chunk."""
        batches = min(len(self.batches), CHUNK_ROWS)
        return max(1, min(len(self.contexts), CHUNK_ROWS // batches)), batches

    @property
    def _chunks_per_axis(self) -> tuple[int, int]:
        contexts, batches = self._blocks
        return -(-len(self.contexts) // contexts), -(-len(self.batches) // batches)

    @property
    def num_chunks(self) -> int:
        contexts, batches = self._chunks_per_axis
        return len(self.cells) * contexts * batches

    def chunk(self, index: int) -> tuple[Cell, Sequence[int], Sequence[int]]:
        """The cell of chunk ``index``, its contexts and its batches."""
        (per_context, per_batch), (contexts, batches) = self._blocks, self._chunks_per_axis
        cell, inside = divmod(index, contexts * batches)
        first, second = divmod(inside, batches)
        return (
            self.cells[cell],
            self.contexts[first * per_context : (first + 1) * per_context],
            self.batches[second * per_batch : (second + 1) * per_batch],
        )


def _ends(axis: Sequence[int]) -> tuple[int, int]:
    """Smallest and largest entry, without a walk along a range."""
    ends = (axis[0], axis[-1]) if isinstance(axis, range) else axis
    return min(ends), max(ends)


@dataclass(frozen=True)
class Chunk:
    """Rows of one cell, contexts outside, batches inside: arrays of one length.

    ``nbytes``, ``state_nbytes`` and ``index_nbytes`` (constant state and index keys, beside ``nbytes``) and
    ``read_nbytes`` are int64, ``fits`` is bool or ``None`` without a card's memory, ``seconds``, ``low`` and ``high``
    are float64 or ``None`` without its time.
    """

    cell: Cell
    batch: NDArray[np.int64]
    ctx: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    state_nbytes: NDArray[np.int64]
    index_nbytes: NDArray[np.int64]
    read_nbytes: NDArray[np.int64]
    fits: NDArray[np.bool_] | None
    seconds: NDArray[np.float64] | None
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None


def evaluate(grid: Grid, index: int) -> Chunk:
    """Chunk ``index`` of the grid."""
    import numpy as np

    cell, contexts, batches = grid.chunk(index)
    batch, tokens = np.array(batches, np.int64)[None, :], np.array(contexts, np.int64)[:, None]
    formulas = _formulas(cell.model, cell.method, cell.engine)  # type: ignore[arg-type]  # all of them are frozen
    nbytes, state, index_nbytes, read = (formula(batch, tokens) for formula in formulas)
    shape = nbytes.shape
    fits = None if cell.available_nbytes is None else (nbytes + state + index_nbytes <= cell.available_nbytes).ravel()
    times: list[NDArray[np.float64] | None] = [None, None, None]
    if cell.timed and cell.card is not None:
        serving = Serving(grid.weight_bits, engine=cell.engine)
        found = decode_seconds(cell.model, cell.method, cell.card, batch, tokens, serving)
        times = [np.broadcast_to(each, shape).ravel() for each in found]
    return Chunk(
        cell,
        np.broadcast_to(batch, shape).ravel(),
        np.broadcast_to(tokens, shape).ravel(),
        nbytes.ravel(),
        state.ravel(),
        index_nbytes.ravel(),
        read.ravel(),
        fits,
        *times,
    )


QUANTITIES = ("nbytes", "state_nbytes", "index_nbytes", "read_nbytes")


@lru_cache(maxsize=256)
def _formulas(model: Model, method: Method, engine: Engine) -> tuple[VectorFormula, ...]:
    """The :data:`QUANTITIES` of :func:`kvsim.memory.estimate.estimate`, over arrays."""

    def formula(quantity: str) -> VectorFormula:
        return VectorFormula(lambda batch, tokens: getattr(estimate(model, method, batch, tokens, engine), quantity))

    return tuple(map(formula, QUANTITIES))


def origin(grid: Grid) -> dict[str, Any]:
    """What the rows of a grid are computed from, in JSON: the same again are the same rows, chunk by chunk.

    Models, methods, cards, axes and constants of time as they are, not as they are named; the version of kvsim and
    its own files.
    """
    cells = [(cell.engine, cell.available_nbytes, cell.timed, cell.notes) for cell in grid.cells]
    return {
        "models": [[model.name, _digest(model)] for model in grid.models],
        "methods": [[method.name, _digest(method)] for method in grid.methods],
        "cards": [[card.id, _digest(card)] for card in grid.cards],
        "ctx": _digest(grid.contexts),
        "batch": _digest(grid.batches),
        "weights": grid.weight_bits,
        "reserve": grid.reserve,
        "engine": [grid.engine.name, _digest(cells)],
        "chunks": [grid.num_chunks, *grid._blocks],
        "constants of time": _digest(constants()),
        "kvsim": [kvsim.__version__, _digest_of_files()],
    }


def _digest(of: object) -> str:
    """Of plain frozen data, by its ``repr``."""
    return blake2b(repr(of).encode(), digest_size=16).hexdigest()


def _digest_of_files() -> str:
    """Of the code and the tables of kvsim."""
    package, digest = Path(kvsim.__file__).parent, blake2b(digest_size=16)
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def chunks(grid: Grid, executor: Executor | None = None) -> Iterator[Chunk]:
    """All chunks, in any order where an executor computes them."""
    for _, chunk in spread(partial(evaluate, grid), range(grid.num_chunks), executor):
        yield chunk


def spread(
    task: Callable[[int], Answer], indices: Sequence[int], executor: Executor | None = None, ahead: int = 8
) -> Iterator[tuple[int, Answer]]:
    """``(index, task(index))`` for every index; at most ``ahead`` are under way or waiting at a time."""
    if executor is None:
        for index in indices:
            yield index, task(index)
        return
    waiting: dict[Future[Answer], int] = {}
    remaining = iter(indices)
    try:
        while True:
            for index in remaining:
                waiting[executor.submit(task, index)] = index
                if len(waiting) >= ahead:
                    break
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda each: each.exception() is not None):  # what is done is kept
                yield waiting.pop(future), future.result()
    finally:
        for future in waiting:
            future.cancel()
