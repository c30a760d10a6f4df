"""Charts as inline SVG, nothing fetched: lines over a logarithmic axis, and stacked bars.

Every chart is drawn twice, wide and narrow (:data:`FRAMES`), and the page shows the one that its width suits, so that
texts have their size on a phone too.  Colours are CSS classes (``c0`` ... ``c7`` of lines, ``p0`` ... ``p7`` of bars'
parts), so that a page in light or dark recolours them; lines also differ in their dashes.

A chart is cut into *columns*, one an x (or a bar): each says the values of all curves there, on hover by itself, and on
focus and from key to key by ``charts.js``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor, log10
from typing import NamedTuple

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")


class Frame(NamedTuple):
    """A drawing's size and margins, in CSS pixels at its natural width."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int = 26
    bottom: int = 46

    @property
    def end(self) -> int:
        return self.width - self.right

    @property
    def floor(self) -> int:
        return self.height - self.bottom


FRAMES = (Frame("wide", 720, 320, 52, 136), Frame("narrow", 360, 280, 44, 14))
LETTER = 7.2
"""Pixels of a bold letter, for the room that a name takes."""
BAR_ROOM = 96
"""Pixels right of the longest bar, for its total."""


@dataclass(frozen=True)
class Line:
    """One curve: points ``(x, y)`` with x and y above 0, and optionally the band ``(x, low, high)`` around it.

    ``colour``: its place in the palette, the same for one method in every chart.  ``end``: what its last point is,
    where the axis goes on (``memory ends``): marked by a cross.
    """

    name: str
    colour: int
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    end: str = ""
    here: float | None = None
    """The x that was asked about on this curve, marked by a dot."""


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


def value(number: float) -> str:
    """Four significant digits, thousands with commas."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


Placed = Callable[[float], float]


class Axes(NamedTuple):
    """Where a value lies in a drawing: ``across`` of an x, ``up`` of a y; the y axis' ticks."""

    across: Placed
    up: Placed
    ticks: list[float]


def _axes(frame: Frame, xs: Sequence[float], ys: Sequence[float], log_y: bool) -> Axes:
    x_low, x_high = log10(min(xs)), log10(max(xs))
    y_low, y_high, ticks = _levels(min(ys), max(ys), log_y)

    def across(x: float) -> float:
        return frame.left + (log10(x) - x_low) / max(1e-9, x_high - x_low) * (frame.end - frame.left)

    def up(y: float) -> float:
        y = min(max(y, y_low), y_high)
        share = (log10(y) - log10(y_low)) / (log10(y_high) - log10(y_low)) if log_y else (y - y_low) / (y_high - y_low)
        return frame.floor - share * (frame.floor - frame.top)

    return Axes(across, up, ticks)


def lines(
    title: str,
    x_name: str,
    y_name: str,
    curves: Sequence[Line],
    rules: Sequence[Rule] = (),
    log_y: bool = True,
    here: float | None = None,
    unit: str = "tokens",
) -> str:
    """A chart of curves over a logarithmic x axis (doublings); ``title`` is what a screen reader says.

    ``here``: the x that was asked about, in ``unit``: a line, and a dot on every curve that has no ``here`` of its own.
    """
    curves = [curve for curve in curves if len(curve.points) > 1]
    if not curves:
        return '<p class="empty">Nothing to draw: no method fits.</p>'
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points] + [rule.level for rule in rules]
    drawings = []
    for frame in FRAMES:
        axes = _axes(frame, xs, ys, log_y)
        out = [_open(title, frame.width, frame.height, f"lines {frame.name}")]
        out += _grid(frame, axes, min(xs), max(xs))
        middle = (frame.left + frame.end) / 2
        out.append(_text("axis", middle, frame.height - 6, x_name, "middle"))
        out += _rules(frame, axes, rules)
        out += [_band(curve, axes) for curve in curves if curve.band]
        out += [f'<polyline {_stroke(curve.colour)} points="{_path(curve.points, axes)}"/>' for curve in curves]
        if here is not None and min(xs) <= here <= max(xs):
            out.append(_upright("here", axes.across(here), frame))
            at = min(max(axes.across(here), frame.left + 40), frame.width - 60)
            out.append(_text("tick", at, frame.top - 9, f"asked: {here:,.0f}", "middle"))
        out += [mark for curve in curves for mark in _marks(curve, axes, here)]
        out += _end_names(curves, axes, frame)
        out += _columns(curves, axes, frame, here, unit)
        out.append("</svg>")
        drawings.append("".join(out))
    return _figure(y_name, drawings, "".join(f"<li>{_line_key(curve)}{escape(curve.name)}</li>" for curve in curves))


