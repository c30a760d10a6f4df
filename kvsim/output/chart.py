"""Charts as inline SVG, nothing fetched: lines over a logarithmic axis, and stacked bars.

Colours are CSS classes (``c0`` ... ``c7`` of lines, ``p0`` ... ``p7`` of bars' parts), so that a page in light or dark
recolours them; lines also differ in their dashes.  Texts are 12 units of a 720-unit width; on a phone the page makes
them larger and leaves the names at the lines' ends to the legend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 140, 26, 44
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")


@dataclass(frozen=True)
class Line:
    """One curve: points ``(x, y)`` with x and y above 0, and optionally the band ``(x, low, high)`` around it.

    ``colour``: its place in the palette, the same for one method in every chart.
    """

    name: str
    colour: int
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    full: bool = False
    """Whether it ends where the memory does."""


@dataclass(frozen=True)
class Rule:
    """A level that is worth a line of its own."""

    level: float
    name: str


def short(number: float) -> str:
    """``1.5k``, ``128k``, ``2M`` (thousands), ``0.05``: for axes."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def binary(number: float) -> str:
    """``1k`` for 1024: contexts."""
    for scale, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def lines(
    title: str,
    x_name: str,
    y_name: str,
    curves: Sequence[Line],
    rules: Sequence[Rule] = (),
    log_y: bool = True,
    here: float | None = None,
) -> str:
    """A chart of curves over a logarithmic x axis (doublings); ``title`` is what a screen reader says.

    ``here``: the x that was asked about, marked on every curve.  Each point says its values on hover; those that were
    asked about and the ends of memory on focus too.
    """
    curves = [curve for curve in curves if len(curve.points) > 1]
    if not curves:
        return '<p class="empty">Nothing to draw: no method fits.</p>'
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points] + [rule.level for rule in rules]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high, y_ticks = _levels(min(ys), max(ys), log_y)

    def across(x: float) -> float:
        return LEFT + (log10(x) - log10(x_low)) / max(1e-9, log10(x_high) - log10(x_low)) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        y = min(max(y, y_low), y_high)
        share = (log10(y) - log10(y_low)) / (log10(y_high) - log10(y_low)) if log_y else (y - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    out = [_open(title, HEIGHT)]
    for y in y_ticks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in _doublings(x_low, x_high):
        out.append(f'<line class="grid" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(
            f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{binary(x)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    for rule in rules:
        y = up(rule.level)
        out.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(
            f'<text class="tick" x="{WIDTH - RIGHT - 3}" y="{y - 4:.1f}" text-anchor="end">{escape(rule.name)}</text>'
        )
    for curve in curves:
        if curve.band:
            edge = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
            out.append(f'<polygon class="band c{curve.colour % 8}" points="{_path(edge, across, up)}"/>')
    for curve in curves:
        out.append(
            f'<polyline {_stroke(curve.colour)} points="{_path(curve.points, across, up)}">'
            f"<title>{escape(curve.name)}</title></polyline>"
        )
    if here is not None and x_low <= here <= x_high:
        x = across(here)
        out.append(f'<line class="here" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 4}" text-anchor="middle">asked: {here:,.0f}</text>')
    for curve in curves:
        out += [_value(curve, place, here, across, up) for place in range(len(curve.points))]
    out += _end_names(curves, across, up)
    out.append("</svg>")
    return f"<figure><figcaption>{escape(y_name)}</figcaption>{''.join(out)}{_legend(curves)}</figure>"


def _value(
    curve: Line,
    place: int,
    here: float | None,
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> str:
    """One point with what it says: a dot where it was asked about, a cross where the memory ends."""
    x, y = curve.points[place]
    last = curve.full and place == len(curve.points) - 1
    said = f"{curve.name}: {y:,.4g} at {x:,.0f} tokens" + (", the most that fits" if last else "")
    at = f'cx="{across(x):.1f}" cy="{up(y):.1f}"'
    left, top = across(x), up(y)
    marks = f'<circle class="hit" {at} r="7"/>'
    if last:
        marks += f'<path class="end" d="M{left - 4:.1f} {top - 4:.1f}l8 8m0 -8l-8 8"/>'
    elif x == here:
        marks += f'<circle class="dot" {at} r="4"/>'
    shown = last or x == here
    focus = f' tabindex="0" role="img" aria-label="{escape(said)}"' if shown else ""
    anchor = "end" if left > (LEFT + WIDTH - RIGHT) / 2 else "start"
    tip = f'<text class="tip" x="{left:.1f}" y="{max(top - 9, 12):.1f}" text-anchor="{anchor}">{escape(said)}</text>'
    return f'<g class="point c{curve.colour % 8}"{focus}>{marks}{tip}</g>'


def _end_names(curves: Sequence[Line], across: Callable[[float], float], up: Callable[[float], float]) -> list[str]:
    """Each curve's name at its end, moved up where it would stand on another's."""
    out: list[str] = []
    taken: list[tuple[float, float]] = []
    for curve in sorted(curves, key=lambda curve: -up(curve.points[-1][1])):
        x, y = across(curve.points[-1][0]) + 8, up(curve.points[-1][1]) + 4
        while any(abs(x - left) < RIGHT and abs(y - top) < 14 for left, top in taken):
            y -= 14
        taken.append((x, y))
        out.append(f'<text class="name c{curve.colour % 8}" x="{x:.1f}" y="{y:.1f}">{escape(curve.name)}</text>')
    return out


def _path(points: Iterable[tuple[float, float]], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)


def _levels(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """The axis' ends and its ticks: powers of ten with 2 and 5 where few, or round steps from 0."""
    if not log:
        step = 10 ** floor(log10(high / 4))
        step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if high / (step * factor) <= 5)
        top = ceil(high / step) * step
        return 0.0, top, [step * count for count in range(round(top / step) + 1)]
    first, last = floor(log10(low) + 1e-9), ceil(log10(high) - 1e-9)
    if first == last:
        last += 1
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    bottom = max((tick for tick in ticks if tick <= low * 1.0001), default=ticks[0])
    top = min((tick for tick in ticks if tick >= high * 0.9999), default=ticks[-1])
    top = top if top > bottom else bottom * 10
    return bottom, top, [tick for tick in ticks if bottom <= tick <= top]


def _doublings(low: float, high: float) -> list[float]:
    """At most seven powers of two."""
    powers = [1 << power for power in range(64) if low <= 1 << power <= high]
    every = max(1, ceil(len(powers) / 7))
    return [float(power) for power in powers[::every]]


def _open(title: str, height: int, kind: str = "lines") -> str:
    return f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'


def _stroke(colour: int) -> str:
    dash = DASHES[colour % 8]
    return f'class="line c{colour % 8}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _legend(curves: Sequence[Line]) -> str:
    def key(curve: Line) -> str:
        return (
            f'<svg class="key" viewBox="0 0 26 8" aria-hidden="true"><line {_stroke(curve.colour)} '
            'x1="1" x2="25" y1="4" y2="4"/></svg>'
        )

    items = "".join(f"<li>{key(curve)}{escape(curve.name)}</li>" for curve in curves)
    return f'<ul class="legend">{items}</ul>'


def bars(
    title: str, caption: str, rows: Sequence[tuple[str, dict[str, float]]], format_total: Callable[[float], str]
) -> str:
    """Stacked horizontal bars: ``(name, {part: amount})`` a row, its total at the end; empty parts are left out."""
    names = list(dict.fromkeys(part for _, parts in rows for part, amount in parts.items() if amount > 0))
    most = max((sum(parts.values()) for _, parts in rows), default=0)
    if not most:
        return '<p class="empty">Nothing to draw.</p>'
    step, room = 44, WIDTH - 8 - 120
    height = step * len(rows) + 4
    out = [_open(title, height, "bars")]
    for place, (name, parts) in enumerate(rows):
        top, at = place * step, 8.0
        out.append(f'<text class="name" x="8" y="{top + 15}">{escape(name)}</text>')
        for number, part in enumerate(names):
            width = parts.get(part, 0) / most * room
            if width > 0:
                out.append(
                    f'<rect class="bar p{number % 8}" x="{at:.1f}" y="{top + 20}" width="{max(width, 0.5):.1f}" '
                    f'height="16"><title>{escape(part)}: {escape(format_total(parts[part]))}</title></rect>'
                )
            at += width
        total = format_total(sum(parts.values()))
        out.append(f'<text class="tick" x="{at + 5:.1f}" y="{top + 33}">{escape(total)}</text>')
    out.append("</svg>")
    keys = "".join(
        '<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true">'
        f'<rect class="bar p{number % 8}" width="26" height="8"/></svg>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<figure><figcaption>{escape(caption)}</figcaption>{"".join(out)}<ul class="legend">{keys}</ul></figure>'
