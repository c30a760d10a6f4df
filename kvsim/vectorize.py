"""Whole-number formulas over arrays: a function written for one batch and one context, evaluated on a whole grid.

The function is run once on *traced* numbers, which carry a value and remember how they were computed.  Every
comparison that steers it (``min``, ``max``, ``if``) becomes a condition; the piece found holds wherever its
conditions do, so points outside are traced again, until every point has a piece.  Methods need know nothing of
it, and the bytes are exact, because it is the method's own arithmetic (``+ - * // %`` and comparisons) that is
replayed on int64 arrays.  A function that leaves this arithmetic is called point by point instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Int64 = NDArray[np.int64]
    Bool = NDArray[np.bool_]

MAX_PIECES = 64


class UntraceableError(Exception):
    """The function asked a traced number for what cannot be replayed on arrays."""


class _Node:
    """One step of the arithmetic: an operator and its operands, nodes or plain numbers."""

    __slots__ = ("left", "operator", "right")

    def __init__(self, operator: str, left: _Node | int, right: _Node | int) -> None:
        self.operator, self.left, self.right = operator, left, right


_Path = list[tuple[_Node, bool]]


def _operand(other: Any) -> tuple[int, _Node | int] | None:
    if isinstance(other, TracedNumber):
        return other.value, other.node
    return (other, other) if type(other) is int else None


class TracedNumber:
    """A whole number with its derivation.  ``path`` collects the comparisons that were decided, in order."""

    __slots__ = ("node", "path", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: int, node: _Node, path: _Path) -> None:
        self.value, self.node, self.path = value, node, path

    def _apply(self, operator: str, other: Any, swapped: bool = False) -> Any:
        pair = _operand(other)
        if pair is None:
            raise UntraceableError(f"{operator} with {type(other).__name__}")
        left, right = ((self.value, self.node), pair)[:: -1 if swapped else 1]
        return TracedNumber(_SCALAR[operator](left[0], right[0]), _Node(operator, left[1], right[1]), self.path)

    def _decide(self, operator: str, other: Any) -> bool:
        pair = _operand(other)
        if pair is None:
            raise UntraceableError(f"{operator} with {type(other).__name__}")
        outcome = bool(_SCALAR[operator](self.value, pair[0]))
        self.path.append((_Node(operator, self.node, pair[1]), outcome))
        return outcome

    def __add__(self, other: Any) -> Any:
        return self._apply("+", other)

    def __radd__(self, other: Any) -> Any:
        return self._apply("+", other, True)

    def __sub__(self, other: Any) -> Any:
        return self._apply("-", other)

    def __rsub__(self, other: Any) -> Any:
        return self._apply("-", other, True)

    def __mul__(self, other: Any) -> Any:
        return self._apply("*", other)

    def __rmul__(self, other: Any) -> Any:
        return self._apply("*", other, True)

    def __floordiv__(self, other: Any) -> Any:
        return self._apply("//", other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._apply("//", other, True)

    def __mod__(self, other: Any) -> Any:
        return self._apply("%", other)

    def __rmod__(self, other: Any) -> Any:
        return self._apply("%", other, True)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __neg__(self) -> Any:
        return self._apply("-", 0, True)

    def __pos__(self) -> Any:
        return self

    def __lt__(self, other: Any) -> bool:
        return self._decide("<", other)

    def __le__(self, other: Any) -> bool:
        return self._decide("<=", other)

    def __gt__(self, other: Any) -> bool:
        return self._decide(">", other)

    def __ge__(self, other: Any) -> bool:
        return self._decide(">=", other)

    def __eq__(self, other: object) -> bool:
        return self._decide("==", other)

    def __ne__(self, other: object) -> bool:
        return self._decide("!=", other)

    def __bool__(self) -> bool:
        return self._decide("!=", 0)

    def _refuse(self, *_: Any) -> Any:
        raise UntraceableError("a traced number stays a formula")

    __int__ = __index__ = __float__ = __round__ = __ceil__ = __floor__ = __trunc__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __and__ = __or__ = __xor__ = _refuse
    __lshift__ = __rshift__ = __rlshift__ = __rrshift__ = __rand__ = __ror__ = __abs__ = _refuse


_SCALAR: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
"""The same operators serve numbers and arrays."""

_BATCH, _TOKENS = _Node("batch", 0, 0), _Node("tokens", 0, 0)


def _evaluate(node: _Node | int, known: dict[int, Any]) -> Any:
    """The node on the arrays in ``known``; every step once (steps are shared, and kept alive by their piece)."""
    if isinstance(node, int):
        return node
    found = known.get(id(node))
    if found is None:
        found = _SCALAR[node.operator](_evaluate(node.left, known), _evaluate(node.right, known))
        known[id(node)] = found
    return found


class VectorFormula:
    """``function(batch_size, num_tokens) -> int`` over arrays, exactly.

    Call it with int64 ``batch_size [1, B]`` and ``num_tokens [C, 1]``: the answer is int64 ``[C, B]``.  Pieces are
    kept between calls.  What the function raises for a point, it raises.
    """

    def __init__(self, function: Callable[[int, int], int]) -> None:
        self.function = function
        self.pieces: list[tuple[_Node | int, _Path]] = []
        self.traceable = True

    def __call__(self, batch_size: Int64, num_tokens: Int64) -> Int64:
        import numpy as np

        shape = (num_tokens.shape[0], batch_size.shape[1])
        if self.traceable and self._whole(batch_size, num_tokens):
            known = {id(_BATCH): batch_size, id(_TOKENS): num_tokens}
            return cast("Int64", np.broadcast_to(np.asarray(_evaluate(self.pieces[0][0], known)), shape))
        out = np.empty(shape, np.int64)
        left = np.ones(shape, bool)
        index = 0
        while self.traceable and left.any():
            if index == len(self.pieces) and not self._trace(left, batch_size, num_tokens):
                break
            formula, path = self.pieces[index]
            index += 1
            mask = left & self._holds(path, batch_size, num_tokens)
            rows = mask.all(axis=1)
            known = {id(_BATCH): batch_size, id(_TOKENS): num_tokens[rows]}
            out[rows] = _evaluate(formula, known)
            mask[rows] = False
            left[rows] = False
            if mask.any():  # a condition on the batch: the points one by one, still as arrays
                row, column = mask.nonzero()
                known = {id(_BATCH): batch_size[0, column], id(_TOKENS): num_tokens[row, 0]}
                out[mask] = _evaluate(formula, known)
                left &= ~mask
        for row, column in zip(*left.nonzero(), strict=True):
            out[row, column] = self.function(int(batch_size[0, column]), int(num_tokens[row, 0]))
        return out

    def _whole(self, batch_size: Int64, num_tokens: Int64) -> bool:
        """Whether the first piece holds everywhere: the common case, without masks."""
        return bool(self.pieces) and bool(self._holds(self.pieces[0][1], batch_size, num_tokens).all())

    @staticmethod
    def _holds(path: _Path, batch_size: Int64, num_tokens: Int64) -> Bool:
        import numpy as np

        known: dict[int, Any] = {id(_BATCH): batch_size, id(_TOKENS): num_tokens}
        holds: Any = np.ones((1, 1), bool)
        for condition, outcome in path:
            decided = np.asarray(_evaluate(condition, known))
            if not (decided if outcome else ~decided).all():  # what holds everywhere needs no mask
                holds = holds & (decided if outcome else ~decided)
        return cast("Bool", holds)

    def _trace(self, left: Bool, batch_size: Int64, num_tokens: Int64) -> bool:
        """Runs the function on the first point left.  ``False`` where it cannot be traced."""
        if len(self.pieces) >= MAX_PIECES:
            return False
        row, column = divmod(int(left.argmax()), left.shape[1])
        path: _Path = []
        batch = TracedNumber(int(batch_size[0, column]), _BATCH, path)
        tokens = TracedNumber(int(num_tokens[row, 0]), _TOKENS, path)
        try:
            answer = self.function(cast(int, batch), cast(int, tokens))
        except (UntraceableError, TypeError, AttributeError):
            self.traceable = False
            return False
        operand = _operand(answer)
        if operand is None:
            self.traceable = False
            return False
        self.pieces.append((operand[1], path))
        return True
