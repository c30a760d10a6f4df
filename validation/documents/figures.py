"""The report's pictures, each PNG bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from validation.claims.predict import predicted_trace
from validation.documents.tables import title

Row = dict[str, Any]

MIB = 1 << 20


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """Name -> PNG of every picture that the rows have figures for."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    out = {}
    for name, paint in PICTURES.items():
        figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
        if paint(axes, rows):
            file = BytesIO()
            figure.savefig(file, format="png", dpi=110)
            out[name] = file.getvalue()
        plt.close(figure)
    return out


def agreement(axes: Any, rows: Sequence[Row]) -> bool:
    """Predicted against measured, all caches, both axes in powers."""
    points: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        if row["kind"] in ("memory", "held", "peak"):
            points.setdefault(row["kind"], []).append((row["predicted"], row["measured"]))
    if not points:
        return False
    everything = [value for pairs in points.values() for pair in pairs for value in pair]
    axes.plot([min(everything), max(everything)], [min(everything), max(everything)], color="0.7", lw=1, zorder=0)
    for (kind, pairs), marker in zip(points.items(), "oxv", strict=False):
        axes.scatter(*zip(*pairs, strict=True), s=18, marker=marker, label=kind, alpha=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="predicted, bytes",
        ylabel="measured, bytes",
        title="Predicted against measured",
    )
    axes.legend()
    return True


def lengths(axes: Any, rows: Sequence[Row]) -> bool:
    """Measured bytes a layer over the tokens held, beside the prediction.

    Of the methods that were weighed after every token too, where there are such: variants of them lie close by.
    """
    chosen = [
        row for row in rows if row["kind"] == "memory" and row["way"] == "layers" and row["provided"] == "exactly"
    ]
    if not chosen:
        return False
    model, device = chosen[0]["model"], chosen[0]["device"]
    core = [row["method"] for row in rows if row["way"] == "layers" and row.get("every_step")]
    for row in chosen:
        if row["model"] != model or row["device"] != device or (core and row["method"] not in core):
            continue
        tokens, sizes = zip(*row["trace"], strict=True)
        predicted = [size / row["num_layers"] / MIB for _, size in predicted_trace(row)]
        line = axes.plot(tokens, predicted, lw=1)[0]
        axes.plot(
            tokens,
            [size / row["num_layers"] / MIB for size in sizes],
            "o",
            ms=4,
            color=line.get_color(),
            label=title(row["method"]),
        )
    axes.set(xlabel="tokens", ylabel="MiB a layer", title=f"{model}: weighed (points) on predicted (lines)")
    axes.legend()
    return True


def peaks(axes: Any, rows: Sequence[Row]) -> bool:
    """Errors of the peaks by phase."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "peak":
            groups.setdefault(f"{row['phase']}\n{row['device']}", []).append(100 * row["error"])
    if not groups:
        return False
    for place, errors in enumerate(groups.values()):
        axes.plot([place] * len(errors), errors, "o", ms=5, alpha=0.6, color="C0")
    axes.axhline(0, color="0.7", lw=1)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(ylabel="measured / predicted - 1, %", title="Peaks: error of the prediction")
    return True


def speeds(axes: Any, rows: Sequence[Row]) -> bool:
    """Decode tokens a second by method and batch."""
    chosen = [row for row in rows if row["kind"] == "speed" and row["phase"] == "decode"]
    return _bars(
        axes,
        chosen,
        "tokens a second",
        "Decode speed",
        lambda row: f"{title(row['method'])}\nbatch {row['batch_size']}",
    )


def qualities(axes: Any, rows: Sequence[Row]) -> bool:
    """Perplexity by method."""
    chosen = [row for row in rows if row["kind"] == "quality"]
    if not _bars(axes, chosen, "perplexity", "Perplexity through the cache", lambda row: title(row["method"])):
        return False
    values = [row["measured"] for row in chosen]
    axes.set_ylim(0.98 * min(values), 1.005 * max(values))
    return True


def _bars(axes: Any, rows: Sequence[Row], label: str, heading: str, name: Callable[[Row], str]) -> bool:
    if not rows:
        return False
    names = [f"{name(row)}\n{row['model']}, {row['device']}" for row in rows]
    axes.bar(range(len(rows)), [row["measured"] for row in rows], color="C0")
    axes.set_xticks(range(len(rows)), names, fontsize=6, rotation=30 if len(rows) > 5 else 0)
    axes.set(ylabel=label, title=heading)
    return True


PICTURES: dict[str, Callable[[Any, Sequence[Row]], bool]] = {
    "agreement": agreement,
    "lengths": lengths,
    "peaks": peaks,
    "speed": speeds,
    "quality": qualities,
}
