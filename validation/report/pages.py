"""The report's two forms: one HTML file that loads nothing, and Markdown with its pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvsim.atomic import replace_file
from kvsim.install import missing_hint
from kvsim.output.tables import compact
from validation.claims import quality_bars
from validation.documents import report as earlier
from validation.report import breakeven, calibrated, coverage, pace, pictures
from validation.report.claims import CLAIMS, Verdict, explained, verdicts
from validation.report.collection import Collection, Point

Table = tuple[list[str], list[list[str]]]
Quality = tuple[Sequence[quality_bars.Bar], Sequence[quality_bars.Beside]]
NONE: Quality = ((), ())
"""No verdicts of quality: those of all records alone are given."""
WORST = 10
CALIBRATED = (
    "The same recorded steps by the stated constants and by the card's profile, which saw none of them.  Where the "
    "host takes part, a profile is of a run."
)
PACES = (
    "Steps whose kernels the host launches take as long as the host does.  How many times as long as by the profile "
    f"they took in each run of {pace.FEWEST} rows and more, the median."
)
NUMBERED = (
    "Errors are predicted / measured - 1.  The shaded band is what the claim allows a single point; each point says "
    "what it is where a pointer rests on it."
)


@dataclass
class Section:
    """A heading, sentences, a table and pictures (name -> SVG), in this order."""

    heading: str
    text: list[str] = field(default_factory=list)
    table: Table | None = None
    svg: dict[str, str] = field(default_factory=dict)
    level: int = 2


def sections(
    found: Collection, rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]] = (), quality: Quality = NONE
) -> list[Section]:
    """Everything of the report but the older tables of bytes.  ``rows``: those of ``validation memory``; ``runs``:
    those of ``validation reliability``; ``quality``: its bars, and other libraries' caches beside ours."""
    judged = verdicts(found.points)
    out = [Section("Verdicts", [summary(judged)], verdict_table(judged))]
    for verdict in judged:
        if verdict.claim.unit == "s" and not verdict.claim.of:
            name = verdict.claim.name.replace(", ", "-").replace(" ", "-")
            drawn = {
                f"parity-{name}": pictures.parity(verdict),
                f"residuals-{name}": pictures.residuals(verdict.points),
            }
            text = [
                f"{verdict.claim.says}: {verdict.sentence}; bias {verdict.bias:+.1%}, {len(verdict.points)} points."
            ]
            out.append(
                Section(verdict.claim.name.capitalize(), text, svg={k: v for k, v in drawn.items() if v}, level=3)
            )
    sized = [each for each in judged if each.claim.unit == "B"]
    drawn = {f"parity-{each.claim.name.replace(' ', '-')}": pictures.parity(each) for each in sized}
    if sized:
        out.append(Section("Bytes and peaks", [NUMBERED], svg={k: v for k, v in drawn.items() if v}, level=3))
    out.append(Section(f"The worst {WORST} points", [], worst_table(found.points)))
    if calibrated.pairs(found.points):
        out.append(Section("Calibrated beside stated", [CALIBRATED], calibrated.beside(found.points)))
    if hosts := pace.table(found.points):
        out.append(Section("Hosts of other days", [PACES], hosts))
    if even := breakeven.breakevens(found.points):
        out.append(Section("Break-even", [f"{breakeven.SAYS}  {breakeven.sentence(even)}"], breakeven.table(even)))
    out.append(Section("What the recorded times cover", [], coverage.axes(found.points)))
    out.append(Section("What was not covered", [], coverage.gaps(found)))
    if runs:
        out.append(Section("Reliability", [kept(runs)], reliability_table(runs)))
    if any(quality):
        judged_bars, beside = quality
        out.append(Section("Quality", [quality_bars.kept(*quality)], quality_bars.bars_table(judged_bars)))
        out.append(Section("Quality at equal bits", [], quality_bars.besides_table(beside), level=3))
    return out


def summary(judged: Sequence[Verdict]) -> str:
    """One sentence over all claims."""
    count = sum(len(each.points) for each in judged if not each.claim.of)
    failed = [each.claim.name for each in judged if not each.holds]
    if not judged:
        return "No claim has a recorded figure here."
    if failed:
        return f"{len(failed)} of {len(judged)} claims FAIL over {count:,} recorded figures: {', '.join(failed)}."
    return f"All {len(judged)} claims hold over {count:,} recorded figures, by today's predictions."


def kept(runs: Sequence[dict[str, Any]]) -> str:
    """One sentence over the recorded runs of reliability: how many promises were kept, and which were not."""
    broken = dict.fromkeys(f"{row['run']} ({row['device']})" for row in runs if not row["holds"])
    count = sum(not row["holds"] for row in runs)
    if broken:
        return f"{count} of {len(runs)} reliability runs FAIL as recorded: {', '.join(broken)}."
    return f"All {len(runs)} reliability runs hold as recorded."