def _figure(caption: str, drawings: Sequence[str], keys: str) -> str:
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<div class="drawing">{"".join(drawings)}</div><ul class="legend">{keys}</ul></figure>'
    )


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _upright(kind: str, x: float, frame: Frame) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.floor}"/>'


def _level(kind: str, y: float, frame: Frame) -> str:
    return f'<line class="{kind}" x1="{frame.left}" x2="{frame.end}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _grid(frame: Frame, axes: Axes, low: float, high: float) -> list[str]:
    out = []
    for y in axes.ticks:
        out.append(_level("grid", axes.up(y), frame))
        out.append(_text("tick", frame.left - 6, axes.up(y) + 4, short(y), "end"))
    for x in _doublings(low, high, 7 if frame.name == "wide" else 5):
        out.append(_upright("grid", axes.across(x), frame))
        out.append(_text("tick", axes.across(x), frame.floor + 17, binary(x), "middle"))
    return out


def _rules(frame: Frame, axes: Axes, rules: Sequence[Rule]) -> list[str]:
    out = []
    for rule in rules:
        y = axes.up(rule.level)
        out += [_level("rule", y, frame), _text("tick said", frame.left + 4, y + 14, rule.name)]
    return out


def _band(curve: Line, axes: Axes) -> str:
    edge = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
    return f'<polygon class="band c{curve.colour % 8}" points="{_path(edge, axes)}"/>'


def _marks(curve: Line, axes: Axes, here: float | None) -> list[str]:
    """A dot where it was asked about, a cross where it ends before the axis does."""
    out, asked = [], here if curve.here is None else curve.here
    x, y = axes.across(curve.points[-1][0]), axes.up(curve.points[-1][1])
    if curve.end:
        out.append(f'<path class="end c{curve.colour % 8}" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>')
    for at, height in curve.points:
        if at == asked and not (curve.end and (at, height) == curve.points[-1]):
            place = f'cx="{axes.across(at):.1f}" cy="{axes.up(height):.1f}"'
            out.append(f'<circle class="dot c{curve.colour % 8}" {place} r="4"/>')
    return out


def _columns(curves: Sequence[Line], axes: Axes, frame: Frame, here: float | None, unit: str) -> list[str]:
    """A strip an x, with what every curve that has a point there says.

    Tab reaches those that were asked about and those where a curve ends; the others are reached by arrow keys.
    """
    said: dict[float, list[str]] = {}
    shown = {here, *(curve.here for curve in curves), *(curve.points[-1][0] for curve in curves if curve.end)}
    for curve in curves:
        for x, y in curve.points:
            last = curve.end and (x, y) == curve.points[-1]
            said.setdefault(x, []).append(f"{curve.name}: {value(y)}" + (f", {curve.end}" if last else ""))
    xs = sorted(said)
    middles = [(axes.across(one) + axes.across(other)) / 2 for one, other in pairwise(xs)]
    edges = [float(frame.left), *middles, float(frame.end)]
    out = []
    for x, (left, right) in zip(xs, pairwise(edges), strict=True):
        label = "\n".join([f"{x:,.0f} {unit}", *said[x]])
        strip = (
            f'<rect class="hit" x="{left:.1f}" y="{frame.top}" width="{max(right - left, 0):.1f}" '
            f'height="{frame.floor - frame.top}"/>{_upright("guide", axes.across(x), frame)}'
        )
        out.append(_column(label, strip, 0 if x in shown else -1))
    return out


