"""The screen of ``kvsim estimate``: one sentence, one table, and what the figures rest on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from kvsim.memory.estimate import Estimate
from kvsim.output.tables import table, terminal_width
from kvsim.output.text import GIB, KIB, MIB, amount, count, unit

if TYPE_CHECKING:
    from kvsim.engines import Pool
    from kvsim.memory.capacity import Room
    from kvsim.memory.sharding import Sharding

LINE = 96
"""Characters of a line of prose."""
Limits = Sequence[tuple[int | None, int | None]]
"""The largest batch and the longest context, a pair a row; ``None``: no limit."""


def _line() -> int:
    return min(LINE, terminal_width() or LINE)


class Times(NamedTuple):
    """Seconds (value, low, high) of a token and to the first, what bounds a step, and how many sequences run."""

    token: tuple[float, float, float]
    first: tuple[float, float, float] | None
    bound: str
    running: float


def _size(nbytes: float) -> str:
    name, scale = next(
        each for each in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)) if nbytes >= each[1] or each[1] == KIB
    )
    return f"{nbytes / scale:,.2f} {name}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def weighed(name: str, rows: Sequence[Estimate]) -> str:
    """The sentence where no card is given: what the cache takes, and what the smallest saves.  ``name``: as typed."""
    first, least = rows[0], min(rows, key=lambda row: row.total_nbytes)
    what = _sequences(first.batch_size, first.num_tokens)
    said = f"{first.method.name} takes {_size(first.total_nbytes)} for {what}"
    if least.total_nbytes < first.total_nbytes:
        times = first.total_nbytes / least.total_nbytes
        said += f"; {least.method.name} takes {_size(least.total_nbytes)}, {times:.2f} times less"
    return _lines(said, "--gpu h100-sxm (what fits that card, and how fast)", name)


def answered(
    name: str,
    where: str,
    room: Room,
    rows: Sequence[Estimate],
    needs: Sequence[int],
    limits: Limits,
    times: Sequence[Times | None],
) -> str:
    """The sentence of a card: does it fit, how many, how fast, and what to ask next.

    ``where``: the cards, as typed (``h100-sxm:2``); ``needs``: bytes on the fullest card, a number a row.
    """
    fitting = [place for place, nbytes in enumerate(needs) if nbytes <= room.cache_nbytes]
    what = _sequences(rows[0].batch_size, rows[0].num_tokens)
    if room.cache_nbytes <= 0:
        lacking = _size(-room.cache_nbytes)
        said = f"The weights leave no room for a cache on {where}: {lacking} are missing for them alone"
    elif not fitting:
        place = min(range(len(rows)), key=needs.__getitem__)
        lacking = _size(needs[place] - room.cache_nbytes)
        least = f"{rows[place].method.name} lacks the least, {lacking}{_most(limits[place])}"
        said = f"{what} {_do(rows)} not fit {where}: {least}"
    else:
        said = _fitting(where, rows, _size(needs[0] - room.cache_nbytes), limits, times, fitting)
    users = f"kvsim plan {shlex.quote(name)} --gpu {room.hardware.id} --users {rows[0].batch_size}"
    return _lines(said, f"{users} (how many cards, at what price)", name)


def _lines(said: str, further: str, name: str) -> str:
    """The sentence, and what to ask next."""
    return f"{fill(said, _line())}.\nNext: {further}\n      kvsim explain {shlex.quote(name)} (every byte)"


def _fitting(
    where: str,
    rows: Sequence[Estimate],
    lacking: str,
    limits: Limits,
    times: Sequence[Times | None],
    fitting: Sequence[int],
) -> str:
    """Where some fit: the first method, and the one that most fit with."""
    what = _sequences(rows[0].batch_size, rows[0].num_tokens)
    other = max(fitting, key=lambda place: limits[place][0] or float("inf"))
    figures = f"{_most(limits[other])}{_rate(times[other])}"
    if fitting[0] != 0:
        said = f"{what} {_do(rows)} not fit {where} with {rows[0].method.name} ({lacking} are missing)"
        return f"{said}, but with {rows[other].method.name}{figures}"
    said = f"{what} fit{'' if rows[0].batch_size > 1 else 's'} {where} with {rows[0].method.name}"
    said += f"{_most(limits[0])}{_rate(times[0])}"
    return f"{said}; with {rows[other].method.name}{figures}" if other else said


def _sequences(batch: int, tokens: int) -> str:
    return f"{batch:,} sequence{'s' if batch > 1 else ''} of {tokens:,} tokens"


def _do(rows: Sequence[Estimate]) -> str:
    return "do" if rows[0].batch_size > 1 else "does"


def _most(limits: tuple[int | None, int | None]) -> str:
    return "" if limits[0] is None else f", at most {limits[0]:,} of them"


def _rate(times: Times | None) -> str:
    if times is None:
        return ""
    return f", {_short(times.running / times.token[0])} tokens/s ({_short(1e3 * times.token[0])} ms a token)"


def methods(rows: Sequence[Estimate]) -> str:
    """The table where no card is given: bytes a token, stored and read, and of the whole cache."""
    name, scale = unit(max(row.nbytes for row in rows))
    read_name, read_scale = unit(max(row.read_nbytes for row in rows))
    heads = ["method", "stored B/token", "read B/token", f"read {read_name}/step", f"cache {name}", "x fp16"]
    body = (
        (
            row.method.name,
            count(row.nbytes_per_token),
            count(row.read_nbytes_per_token),
            amount(row.read_nbytes, read_scale),
            amount(row.nbytes, scale),
            f"{row.compression:.2f}",
        )
        for row in rows
    )
    return table(heads, body) + _apart(rows)


def methods_on_a_card(rows: Sequence[Estimate], limits: Limits, times: Sequence[Times | None]) -> str:
    """The table of a card: what a method takes, how many sequences fit, the longest, and its times with their bands."""
    name, scale = unit(max(row.nbytes for row in rows))
    timed = any(each is not None for each in times)
    heads = ["method", name, "x fp16", "fit", "longest"]
    heads += ["ms/token", "tok/s", "s to first"] if timed else []
    body = []
    for row, (batch, longest), each in zip(rows, limits, times, strict=True):
        most = "no limit" if batch is None else f"{batch:,}"
        if batch is not None and batch < row.batch_size:
            most += f" of {row.batch_size:,}"
        cells = [row.method.name, amount(row.nbytes, scale), f"{row.compression:.2f}", most]
        cells.append("no limit" if longest is None else f"{longest:,}")
        body.append(cells + (_timed(each) if timed else []))
    one = rows[0]
    legend = f"fit: sequences of {one.num_tokens:,} tokens that do; longest: tokens of each of {one.batch_size:,}"
    legend += "; times with their bands (low-high)" if timed else ""
    return f"{table(heads, body, most=99)}\n\n{fill(legend, _line())}{_apart(rows)}"


def _timed(times: Times | None) -> list[str]:
    if times is None:
        return ["-"] * 3
    token = [_short(1e3 * seconds) for seconds in times.token]
    first = [_short(seconds) for seconds in times.first] if times.first else None
    rate = _short(times.running / times.token[0])
    return [
        f"{token[0]} ({token[1]}-{token[2]})",
        rate,
        f"{first[0]} ({first[1]}-{first[2]})" if first else "-",
    ]


def _apart(rows: Sequence[Estimate]) -> str:
    """What no method stores, in a line a kind: the same for every method."""
    out = ""
    for what, size in (("constant state", rows[0].state_nbytes), ("index keys", rows[0].index_nbytes)):
        if size:
            name, scale = unit(size)
            out += f"\n\nAnd {amount(size, scale)} {name} of {what} ({size:,} B), which no method stores."
    return out


def memory(room: Room, cards: int = 1, flag: str = "--reserve") -> str:
    """What a card's memory goes to, and what is left for the cache; ``flag`` sets the share held back."""

    def gib(nbytes: int) -> str:
        return f"{nbytes / GIB:,.2f} GiB"

    def band(name: str, size: int) -> str:
        low, high = room.overhead_band.get(name, (1.0, 1.0))
        return "" if low == high else f" (estimate: {size * low / GIB:,.2f} to {size * high / GIB:,.2f})"

    least, most = room.cache_band
    within = f", {least / GIB:,.2f} to {most / GIB:,.2f} within those bands" if most > least else ""
    share = room.reserve_nbytes / room.memory_nbytes
    each = f"{cards} x {room.hardware.id}, the fullest" if cards > 1 else room.hardware.id
    lines = [
        f"{each}: {gib(room.memory_nbytes)} ({room.hardware.memory_source})",
        f"  - {gib(room.reserve_nbytes)} held back ({share:.0%}, {flag})",
        f"  - {gib(room.weight_nbytes)} weights at {room.weight_bits:g} bits",
        *(f"  - {gib(size)} {name.replace('_', ' ')}{band(name, size)}" for name, size in room.overhead.items()),
        f"  = {gib(room.cache_nbytes)} for the cache{within}",
    ]
    return "\n".join(lines)


