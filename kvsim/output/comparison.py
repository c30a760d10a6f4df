"""Methods against others on one card: what ``kvsim breakeven`` finds, as rows and as an object."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvsim.analysis.breakeven import BreakEven, Runner, by_batch, by_context, by_money
from kvsim.analysis.plan import NoRoomError
from kvsim.engines import Engine
from kvsim.hardware import Hardware, Price
from kvsim.layout import Method
from kvsim.models.model import Model
from kvsim.output.schema import envelope
from kvsim.specs import left_out


@dataclass
class Comparison:
    """Methods against others on one card (``ranks`` of it share the model): who runs, and where which one pays.

    ``refusal``: why nothing fits, else empty.
    """

    model: Model
    card: Hardware
    ranks: int
    batches: list[int]
    contexts: list[int]
    margin: float
    price: Price | None
    runners: dict[str, Runner] = field(default_factory=dict)
    rows: list[BreakEven] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refusal: str = ""

    def run(
        self,
        methods: list[Method],
        others: list[Method],
        weight_bits: float | None,
        share: float | None,
        engine: Engine,
        named: bool,
    ) -> None:
        """Compares every one of ``methods`` with every one of ``others``.

        Raises ``ValueError`` for a method that was ``named`` and cannot be, and where there is no pair to compare.
        """
        reasons: dict[str, str] = {}
        for method in (*methods, *others):
            try:
                runner = Runner(self.model, method, self.card, self.ranks, weight_bits, share, engine)
            except NoRoomError as error:
                self.refusal = f"{self.model.name} on {self.ranks} x {self.card.id}: {error}"
                break
            except ValueError as error:
                if named:
                    raise
                reasons[method.name] = str(error)
            else:
                self.runners[method.name] = runner
        self.notes = [self.refusal] if self.refusal else left_out(reasons)
        pairs = [
            (self.runners[method.name], self.runners[other.name])
            for method in methods
            for other in others
            if method.name in self.runners and other.name in self.runners and method != other
        ]
        if not pairs and not self.refusal:
            same = "no method to compare: --method and --against are the same"
            raise ValueError("; ".join(self.notes) or same)
        self.rows = [row for pair in pairs for row in self._compared(*pair)]

    def _compared(self, one: Runner, other: Runner) -> list[BreakEven]:
        return [
            *(by_context(one, other, each, self.margin) for each in self.batches),
            *(by_batch(one, other, each, self.margin) for each in self.contexts),
            by_money(one, other, self.margin),
        ]


def comparison_object(found: Comparison, inputs: dict[str, Any]) -> dict[str, Any]:
    """``kvsim.breakeven/1``."""
    out = envelope("breakeven", inputs, found.notes)
    out["price"] = asdict(found.price) if found.price else None
    runners = found.runners.values()
    out["rates"] = [_rate(runner, each, found.price, found.ranks) for runner in runners for each in found.contexts]
    return out | {"rows": [_row(row) for row in found.rows]}


def _row(row: BreakEven) -> dict[str, Any]:
    return {
        "method": row.method.name,
        "against": row.against.name,
        "kind": row.kind,
        "batch": row.batch_size,
        "ctx": row.num_tokens,
        "pays_from": row.first,
        "pays": row.pays,
        "method_fits_to": row.last,
        "against_fits_to": row.against_last,
    }


def _rate(runner: Runner, tokens: int, cost: Price | None, ranks: int) -> dict[str, Any]:
    batch, rate = runner.max_batch(tokens), runner.best_rate(tokens)
    seconds = runner.seconds(batch, tokens)._asdict() if batch else None
    return {
        "method": runner.method.name,
        "ctx": tokens,
        "max_batch": batch,
        "tpot_seconds": seconds,
        "tokens_per_second": rate,
        "usd_per_mtok": dollars(rate, cost, ranks),
    }


def dollars(rate: float, cost: Price | None, ranks: int) -> float | None:
    """Of a million tokens."""
    return cost.usd_per_hour * ranks / 3600 / rate * 1e6 if cost and rate else None
