"""One page of everything that was measured, in HTML: no other file and no network is needed to read it.

Made of rows and of nothing else, so that the same rows make the same page.  Figures are SVG within the page, and take
the colours of a dark page where the reader has one.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from bench import curves, findings, plots
from bench.findings import Table
from bench.rows import COST, Row
from bench.summary import PUBLISHED, entries

TEMPLATE = Path(__file__).with_name("page.html")
EXPERIMENTS = (*PUBLISHED, "long", "stream")  # that the page is about
# What is drawn in black stands on the page itself, and so does text, which has no colour of its own; ours is too dark.
DARK = (
    "<style>@media (prefers-color-scheme: dark) {"
    'svg { fill: #e6e6e6 } [style*="stroke: #000000"] { stroke: #e6e6e6 !important }'
    '[style*="stroke: #0b6e99"] { stroke: #4aa8d8 !important } [style*="fill: #0b6e99"] { fill: #4aa8d8 !important }'
    "}</style>"
)
HOW = """\
Each figure is of `lstmcore.LSTM` beside `torch.nn.LSTM` on the same weights and inputs, whose outputs and gradients
were checked before: against float64, or for the largest cases against torch in the same dtype, and for the longest
sequences on fewer steps. The two run by turns in one process; a figure is the median, speed is torch's time over ours.
On a CPU a call is timed behind an operation of torch's, as in a model, and alone, after a pause. onnxruntime's LSTM is
timed in calls of its own, since its threads spin. Peak memory is what one training step adds to a process of its own,
which may take most of what the machine has to spare: where a side needs more, it has no figure, and a cross says so.
The limit is the peak of the instruction that our kernels multiply with in the dtype, measured too."""
MADE_BY = """\
This page is made from the rows in `bench/results` by `make report`: no figure is typed. Where a machine has no rows of
something, a sentence says so."""


class Machine(NamedTuple):
    """The rows of one file."""

    name: str  # the file's
    rows: Sequence[Row]

    @property
    def title(self) -> str:
        return findings.title(self.rows[0])

    @property
    def mains(self) -> list[Row]:
        """A row a case and mode: behind an operation of torch's where there is such a row."""
        return [each.main for each in entries(self.rows)]

    @property
    def alone(self) -> list[Row]:
        """The same after a pause, where ``mains`` are not."""
        return [each.alone for each in entries(self.rows) if each.alone is not None]


class Drawing(NamedTuple):
    """A figure that a machine may have the rows for."""

    caption: str
    draw: Callable[[Machine], Figure | None]


def _behind(machine: Machine) -> Figure | None:
    behind = [row for row in machine.mains if row.experiment == "after-torch"]
    return plots.speed_by_shape(behind, ", behind an operation of torch's") if behind else None


def _alone(machine: Machine) -> Figure | None:
    alone = machine.alone or [row for row in machine.mains if row.experiment == "speed"]
    setting = "" if alone and alone[0].on_gpu else ", alone"
    return plots.speed_by_shape(alone, setting) if alone else None


def _limit(machine: Machine) -> Figure | None:
    shares = [row for row in machine.mains if row.peak_share is not None]
    return plots.peak_share(shares)


def _by_width(machine: Machine) -> Figure | None:
    return plots.time_by_width(machine.mains)


# By the title of a part: its figures, and what is said where a machine has the rows for none of them.
PARTS: Mapping[str, tuple[Sequence[Drawing], str]] = {
    "Speed by shape": (
        (Drawing("Speed behind an operation of torch's", _behind), Drawing("Speed alone", _alone)),
        "No dense cases were measured on this machine.",
    ),
    "Time per step": (
        (
            Drawing("Time per step as the sequence grows", lambda machine: plots.time_per_step(machine.mains)),
            Drawing("Time per step to the longest sequences", lambda machine: curves.time_along(machine.rows)),
            Drawing("Time per step by hidden size", _by_width),
        ),
        "No shape was measured with several numbers of steps on this machine.",
    ),
    "Peak memory": (
        (Drawing("Peak memory as the sequence grows", lambda machine: curves.memory_along(machine.rows)),),
        "Memory was not measured with several numbers of steps on this machine.",
    ),
    "Share of the limit": (
        (Drawing("Share of the peak by shape", _limit),),
        "The limit was not measured on this machine.",
    ),
    "Latency of a single step": (
        (Drawing("Latency of a single step", lambda machine: curves.latency(machine.rows)),),
        "Single steps were not measured on this machine.",
    ),
}
SHOWN = 12  # of the cases that ours loses, before the rest is folded