def verdict_table(judged: Sequence[Verdict]) -> Table:
    head = ["claim", "what", "points", "mean", "median", "bias", "worst", "verdict"]
    body = [
        [
            each.claim.name,
            each.claim.says,
            f"{len(each.points):,}",
            f"{each.mean:.2%}",
            f"{each.median:.2%}",
            f"{each.bias:+.2%}",
            f"{each.worst:.1%}",
            each.sentence,
        ]
        for each in judged
    ]
    told = {each.claim.name for each in judged}
    body += [[each.name, each.says, "0", "", "", "", "", "no record"] for each in CLAIMS if each.name not in told]
    return head, body


def worst_table(points: Sequence[Point]) -> Table:
    """The largest errors of time and memory, and what of each is shared with others."""
    named = {each.name for each in CLAIMS} - {"blocks"}
    wrong = [point for point in points if point.claim in named and point.error]
    chosen = sorted(wrong, key=lambda point: -abs(point.error))[:WORST]
    body = [
        [
            point.claim,
            point.title,
            f"{point.predicted:.4g}",
            f"{point.measured:.4g}",
            f"{point.error:+.1%}",
            explained(point, points),
            point.source,
        ]
        for point in chosen
    ]
    return ["claim", "point", "predicted", "measured", "error", "why", "record"], body


def reliability_table(runs: Sequence[dict[str, Any]]) -> Table:
    body = [
        [
            row["run"],
            row["device"],
            row["size"],
            "holds" if row["holds"] else "FAILS",
            row["found"],
            f"{row['seconds']:.1f}",
        ]
        for row in runs
    ]
    return ["run", "device", "size", "verdict", "found", "seconds"], body


def heading(title: str) -> str:
    """The page's heading: with the card's name, where it is of one."""
    return f"Validation: {title}" if title else "Validation"


def write(
    folder: Path,
    found: Collection,
    rows: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    title: str = "",
    quality: Quality = NONE,
) -> list[Path]:
    """``report.html``, ``report.md`` and its pictures in ``folder``, each replaced in one step; what was written.
    Those that matplotlib draws are left out where it is not installed, and the report says so.

    Raises ``ValueError`` for a folder that cannot be written.
    """
    parts = sections(found, rows, runs, quality)
    pngs = {}
    if find_spec("matplotlib"):
        from validation.documents.figures import draw

        pngs = draw(rows)
    elif rows:
        parts.append(Section("Bytes by method, drawn", [f"These need matplotlib{missing_hint('matplotlib')}."]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[Path, bytes] = {folder / f"{name}.png": png for name, png in pngs.items()}
        for part in parts:
            files |= {folder / f"{name}.svg": svg.encode() for name, svg in part.svg.items()}
        files[folder / "report.md"] = markdown(parts, rows, list(pngs), title).encode()
        files[folder / "report.html"] = html(parts, rows, pngs, title).encode()
        for path, content in files.items():
            replace_file(path, content, regular=True)
    except OSError as error:
        raise ValueError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    return list(files)


def markdown(parts: Sequence[Section], rows: Sequence[dict[str, Any]], pngs: Sequence[str], title: str = "") -> str:
    out = [f"# {heading(title)}"]
    for part in parts:
        out += [f"{'#' * part.level} {part.heading}", *part.text, *(f"![{name}]({name}.svg)" for name in part.svg)]
        if part.table is not None:
            out.append(compact(*_unbarred(part.table), left=(0,)))
    if rows:
        out.append(
            earlier.markdown(rows, pngs).replace("# Validation", "## Bytes in full", 1).replace("\n## ", "\n### ")
        )
    return "\n\n".join(out) + "\n"


def html(parts: Sequence[Section], rows: Sequence[dict[str, Any]], pngs: dict[str, bytes], title: str = "") -> str:
    """One page that loads nothing; what fails is red."""
    out = [f"<h1>{escape(heading(title))}</h1>"]
    for part in parts:
        out.append(f"<h{part.level}>{escape(part.heading)}</h{part.level}>")
        for line in part.text:
            bad = ' class="bad"' if "FAIL" in line else ""
            out.append(f"<p{bad}>{escape(line)}</p>")
        out += [svg.replace(pictures.XMLNS, "", 1) for svg in part.svg.values()]
        if part.table is not None:
            out.append(earlier.html_table(part.table))
    if rows:
        body = earlier.html(rows, pngs).partition("<body>")[2].partition("</body>")[0]
        out.append(body.replace("<h1>Validation</h1>", "<h2>Bytes in full</h2>", 1))
    head = f'<meta charset="utf-8"><title>{escape(heading(title))}</title><style>{earlier.STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(out)}</body></html>\n'


def _unbarred(table: Table) -> Table:
    """Without bars in cells, which Markdown takes for columns."""
    head, body = table
    return head, [[cell.replace("|", "/") for cell in line] for line in body]