def _column(label: str, content: str, tab: int) -> str:
    return f'<g class="column" tabindex="{tab}" role="img"><title>{escape(label)}</title>{content}</g>'


def _end_names(curves: Sequence[Line], axes: Axes, frame: Frame) -> list[str]:
    """Each curve's name beside its end, on a narrow drawing above it; moved up where it would stand on another's."""
    beside = frame.right > 100
    names: list[tuple[float, float, float]] = []
    out = []
    ends = ((axes.across(curve.points[-1][0]), axes.up(curve.points[-1][1]), curve) for curve in curves)
    for x, y, curve in sorted(ends, key=lambda each: (-round(each[1] / 6), -each[0])):
        width = LETTER * len(curve.name)
        left, at = (x + 9, y + 4) if beside else (max(frame.left, x - width), y - 9)
        for other_left, other_right, height in names:
            if left < other_right and other_left < left + width:
                at = min(at, height - 13)
        names.append((left, left + width, at))
        out.append(_text(f"name c{curve.colour % 8}", left, at, curve.name))
    return out


def _path(points: Iterable[tuple[float, float]], axes: Axes) -> str:
    return " ".join(f"{axes.across(x):.1f},{axes.up(y):.1f}" for x, y in points)


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


def _doublings(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` powers of two."""
    powers = [1 << power for power in range(64) if low <= 1 << power <= high]
    every = max(1, ceil(len(powers) / most))
    return [float(power) for power in powers[::every]]


def _open(title: str, width: int, height: int, kind: str) -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="group" aria-label="{escape(title)}">'


def _stroke(colour: int) -> str:
    dash = DASHES[colour % 8]
    return f'class="line c{colour % 8}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _line_key(curve: Line) -> str:
    return (
        f'<svg class="key" viewBox="0 0 26 8" aria-hidden="true"><line {_stroke(curve.colour)} '
        'x1="1" x2="25" y1="4" y2="4"/></svg>'
    )


def bars(
    title: str, caption: str, rows: Sequence[tuple[str, dict[str, float]]], format_total: Callable[[float], str]
) -> str:
    """Stacked horizontal bars: ``(name, {part: amount})`` a row, its total at the end; empty parts are left out."""
    names = list(dict.fromkeys(part for _, parts in rows for part, amount in parts.items() if amount > 0))
    most = max((sum(parts.values()) for _, parts in rows), default=0)
    if not most:
        return '<p class="empty">Nothing to draw.</p>'
    step = 44
    drawings = []
    for frame in FRAMES:
        room = frame.width - BAR_ROOM
        out = [_open(title, frame.width, step * len(rows) + 4, f"bars {frame.name}")]
        for place, (name, parts) in enumerate(rows):
            top, at, total = place * step, 0.0, format_total(sum(parts.values()))
            bar = [f'<rect class="hit" x="0" y="{top}" width="{frame.width}" height="{step}"/>']
            bar.append(_text("name", 0, top + 15, name))
            for number, part in enumerate(names):
                width = parts.get(part, 0) / most * room
                if width > 0:
                    size = f'width="{max(width, 0.5):.1f}" height="16"'
                    bar.append(f'<rect class="bar p{number % 8}" x="{at:.1f}" y="{top + 20}" {size}/>')
                at += width
            bar.append(_text("tick", at + 6, top + 33, total))
            said = [f"{part}: {format_total(parts[part])}" for part in names if parts.get(part, 0) > 0]
            out.append(_column("\n".join([name, *said, f"together: {total}"]), "".join(bar), 0))
        out.append("</svg>")
        drawings.append("".join(out))
    keys = "".join(
        '<li><svg class="key" viewBox="0 0 26 8" aria-hidden="true">'
        f'<rect class="bar p{number % 8}" width="26" height="8"/></svg>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return _figure(caption, drawings, keys)
