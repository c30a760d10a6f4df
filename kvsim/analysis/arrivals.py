"""Requests that arrive at random: a small event simulation of continuous batching, and the rate that a target allows.

One server (a card, or several that share the model) works in steps, as vLLM's and SGLang's schedulers do:

* A step decodes a token of every running request that has its prompt, and computes pieces of prompts with what is left
  of ``chunk_tokens``, first come first served.
* A request is admitted where its prompt fits beside what runs; where running requests outgrow the memory, the newest
  goes back to the queue and computes its tokens again.
* A step's seconds are those of :mod:`kvsim.latency`: weights and products of all its tokens, whichever take longer, the
  attention of what runs, overheads and exchanges.  Steps between two events are taken at once, at their mean context.

Arrivals are random (exponential gaps), or ``users`` requests are always in flight, each that ends followed by a new
one, which is the state that :func:`kvsim.latency.steps.token_step` has formulas for: a test holds the two together.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf, log2

from kvsim.analysis.plan import Site
from kvsim.analysis.request_lengths import Lengths
from kvsim.engines import IDEAL, Engine
from kvsim.latency.roofline import Roofline, Serving
from kvsim.latency.speculation import verify_parts
from kvsim.layout import Method
from kvsim.memory.sharding import Deployment
from kvsim.models.model import Model

SHARE = 0.9
"""Share of the requests that must keep the limits."""
WARM = 0.2
"""First share of the requests that is not counted: the server fills."""
FINE = 8
"""Contexts are timed at so many points an octave."""
MAX_SEQS = 1024


class Server:
    """What a step takes and what fits, on one replica's cards (one attention replica of several that share experts)."""

    def __init__(
        self, model: Model, method: Method, place: Site, engine: Engine = IDEAL, max_num_seqs: int = MAX_SEQS
    ) -> None:
        serving = Serving(place.weight_bits, engine=engine, sharding=place.sharding)
        self.roofline = Roofline(model, place.card, serving)
        self.method, self.room, self.max_num_seqs = method, place.cache_nbytes, max_num_seqs
        self.chunk = self.roofline.fixed.chunk_tokens
        self.beside = self.roofline.fixed.prefill_seconds
        self._cache = Deployment(model, method, engine, place.sharding)
        self._steps: dict[tuple[int, int], dict[str, float]] = {}
        self._bytes: dict[int, int] = {}

    def nbytes(self, num_tokens: int) -> int:
        """Of one request on one card; tokens rounded up to 16."""
        tokens = -(-num_tokens // 16) * 16
        if tokens not in self._bytes:
            self._bytes[tokens] = self._cache.rank_nbytes(1, tokens)
        return self._bytes[tokens]

    def seconds(self, num_decoding: int, mean_context: float, pieces: Sequence[tuple[int, int]] = ()) -> float:
        """Of a step that decodes so many requests and computes ``pieces`` of prompts: tokens before, and new ones."""
        parts = self._decoding(num_decoding, mean_context)
        if not pieces:
            return sum(parts.values())
        new = sum(count for _, count in pieces)
        tokens, flow = num_decoding + new, self.roofline
        compute = flow.products(num_decoding, num_decoding) + sum(
            flow.prompt(1, before + count, count)[0] for before, count in pieces
        )
        fixed = flow.block_seconds if not num_decoding else parts["overhead"]
        sending = flow.all_reduces(tokens) + flow.exchanges(new, prompt=True)
        sending += flow.exchanges(num_decoding) if num_decoding else 0.0
        stream = sum(flow.weights(tokens))
        return float(stream + flow.beside(stream, compute) + parts["kv"] + fixed + sending)

    def _decoding(self, count: int, context: float) -> dict[str, float]:
        if not count:
            return {"kv": 0.0}
        at = max(1, round(2 ** (round(log2(max(1.0, context)) * FINE) / FINE)))
        if (count, at) not in self._steps:
            self._steps[count, at] = verify_parts(self.roofline, self.method, count, at, 1)
        return self._steps[count, at]


@dataclass(eq=False)
class Request:
    """One request: tokens of its prompt and of its answer, and when it came, had its first token, and ended."""

    arrival: float
    given: int
    made: int
    to_compute: int = 0
    computed: int = 0
    written: int = 0
    first: float = inf
    end: float = inf
    preempted: int = 0

    def __post_init__(self) -> None:
        self.to_compute = self.given

    @property
    def tokens(self) -> int:
        """In the cache, what is about to be computed included."""
        return max(self.to_compute, self.computed) + 1

    @property
    def decoding(self) -> bool:
        return self.computed >= self.to_compute

    @property
    def per_token(self) -> float:
        """Seconds a token after the first."""
        return (self.end - self.first) / max(1, self.made - 1)


@dataclass
class Run:
    """What a simulation saw: its requests in the order of their arrival, and the mean number that decode in a step."""

    requests: list[Request]
    seconds: float = 0.0
    decoded: float = 0.0
    steps: int = 0
    weighted: float = field(default=0.0, repr=False)

    @property
    def mean_decoding(self) -> float:
        return self.weighted / self.steps if self.steps else 0.0

    @property
    def counted(self) -> list[Request]:
        """Without those that came while the server filled."""
        return self.requests[int(WARM * len(self.requests)) :]


@dataclass(frozen=True)
class ServiceLevel:
    """At one rate: share of the requests within the limits; medians and 95th percentiles in seconds."""

    rate: float
    share: float
    first: tuple[float, float]
    token: tuple[float, float]
    mean_decoding: float
    preempted: int
    tokens_per_second: float


def drawn(lengths: Lengths, count: int, seed: int) -> list[tuple[float, int, int]]:
    """So many requests: exponential gaps with a mean of 1 (divide by a rate), and lengths."""
    draw = random.Random(seed)
    points = lengths.points
    chosen = draw.choices(points, [weight for _, _, weight in points], k=count)
    clock, out = 0.0, []
    for given, made, _ in chosen:
        clock += draw.expovariate(1.0)
        out.append((clock, max(1, given), max(1, made)))
    return out


def simulate(server: Server, arrivals: Sequence[Request], users: int | None = None) -> Run:
    """Serves ``arrivals`` (by time; with ``users`` so many are in flight, and the others come as these end).

    Raises ``ValueError`` for a request that does not fit alone.
    """
    run = Run(list(arrivals))
    coming, waiting = deque(run.requests), deque[Request]()
    running: list[Request] = []
    if users is not None:
        for request in run.requests[:users]:
            request.arrival = 0.0
    clock = 0.0
    while coming or waiting or running:
        while coming and (coming[0].arrival <= clock if users is None else len(waiting) + len(running) < users):
            request = coming.popleft()
            request.arrival = clock if users is not None else request.arrival
            waiting.append(request)
        if not waiting and not running:
            clock = coming[0].arrival
            continue
        _admit(server, waiting, running)
        next_one = coming[0].arrival if coming and users is None else inf
        taken, steps = _advance(server, running, next_one - clock, waiting)
        clock += taken
        run.steps += steps
        run.weighted += steps * sum(request.written > 0 for request in running)
        for request in running:
            if request.decoding and request.first == inf:
                request.first = clock
            if request.written >= request.made:
                request.end = clock
        running[:] = [request for request in running if request.end == inf]
    run.seconds = clock
    return run


def _admit(server: Server, waiting: deque[Request], running: list[Request]) -> None:
    if not waiting:
        return
    used = sum(server.nbytes(request.tokens) for request in running)
    while waiting and len(running) < server.max_num_seqs:
        more = server.nbytes(waiting[0].tokens)
        if used + more > server.room:
            if not running:
                raise ValueError(f"a request of {waiting[0].tokens:,} tokens does not fit beside the weights")
            return
        used += more
        running.append(waiting.popleft())


def _advance(server: Server, running: list[Request], until: float, waiting: deque[Request]) -> tuple[float, int]:
    """One step with pieces of prompts, or all steps to the next event; seconds and steps."""
    decoding = [request for request in running if request.decoding]
    context = sum(request.tokens for request in decoding) / max(1, len(decoding))
    pieces, left = [], max(1, server.chunk - len(decoding))
    for request in running:
        count = min(left, request.to_compute - request.computed)
        if count > 0:
            pieces.append((request, count))
            left -= count
    if pieces:
        taken = server.seconds(len(decoding), context, [(request.computed, count) for request, count in pieces])
        for request, count in pieces:
            request.computed += count
            request.written += request.decoding  # the step that ends a prompt writes a token
        steps = 1
    else:
        steps = min(request.made - request.written for request in decoding)
        one = server.seconds(len(decoding), context)
        if until < inf and len(running) < server.max_num_seqs:
            steps = max(1, min(steps, ceil(until / one)))
        while steps > 1 and _outgrown(server, running, steps):
            steps = steps // 2
        taken = steps * server.seconds(len(decoding), context + steps / 2)
    for request in decoding:
        request.written += steps
        request.computed += steps
    left_over = [request for request in running if request.written < request.made]  # the others leave now
    while len(left_over) > 1 and _outgrown(server, left_over, 1):
        newest = left_over.pop()
        running.remove(newest)
        newest.to_compute, newest.computed = newest.given + newest.written, 0
        newest.preempted += 1
        waiting.appendleft(newest)
    return taken, steps


def _outgrown(server: Server, running: list[Request], steps: int) -> bool:
    """Whether what runs needs more than the room after so many steps."""
    longest = max(request.tokens for request in running) + steps
    if len(running) * server.nbytes(longest) <= server.room:
        return False
    return sum(server.nbytes(request.tokens + steps * request.decoding) for request in running) > server.room


def at_rate(
    server: Server,
    draws: Sequence[tuple[float, int, int]],
    rate: float,
    slo_ttft: float | None,
    slo_tpot: float | None,
) -> ServiceLevel:
    """The drawn requests at ``rate`` a second, and how many keep the limits (seconds)."""
    run = simulate(server, [Request(at / rate, given, made) for at, given, made in draws])
    counted = run.counted
    first = sorted(request.first - request.arrival + server.beside for request in counted)
    token = sorted(request.per_token for request in counted)
    kept = sum(
        (slo_ttft is None or request.first - request.arrival + server.beside <= slo_ttft)
        and (slo_tpot is None or request.per_token <= slo_tpot)
        for request in counted
    )

    def middle_and_late(values: list[float]) -> tuple[float, float]:
        return values[len(values) // 2], values[min(len(values) - 1, int(0.95 * len(values)))]

    spread = max(request.end for request in counted) - counted[0].arrival
    return ServiceLevel(
        rate,
        kept / len(counted),
        middle_and_late(first),
        middle_and_late(token),
        run.mean_decoding,
        sum(request.preempted for request in run.requests),
        sum(request.made for request in counted) / spread,
    )


def most_at(
    server: Server,
    draws: Sequence[tuple[float, int, int]],
    slo_ttft: float | None,
    slo_tpot: float | None,
    share: float = SHARE,
) -> ServiceLevel | None:
    """The highest rate, to 2 %, at which ``share`` of the requests keep the limits; ``None`` where even a request alone
    is late.  The same draws at every rate, so that rates can be compared."""
    rate = 1e-3
    best = at_rate(server, draws, rate, slo_ttft, slo_tpot)
    if best.share < share:
        return None
    high = rate
    while (now := at_rate(server, draws, high * 4, slo_ttft, slo_tpot)).share >= share:
        best, high = now, high * 4
        if high > 1e6:
            return best
    low, high = best.rate, high * 4
    while high / low > 1.02:
        now = at_rate(server, draws, (low * high) ** 0.5, slo_ttft, slo_tpot)
        if now.share >= share:
            best, low = now, now.rate
        else:
            high = now.rate
    return best
