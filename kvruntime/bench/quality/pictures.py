"""Pictures of rows of ``kvruntime eval`` and ``compare``: quality over bits, positions, bytes; grids of needles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.store import check_writable
from kvruntime.bench.harness.tables import BASE, groups
from kvruntime.bench.quality import comparison as compared
from kvruntime.bench.quality.answers import KIND as ANSWERS
from kvruntime.bench.quality.report import change, uncompressed
from kvruntime.bench.quality.windows import KIND as WINDOWS
from kvruntime.eval.tasks import TASKS
from kvsim.atomic import replace_file
from kvsim.install import install_hint
from kvsim.output.plot import label_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME_WIDTH, NAME_STEP = 0.3, 0.032
"""Of a name beside a point: its room, and the step to the next, as shares of the picture."""
Panel = Callable[["Axes"], None]


def quality_panels(rows: Sequence[Row]) -> dict[str, Panel]:
    """Name -> drawing, of whatever ``rows`` hold: ``bits``, ``positions``, one a task on a grid, and of ``kvruntime
    compare`` ``comparison`` and ``ablation``."""
    out: dict[str, Panel] = {}
    found = [group for group in groups(rows, WINDOWS) if uncompressed(group) is not None and len(group) > 1]
    if found:
        out["bits"] = partial(bits, found)
        out["positions"] = partial(positions, max(found, key=lambda group: int(group[0]["window"])))
    for name, task in TASKS.items():
        cells = [row for row in rows if row["kind"] == ANSWERS and row["task"] == name and "failed" not in row]
        if task.grid and cells:
            out[name] = partial(grid, cells)
    timed = next((group for group in found if compared.speeds_of(rows, group)), None)
    if timed is not None:
        out["comparison"] = partial(comparison, rows, timed)
    if studies := balanced_ablations(rows):
        out["ablation"] = partial(ablation, studies[0])
    return out


def bits(found: Sequence[list[Row]], axes: Axes) -> None:
    """Perplexity against the uncompressed cache's over the bits of an element, with intervals, a line a window."""
    named: dict[tuple[float, float], str] = {}
    for group in found:
        base = uncompressed(group)
        own = sorted((row for row in group if row["method"] not in BASE and row["bits"]), key=lambda row: row["bits"])
        points = [(row["bits"], *change_of(row, base)) for row in own]
        if not points:
            continue
        x, y, low, high = (np.array(column) for column in zip(*points, strict=True))
        prompt = group[0].get("prompt_length", 0)
        label = f"windows of {group[0]['window']:,}" + (f", a prompt of {prompt}" if prompt else "")
        axes.errorbar(x, 100 * y, 100 * np.array([y - low, high - y]), fmt="o", markersize=4, capsize=2, label=label)
        named |= {(at, 100 * share): row["method"] for row, (at, share, *_) in zip(own, points, strict=True)}
    axes.axhline(0, color="0.6", linewidth=0.8)
    _scale_changes(axes)
    _name_points(axes, named)
    axes.set_xlabel("bits of an element, everything counted")
    axes.set_ylabel("perplexity against fp16 (%), 95 % intervals")
    axes.legend(fontsize=8)
    first = found[0][0]
    axes.set_title(f"What bits cost on {first['text']}\n{first['model']}, weights: {first['weights']}", fontsize=9)
    axes.grid(alpha=0.3)


def _scale_changes(axes: Axes) -> None:
    """The y axis of percents from tenths to hundreds, logarithmic above 1, about what is drawn."""
    low, high = axes.dataLim.intervaly
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(1.5 * min(low, 0) - 0.1, 1.5 * max(high, 1))


