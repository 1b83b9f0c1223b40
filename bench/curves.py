"""Figures along T, up to the longest sequences, and of single steps: of the report's page.

Along T there are the rows of "long", and of a GPU those dense shapes that were measured with several T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.cases import MODES
from bench.plots import COLOURS, GPU_DENSE, HEIGHT, LABELS, MARKERS, two_columns, where
from bench.providers import OURS, PEER
from bench.rows import Row
from bench.tables import duration, mebibytes

RECOMPUTED = "#3b8b4d"
VARIANT_COLOURS = (RECOMPUTED, "#7a5aa6", "#8a6d00")
# Of single steps: colour and marker, by the name in the rows.
STEPPERS = {
    "torch.nn.LSTM": (COLOURS[PEER], "s"),
    "torch.nn.LSTMCell": ("#9c4a12", "D"),
    "onnxruntime, 1 thread": ("#b9a3d3", "v"),
    "onnxruntime": ("#7a5aa6", "^"),
}


class Panel(NamedTuple):
    """One shape in one mode, along T."""

    title: str
    rows: Sequence[Row]


class Line(NamedTuple):
    """A side's points: T and what was measured."""

    label: str
    colour: str
    marker: str
    points: dict[int, float]


def panels(rows: Sequence[Row], modes: Sequence[str] = MODES) -> list[Panel]:
    """Each shape that has rows with several T, in each mode; a shape's modes stand side by side."""
    shapes: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row.experiment == "long" or (row.experiment == "speed" and row.group in GPU_DENSE):
            shapes.setdefault((row.group, row.hidden_size, row.batch), []).append(row)
    found = []
    for (group, hidden, batch), own in sorted(shapes.items()):
        for mode in modes:
            chosen = [row for row in own if row.mode == mode]
            if len({row.steps for row in chosen}) > 1:
                words = [f"H {hidden}", f"B {batch}", *([GPU_DENSE[group]] if group in GPU_DENSE else [])]
                found.append(Panel(f"{mode}, {', '.join(words)}", chosen))
    return found


def lines(panel: Panel, ours: Callable[[Row], float | None], peer: Callable[[Row], float | None]) -> list[Line]:
    """Torch's line, then one for each variant of ours."""
    variants = list(dict.fromkeys(row.variant for row in panel.rows if row.variant))
    styles = {"": (LABELS[OURS], COLOURS[OURS], MARKERS[OURS])}
    for variant, colour in zip(variants, VARIANT_COLOURS, strict=False):
        styles[variant] = (f"{LABELS[OURS]}, {variant}", colour, "^")
    found = {PEER: Line(LABELS[PEER], COLOURS[PEER], MARKERS[PEER], {})}
    found |= {variant: Line(*style, {}) for variant, style in styles.items()}
    for row in sorted(panel.rows, key=lambda row: row.steps):
        for key, value in ((row.variant, ours(row)), (PEER, peer(row))):
            if value is not None and key in found:
                found[key].points[row.steps] = value
    return [line for line in found.values() if line.points]


def mark_failures(axes: Axes, rows: Sequence[Row]) -> None:
    """A cross at the top where a side ran out of memory."""
    for name, label, colour, height in (
        ("peer_fails", "torch: out of memory", COLOURS[PEER], 0.96),
        ("plain_fails", "ours: out of memory", COLOURS[OURS], 0.87),
    ):
        top = axes.get_xaxis_transform()
        for steps in sorted({row.steps for row in rows if name in row.details}):
            axes.plot([steps], [height], "X", color=colour, markersize=9, transform=top, clip_on=False)
            axes.annotate(
                label, (steps, height), (-9, 0), textcoords="offset points", xycoords=top,
                ha="right", va="center", color=colour, fontsize=9,
            )  # fmt: skip