def shares(rows: Sequence[Estimate], ranks: Sequence[tuple[int, int]], sharding: Sharding) -> str:
    """Bytes of the fullest rank, and over all of them."""
    sizes = ", ".join(
        [
            *(f"{name.replace('_size', '').replace('_', ' ')} {n}" for name, n in vars(sharding).items() if n > 1),
            *["expert parallel"] * sharding.enable_expert_parallel,
        ]
    )
    name, scale = unit(max(total for _, total in ranks))
    heads = ["method", f"fullest card {name}", f"all {sharding.ranks} cards {name}"]
    body = [
        (row.method.name, amount(own, scale), amount(total, scale))
        for row, (own, total) in zip(rows, ranks, strict=True)
    ]
    return f"Sharded: {sizes}\n\n{table(heads, body)}"


def pools(rows: Sequence[Estimate], known: Sequence[Pool | None], request: int) -> str:
    """The pool of an engine that has one, in the words of vLLM's log, for requests of so many tokens, whole ones: cards
    that share tokens hold a part of each."""
    body = [
        (
            row.method.name,
            f"{pool.num_gpu_blocks:,}",
            f"{int(pool.concurrency * request):,}",
            f"{request:,}",
            f"{pool.concurrency:,.2f}x",
        )
        for row, pool in zip(rows, known, strict=True)
        if pool is not None
    ]
    if not body:
        return ""
    return table(["method", "GPU blocks", "KV cache tokens", "request tokens", "max concurrency"], body)