def _name_points(axes: Axes, named: dict[tuple[float, float], str]) -> None:
    """Each method's name once, beside its highest point; those too near one another moved up.  Room for them on the
    right, whatever the scales, which are set."""
    within = axes.transAxes.inverted()
    right = axes.transData.inverted().transform(axes.transAxes.transform((1 + NAME_WIDTH, 0)))[0]
    axes.set_xlim(axes.get_xlim()[0], right)
    axes.set_ylim(axes.get_ylim())
    points = {name: max(point for point, other in named.items() if other == name) for name in named.values()}
    shares = {name: within.transform(axes.transData.transform(point)) for name, point in points.items()}
    placed: list[tuple[float, float]] = []
    for name, (x, y) in sorted(shares.items(), key=lambda each: float(each[1][1])):
        at = y
        for left, height in placed:
            if abs(left - x) < NAME_WIDTH and abs(height - at) < NAME_STEP:
                at = height + NAME_STEP
        placed.append((x, at))
        axes.text(x + 0.01, at, name, fontsize=6, va="center", transform=axes.transAxes)


def change_of(row: Row, base: Row | None) -> tuple[float, float, float]:
    """:func:`kvruntime.bench.quality.report.change` of a row that is not the base."""
    found = change(row, base)
    assert found is not None
    return found


def positions(group: Sequence[Row], axes: Axes) -> None:
    """Perplexity against the uncompressed cache's over a token's position in its window."""
    base = uncompressed(group)
    assert base is not None
    ends: list[tuple[tuple[float, float], str, Any]] = []
    for row in group:
        if row is base:
            continue
        at = [last for _, last, *_ in row["by_position"]]
        pairs = zip(row["by_position"], base["by_position"], strict=True)
        heights = [100 * float(np.expm1(own[2] - plain[2])) for own, plain in pairs]
        (line,) = axes.plot(at, heights, marker="o", markersize=3)
        ends.append(((at[-1], heights[-1]), row["method"], line.get_color()))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("a token's position in its window, up to")
    axes.set_ylabel("perplexity against fp16 (%)")
    _scale_changes(axes)
    label_ends(axes, ends)
    axes.set_title(f"Perplexity by position, {group[0]['text']}, windows of {group[0]['window']:,}", fontsize=9)
    axes.grid(alpha=0.3)


