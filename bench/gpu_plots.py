"""The figures of a GPU, from rows alone: speed by shape for each dtype, and time per step as H grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, ScalarFormatter

from bench.cases import MODES
from bench.plots import COLOURS, LABELS, MARKERS, heatmap, speed_bar, speed_scale
from bench.providers import OURS, PEER
from bench.results import Row, geometric_mean

DENSE = {"cuda-bfloat16": "bfloat16", "cuda-float16": "float16", "cuda-float32": "float32 (TF32)"}
LINES = ("-", "--", ":", "-.", (0, (1, 4)))  # one for each batch


def _where(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{first.device}, torch {first.torch}, cuDNN {first.cudnn}, I = H"


def _panels(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The dtypes and modes that there are rows of: one column a mode, one line a dtype."""
    return [
        (group, mode)
        for group in DENSE
        if any(row.group == group for row in rows)
        for mode in MODES
        if any(row.mode == mode for row in rows)
    ]


def _over_steps(rows: Sequence[Row]) -> list[Row]:
    """One row for each H and B: the geometric mean of its ratios over all T."""
    shapes: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        shapes.setdefault((row.hidden_size, row.batch), []).append(row)
    return [replace(same[0], ratio=geometric_mean(row.ratio for row in same if row.ratio)) for same in shapes.values()]


def speed_by_shape(rows: Sequence[Row], path: Path) -> bool:
    """Heatmaps of torch's time over ours, H by B; returns whether there was anything to draw."""
    ours = [row for row in rows if row.provider == OURS and row.group in DENSE and row.ratio is not None]
    if not ours:
        return False
    panels = _panels(ours)
    modes = len({mode for _, mode in panels})
    figure = Figure(figsize=(1.0 + 5.0 * modes, 1.0 + 3.6 * len(panels) / modes), layout="constrained")
    norm = speed_scale(ours)
    image = None
    for axes, (group, mode) in zip(
        figure.subplots(len(panels) // modes, modes, squeeze=False).flat, panels, strict=True
    ):
        chosen = _over_steps([row for row in ours if (row.group, row.mode) == (group, mode)])
        if chosen:
            image = heatmap(axes, chosen, norm, f"{mode}, {DENSE[group]}")
        else:
            axes.set_visible(False)
    assert image is not None  # there are rows, so one panel has some
    speed_bar(figure, image)
    figure.suptitle(
        "Speed of lstmcore.LSTM against torch.nn.LSTM, geometric mean over the lengths measured; framed: slower\n"
        f"{_where(rows)}",
        fontsize=11,
    )
    figure.savefig(path)
    return True


def time_by_width(rows: Sequence[Row], path: Path) -> bool:
    """Microseconds a step as H grows, one line for each batch, at the number of steps that has most rows."""
    dense = [row for row in rows if row.group in DENSE]
    if not dense:
        return False
    lengths = [row.steps for row in dense]
    steps = max(sorted(set(lengths)), key=lengths.count)
    dense = [row for row in dense if row.steps == steps]
    batches = sorted({row.batch for row in dense})
    panels = _panels(dense)
    modes = len({mode for _, mode in panels})
    figure = Figure(figsize=(5.2 * modes, 1.0 + 3.6 * len(panels) / modes), layout="constrained")
    for axes, (group, mode) in zip(
        figure.subplots(len(panels) // modes, modes, squeeze=False).flat, panels, strict=True
    ):
        chosen = sorted(
            (row for row in dense if (row.group, row.mode) == (group, mode)), key=lambda row: row.hidden_size
        )
        for index, batch in enumerate(batches):
            for provider in (PEER, OURS):
                line = [row for row in chosen if (row.batch, row.provider) == (batch, provider)]
                axes.plot(
                    [row.hidden_size for row in line],
                    [row.p50_ms * 1e3 / row.steps for row in line],
                    color=COLOURS[provider],
                    marker=MARKERS[provider],
                    linestyle=LINES[index % len(LINES)],
                )
        hidden = sorted({row.hidden_size for row in chosen})
        axes.set_xscale("log", base=2)
        axes.set_xticks(hidden, [str(size) for size in hidden])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set(title=f"{mode}, {DENSE[group]}", xlabel="hidden size H", ylabel="µs per step")
        axes.grid(axis="y", which="both", alpha=0.3)
    handles = [Line2D([], [], color=COLOURS[each], marker=MARKERS[each], label=LABELS[each]) for each in (PEER, OURS)]
    handles += [
        Line2D([], [], color="black", linestyle=LINES[index % len(LINES)], label=f"B {batch}")
        for index, batch in enumerate(batches)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"Time per step by hidden size, T {steps:,}, input products included\n{_where(rows)}", fontsize=11)
    figure.savefig(path)
    return True
