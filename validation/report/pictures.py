"""The report's pictures as SVG text: parity in logarithms with the band of the claim, and residuals by factor."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

from validation.report.claims import Verdict, by_factor
from validation.report.collection import Point

WIDTH, HEIGHT, MARGIN = 520, 380, 56
COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8e5ea2", "#b08900", "#2a9d8f")
XMLNS = ' xmlns="http://www.w3.org/2000/svg"'
"""What makes a picture a file of its own; within a page it is not needed."""
MOST = 4000
"""Points above which a picture leaves out those that lie on others."""


def parity(verdict: Verdict) -> str:
    """Predicted over measured, both in powers of ten, the points of a card in one colour, the allowed band shaded."""
    points = [point for point in verdict.points if point.predicted > 0 and point.measured > 0]
    if not points:
        return ""
    values = [value for point in points for value in (point.predicted, point.measured)]
    low, high = floor(log10(min(values)) * 2) / 2, ceil(log10(max(values)) * 2) / 2
    high = max(high, low + 0.5)

    def x(value: float) -> float:
        return MARGIN + (log10(value) - low) / (high - low) * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (log10(value) - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    ends = (10**low, 10**high)
    out = [_open(f"{verdict.claim.name}: predicted over measured, {verdict.claim.unit}")]
    if any(verdict.claim.bars):
        below, above = verdict.band
        corners = [(ends[0], ends[0] * below), (ends[1], ends[1] * below), (ends[1], ends[1] * above)]
        corners.append((ends[0], ends[0] * above))
        clipped = " ".join(f"{x(a):.1f},{y(min(max(b, ends[0]), ends[1])):.1f}" for a, b in corners)
        out.append(f'<polygon points="{clipped}" fill="#00000011"/>')
    out.append(_line(x(ends[0]), y(ends[0]), x(ends[1]), y(ends[1]), "#888"))
    for power in range(ceil(low), floor(high) + 1):
        out.append(_line(x(10**power), HEIGHT - MARGIN, x(10**power), HEIGHT - MARGIN + 4, "#888"))
        out.append(_text(x(10**power), HEIGHT - MARGIN + 16, f"1e{power}", "middle"))
        out.append(_line(MARGIN - 4, y(10**power), MARGIN, y(10**power), "#888"))
        out.append(_text(MARGIN - 7, y(10**power) + 4, f"1e{power}", "end"))
    out.append(_text(WIDTH / 2, HEIGHT - 14, f"measured, {verdict.claim.unit}", "middle"))
    out.append(_text(12, HEIGHT / 2, f"predicted, {verdict.claim.unit}", "middle", turned=True))
    groups = sorted({point.factors.get("card", "") for point in points})
    seen: set[tuple[int, int]] = set()
    for point in points:
        place = round(x(point.measured)), round(y(point.predicted))
        if len(points) > MOST and place in seen:
            continue
        seen.add(place)
        colour = COLOURS[groups.index(point.factors.get("card", "")) % len(COLOURS)]
        out.append(
            f'<circle cx="{place[0]}" cy="{place[1]}" r="3" fill="{colour}99"><title>{_said(point)}</title></circle>'
        )
    for index, group in enumerate(groups):
        colour = COLOURS[index % len(COLOURS)]
        out.append(f'<circle cx="{MARGIN + 12}" cy="{MARGIN + 4 + 16 * index}" r="4" fill="{colour}"/>')
        out.append(_text(MARGIN + 22, MARGIN + 8 + 16 * index, group or "no card"))
    return "".join([*out, "</svg>"])


def residuals(points: Sequence[Point]) -> str:
    """The mean error of each value of each factor as a bar from zero, in per cent."""
    rows = by_factor(points)
    if not rows:
        return ""
    high = 18 * len(rows) + 36
    most = max(0.01, *(abs(row[3]) for row in rows))
    middle, reach = 330, 150
    out = [_open("mean error by factor, predicted / measured - 1", WIDTH, high)]
    out.append(_line(middle, 20, middle, high - 12, "#888"))
    for index, (factor, value, count, bias, _) in enumerate(rows):
        top = 24 + 18 * index
        length = reach * abs(bias) / most
        start = middle if bias > 0 else middle - length
        out.append(_text(4, top + 11, f"{factor}: {value} ({count})"))
        out.append(f'<rect x="{start:.1f}" y="{top}" width="{length:.1f}" height="12" fill="#1b6ca8aa"/>')
        out.append(_text(middle + (-4 if bias > 0 else 4), top + 11, f"{bias:+.1%}", "end" if bias > 0 else "start"))
    return "".join([*out, "</svg>"])


def _said(point: Point) -> str:
    return escape(f"{point.title}: predicted {point.predicted:.4g}, measured {point.measured:.4g}, {point.error:+.1%}")


def _open(title: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg{XMLNS} viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="11"><title>{escape(title)}</title>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.0f} {y:.0f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333"{turn}>{escape(text)}</text>'