def draw(axes: Axes, panel: Panel, found: Sequence[Line]) -> None:
    """The lines of a panel over the logarithm of T."""
    for line in found:
        axes.plot(list(line.points), list(line.points.values()), color=line.colour, marker=line.marker)
    steps = sorted({row.steps for row in panel.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [f"{step:,}" for step in steps], rotation=40, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(steps[0] / 1.3, steps[-1] * 1.3)
    axes.set(title=panel.title, xlabel="steps T")
    axes.grid(axis="y", alpha=0.3)
    mark_failures(axes, panel.rows)


def key_of(figure: Figure, every: Sequence[Line]) -> None:
    """One legend for all panels."""
    named = {line.label: line for line in every}
    handles = [
        Line2D([], [], color=line.colour, marker=line.marker, label=label)
        for label, line in named.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def time_along(rows: Sequence[Row]) -> Figure | None:
    """Microseconds a step as the sequence grows to the longest."""
    if not (chosen := panels(rows)):
        return None
    figure, every = two_columns([HEIGHT] * len(chosen), 5.2)
    drawn: list[Line] = []
    for axes, panel in zip(every, chosen, strict=False):
        found = lines(panel, lambda row: row.p50_ms * 1e3 / row.steps, _peer_step)
        draw(axes, panel, found)
        fails = any(name.endswith("_fails") for row in panel.rows for name in row.details)
        axes.set_ylim(0, max(max(line.points.values()) for line in found) * (1.35 if fails else 1.15))
        axes.set_ylabel("µs per step")
        drawn += found
    key_of(figure, drawn)
    figure.suptitle(f"Time per step to the longest sequences\n{where(chosen[0].rows[0])}", fontsize=11)
    return figure


def _peer_step(row: Row) -> float | None:
    return None if row.peer_p50_ms is None else row.peer_p50_ms * 1e3 / row.steps


def memory_along(rows: Sequence[Row]) -> Figure | None:
    """What one training step takes at its peak."""
    chosen = panels([row for row in rows if row.memory_mib is not None], ("training",))
    if not chosen:
        return None
    figure, every = two_columns([HEIGHT] * len(chosen), 5.2)
    drawn: list[Line] = []
    for axes, panel in zip(every, chosen, strict=False):
        found = lines(panel, lambda row: row.memory_mib, lambda row: row.peer_memory_mib)
        draw(axes, panel, found)
        axes.set_yscale("log", base=4)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda mib, _: mebibytes(mib)))
        axes.yaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        axes.set_ylim(
            low, high * (4 if any(name.endswith("_fails") for row in panel.rows for name in row.details) else 1)
        )
        axes.set_ylabel("peak of a training step")
        drawn += found
    key_of(figure, drawn)
    figure.suptitle(f"Peak memory of a training step as the sequence grows\n{where(chosen[0].rows[0])}", fontsize=11)
    return figure


def _detail_ms(row: Row, name: str) -> float | None:
    return float(row.details[name]) / 1e3 if name in row.details else None


def latency(rows: Sequence[Row]) -> Figure | None:
    """A single step of each case: the median of each side, and a line to its 99th percentile."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if row.experiment == "stream":
            by_case.setdefault(_step_name(row), []).append(row)
    if not by_case:
        return None
    names = list(by_case)
    figure = Figure(figsize=(8.5, 1.9 + 0.62 * len(names)), layout="constrained")
    axes = figure.subplots()
    shown: dict[str, Line] = {}
    for at, name in enumerate(names):
        sides = list(_sides(by_case[name]))
        for place, (line, middle, late) in enumerate(sides):
            y = at + (place - (len(sides) - 1) / 2) * 0.19
            shown.setdefault(line.label, line)
            if late is not None:
                axes.plot([middle, late], [y, y], color=line.colour, linewidth=1.5, alpha=0.6, zorder=1)
                axes.plot([late], [y], "|", color=line.colour, markersize=7, zorder=1)
            axes.plot([middle], [y], line.marker, color=line.colour, markersize=6)
        if at:
            axes.axhline(at - 0.5, color="#bbbbbb", linewidth=0.6, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: duration(ms)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("time of a step (mark: median; line: to the 99th percentile)")
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=line.colour, marker=line.marker, linestyle="", label=label)
        for label, line in shown.items()
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False)
    figure.suptitle(f"Latency of a single step in inference\n{where(by_case[names[0]][0])}", fontsize=11)
    return figure


def _step_name(row: Row) -> str:
    """What tells the cases of "stream" from each other."""
    parts = [f"H {row.hidden_size}, B {row.batch}"]
    parts += [f"{row.num_layers} layers"] * (row.num_layers > 1)
    return ", ".join([*parts, *([row.dtype] * (row.dtype != "float32")), *([row.variant] * bool(row.variant))])


def _sides(rows: Sequence[Row]) -> list[tuple[Line, float, float | None]]:
    """Who was timed on a case: ours, then each peer."""
    own = rows[0]
    found = [(Line("lstmcore.Stream", COLOURS[OURS], MARKERS[OURS], {}), own.p50_ms, _detail_ms(own, "p99_us"))]
    for row in rows:
        if row.peer_p50_ms is not None:
            line = Line(row.peer, *STEPPERS[row.peer], {})
            found.append((line, row.peer_p50_ms, _detail_ms(row, "peer_p99_us")))
    return found