def svg(figure: Figure) -> str:
    """The figure as an SVG file that is the same whenever it is drawn."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "lstmcore", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"(<svg [^>]*>)", lambda match: match[1] + DARK, file.getvalue(), count=1)


def inline(text: str) -> str:
    """Text of ``findings`` in HTML."""
    escaped = html.escape(text, quote=False)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped))


def paragraph(text: str, style: str = "") -> str:
    return f"<p{style and f' class={style}'}>{inline(text)}</p>"


def table(found: Table) -> str:
    """A table, which scrolls where the screen is narrow."""
    head = "".join(f"<th>{inline(column)}</th>" for column in found.columns)
    body = "".join(f"<tr>{''.join(f'<td>{inline(str(cell))}</td>' for cell in line)}</tr>\n" for line in found.lines)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def picture(figure: Figure, caption: str) -> str:
    data = base64.b64encode(svg(figure).encode()).decode()
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}"></figure>'


def slower(rows: Sequence[Row]) -> tuple[Table, int]:
    """Every measurement that ours loses, worst first; and out of how many."""
    raced = [row for row in rows if row.peer and row.peer_p50_ms is not None and row.kind != COST]
    lost = sorted((row for row in raced if row.speed < 1), key=lambda row: (row.speed, row.case, row.mode, row.peer))
    lines = [
        (
            f"{row.case}{f', {row.variant}' if row.variant else ''} ({row.runs})",
            row.mode,
            "behind torch" if row.experiment in ("after-torch", "bfloat16-gain") else "alone",
            row.peer,
            f"{row.speed:.2f}×",
        )
        for row in lost
    ]
    return Table(("case", "mode", "setting", "against", "speed"), lines), len(raced)


def lost(machine: Machine) -> Iterator[str]:
    """Where ours is slower: everything that is, openly."""
    found, of = slower(machine.rows)
    count = len(found.lines)
    yield "<h3>Where ours is slower</h3>"
    yield paragraph(
        f"In {count} of {of} measurements, of all modes, settings and peers." if count else f"In none of {of}."
    )
    if not count:
        return
    few, many = table(found), f"<details><summary>all {count}</summary>\n{table(found)}\n</details>"
    yield few if count <= SHOWN else f"{table(Table(found.columns, found.lines[:SHOWN]))}\n{many}"


def part(machine: Machine, title: str) -> Iterator[str]:
    """The figures of one kind, or a sentence that there are none."""
    drawings, missing = PARTS[title]
    yield f"<h3>{title}</h3>"
    drawn = [(figure, each.caption) for each in drawings if (figure := each.draw(machine)) is not None]
    for figure, caption in drawn:
        yield picture(figure, f"{caption}: {machine.title}")
    if not drawn:
        yield paragraph(missing, "quiet")


def section(machine: Machine) -> Iterator[str]:
    """All that is known of a machine."""
    yield f'<h2 id="{html.escape(machine.name)}">{html.escape(machine.title)}</h2>'
    measured = bool(machine.mains)
    if measured:
        yield paragraph(findings.said(machine.rows, speeds_only=False))
    for title in PARTS:
        yield from part(machine, title)
    yield from lost(machine)
    if measured:
        yield "<h3>All groups of cases</h3>"
        yield table(findings.groups(machine.rows, speeds_only=False))
        if machine.rows[0].on_gpu:
            yield table(findings.algorithms(machine.rows))


def origins(machines: Sequence[Machine]) -> Table:
    """What each machine's rows were measured with."""
    names = ("commit", "date", "torch", "lstmcore", "numba", "triton", "cudnn", "onnxruntime")
    lines = [
        (
            machine.title,
            len(machine.rows),
            *(findings.span(sorted({getattr(row, name) for row in machine.rows} - {""})) for name in names),
        )
        for machine in machines
    ]
    return Table(("machine", "rows", *names), lines)


def page(files: Mapping[str, Sequence[Row]]) -> str:
    """The page of these files, by their names; a file without rows that the page is about is left out."""
    chosen = {name: [row for row in rows if row.experiment in EXPERIMENTS] for name, rows in files.items()}
    machines = [Machine(name, rows) for name, rows in chosen.items() if rows]
    raced = [machine.rows for machine in machines if machine.mains]
    body = [paragraph(HOW), paragraph(MADE_BY)]
    if raced:
        body += ["<h2>In short</h2>", table(findings.overview(raced)), paragraph(findings.OVERVIEW)]
    body += ["<h2>Machines</h2>", "<nav><ul>"]
    body += [f'<li><a href="#{html.escape(each.name)}">{html.escape(each.title)}</a></li>' for each in machines]
    body += ["</ul></nav>", table(origins(machines))]
    for machine in machines:
        body += section(machine)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(body="\n".join(body))