def grid(cells: Sequence[Row], axes: Axes) -> None:
    """Heat maps of scores, depth by length, of every method side by side; what such scores say stands in the title."""
    methods = list(dict.fromkeys(row["method"] for row in cells))
    lengths = sorted({row["length"] for row in cells})
    depths = sorted({row["depth"] for row in cells})
    width = len(lengths) + 1
    picture = np.full((len(depths), width * len(methods) - 1), np.nan)
    for row in cells:
        column = methods.index(row["method"]) * width + lengths.index(row["length"])
        picture[depths.index(row["depth"]), column] = row["score"]
    image = axes.imshow(picture, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    ticks = [index * width + place for index in range(len(methods)) for place in range(len(lengths))]
    axes.set_xticks(ticks, [f"{length:,}" for length in lengths] * len(methods), fontsize=5, rotation=90)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
    for index, method in enumerate(methods):
        middle = index * width + (len(lengths) - 1) / 2
        axes.text(middle, -0.6, method, fontsize=5, ha="center", va="bottom", rotation=12)
    axes.set_ylabel("depth of the needle")
    axes.set_xlabel("tokens of the prompt")
    axes.figure.colorbar(image, ax=axes, label="share found", fraction=0.03)
    task = TASKS[cells[0]["task"]]
    caveat = task.caveat.partition(":")[0] or task.what
    axes.set_title(f"{cells[0]['task']}: {cells[0]['model']}; {caveat}", fontsize=8, pad=30)


def draw_comparison(rows: Sequence[Row], path: Path) -> None:
    """Writes the picture of ``kvruntime compare``: perplexity over bytes a token, speeds as colours, the frontier as a
    line; beside it the ablation where there is one.

    Raises ``ValueError`` for a file that cannot be written, no rows to draw, and as :func:`check_picture` does.
    """
    suffix = check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [group for group in groups(rows, WINDOWS) if uncompressed(group) is not None]
    if not found:
        raise ValueError("these results hold no windows of the uncompressed cache to compare with")
    studies = balanced_ablations(rows)
    figure = Figure(figsize=(9 + 7 * bool(studies), 6), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, 1 + bool(studies), squeeze=False)[0]
    comparison(rows, found[0], places[0])
    if studies:
        ablation(studies[0], places[1])
    picture = BytesIO()
    figure.savefig(picture, format=suffix, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
    replace_file(path, picture.getvalue(), regular=True)


def check_picture(path: Path) -> str:
    """The kind of picture that the name asks for.

    Raises ``ValueError`` for a name that is no ``.png`` or ``.svg``, a path that cannot be written, or without
    matplotlib.
    """
    suffix = path.suffix.removeprefix(".")
    if suffix not in ("png", "svg"):
        raise ValueError(f"picture {path}: allowed are names that end in .png or .svg")
    if find_spec("matplotlib") is None:
        raise ValueError(f"a picture needs matplotlib: {install_hint('plot')}")
    check_writable(path)
    return suffix


def comparison(rows: Sequence[Row], group: Sequence[Row], axes: Axes) -> None:
    """Perplexity over bytes a token of every method."""
    entries = compared.entries(group, compared.speeds_of(rows, group))
    x = [entry.token_nbytes / 1024 for entry in entries]
    y = [100 * entry.change for entry in entries]
    errors = [[100 * (e.change - e.low) for e in entries], [100 * (e.high - e.change) for e in entries]]
    axes.errorbar(x, y, errors, fmt="none", ecolor="0.6", capsize=2, zorder=1)
    timed = [(a, b, e.speed_ratio) for e, a, b in zip(entries, x, y, strict=True) if e.speed_ratio is not None]
    if timed:
        axes.scatter(x, y, s=45, facecolors="white", edgecolors="0.4", zorder=2)
        at, heights, rates = ([each[place] for each in timed] for place in range(3))
        dots = axes.scatter(at, heights, c=rates, cmap="viridis", s=45, zorder=3)
        label = "decoding speed, of the uncompressed cache's" + "; white: not timed" * (len(timed) < len(entries))
        axes.figure.colorbar(dots, ax=axes, label=label, fraction=0.04)
    else:
        axes.scatter(x, y, s=45, zorder=2)
    best = compared.frontier(entries)
    axes.plot(
        [e.token_nbytes / 1024 for e in best], [100 * e.change for e in best], color="0.4", linewidth=0.8, zorder=0
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    _scale_changes(axes)
    _name_points(axes, {(at, height): entry.method for entry, at, height in zip(entries, x, y, strict=True)})
    axes.set_xlabel("KiB a token, all layers")
    axes.set_ylabel("perplexity against fp16 (%), 95 % intervals")
    first = group[0]
    title = f"{first['model']}, weights: {first['weights']}\n{first['text']}, windows of {first['window']:,}"
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)


def balanced_ablations(rows: Sequence[Row]) -> list[list[Row]]:
    """The ablations among ``rows`` whose options can be compared."""
    return [group for group in groups(rows, compared.ABLATION) if compared.effects(group)]


def ablation(group: Sequence[Row], axes: Axes) -> None:
    """What each value of each option does in the mean."""
    found = compared.effects(group)
    names = [f"{option.replace('_', ' ')} {value}" for option, value, *_ in found]
    bars = axes.barh(names, [100 * float(np.expm1(mean)) for *_, mean in found], color="C0")
    axes.bar_label(bars, [f"{bits:.2f} bits" for _, _, bits, _ in found], fontsize=7, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("perplexity against fp16 (%), mean over the other options")
    options = dict.fromkeys(option.replace("_", " ") for option, *_ in found)
    axes.set_title(f"Ablation of plain {compared.COMPRESSED}: {', '.join(options)}", fontsize=9)
    axes.grid(alpha=0.3, axis="x")
