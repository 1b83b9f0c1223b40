"""The figures, from rows alone.

Of a CPU: speed by shape, time per step as T grows, and share of the peak.  Of a GPU: speed by shape for each dtype,
and time per step as H grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter, ScalarFormatter

from bench.cases import MODES
from bench.providers import OURS, PEER
from bench.rows import Row, geometric_mean
from bench.summary import entries
from bench.tables import counted

LABELS = {OURS: "lstmcore.LSTM", PEER: "torch.nn.LSTM"}
COLOURS = {OURS: "#0b6e99", PEER: "#d1782a"}
MARKERS = {OURS: "o", PEER: "s"}
TICKS = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 1 / 1.5, 1, 1.5, 2, 3, 4, 6, 8)  # of the speed's colour bar
DENSE = {"dense": "I = H", "dense-i1": "I = 1"}
GPU_DENSE = {"cuda-bfloat16": "bfloat16", "cuda-float16": "float16", "cuda-float32": "float32 (TF32)"}
INK = "#111111"  # on what is coloured; black is for what stands on the page, where it may be dark
HEIGHT = 3.6  # of axes with lines, in inches
LINES = ("-", "--", ":", "-.", (0, (1, 4)))  # one for each batch

matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})


def where(row: Row) -> str:
    """On what a figure was measured."""
    on = f"{row.device}, cuDNN {row.cudnn}, I = H" if row.on_gpu else f"{row.device}, {counted(row)}, float32"
    return f"{on}, torch {row.torch}"


def _panels(rows: Sequence[Row], groups: dict[str, str]) -> list[tuple[str, str, list[Row]]]:
    """Title, group and rows of each group and mode that there are rows of."""
    return [
        (f"{mode}, {title}", group, chosen)
        for group, title in groups.items()
        for mode in MODES
        if (chosen := [row for row in rows if (row.group, row.mode) == (group, mode)])
    ]


def _times(row: Row, provider: str) -> tuple[float | None, float, float | None]:
    """A provider's 20th, 50th and 80th percentile, in milliseconds."""
    if provider == OURS:
        return row.p20_ms, row.p50_ms, row.p80_ms
    assert row.peer_p50_ms is not None
    return row.peer_p20_ms, row.peer_p50_ms, row.peer_p80_ms


def heatmap(axes: Axes, chosen: list[Row], norm: colors.Normalize, title: str) -> ScalarMappable:
    """Ratios by hidden size and batch, their mean over all T; a frame marks every shape where ours is slower."""
    hidden = sorted({row.hidden_size for row in chosen})
    batches = sorted({row.batch for row in chosen})
    grid = np.full((len(hidden), len(batches)), np.nan)
    for i, j in np.ndindex(grid.shape):
        same = [row.speed for row in chosen if (row.hidden_size, row.batch) == (hidden[i], batches[j])]
        grid[i, j] = geometric_mean(same) or np.nan
    image = axes.imshow(np.log2(grid), norm=norm, cmap="RdBu", aspect="auto")
    for i, j in np.argwhere(~np.isnan(grid)):
        red, green, blue, _ = image.to_rgba(np.log2(grid[i, j]))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        colour = "white" if dark else INK
        axes.text(j, i, f"{grid[i, j]:.2f}×", ha="center", va="center", fontsize=10, color=colour)
        if grid[i, j] < 1:
            axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor=INK, linewidth=2))
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_yticks(range(len(hidden)), [str(size) for size in hidden])
    axes.set(title=title, xlabel="batch B", ylabel="hidden size H")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def speed_scale(rows: Sequence[Row]) -> colors.Normalize:
    """The colours of ratios, in octaves: white is exactly 1.0, and both sides are equally long, to 8 at most."""
    largest = max(abs(np.log2(row.speed)) for row in rows)
    end = min(max(largest, 1.0), 3.0)  # one that is far out would leave all others pale
    return colors.TwoSlopeNorm(0.0, -end, end)


def speed_bar(figure: Figure, image: ScalarMappable) -> None:
    """The colour bar beside heatmaps of ratios."""
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.7, format=FuncFormatter(lambda v, _: f"{2**v:.3g}×"))
    bar.set_ticks([np.log2(ratio) for ratio in TICKS if abs(np.log2(ratio)) <= image.norm.vmax])
    bar.ax.axhline(0.0, color=INK, linewidth=2)
    bar.set_label("torch's time over ours  (line: 1.0, equally fast)")


def two_columns(heights: Sequence[float], width: float) -> tuple[Figure, Iterator[Axes]]:
    """A figure with two columns of axes, of which those too many are hidden; ``heights`` of all in inches."""
    columns = min(2, len(heights))
    by_line = [max(heights[at : at + columns]) for at in range(0, len(heights), columns)]
    figure = Figure(figsize=(width * columns, 1.0 + sum(by_line)), layout="constrained")
    every = list(figure.subplots(len(by_line), columns, squeeze=False, height_ratios=by_line).flat)
    for axes in every[len(heights) :]:
        axes.set_visible(False)
    return figure, iter(every)


def speed_by_shape(rows: Sequence[Row], setting: str = "") -> Figure | None:
    """Heatmaps of torch's time over ours, H by B; ``setting`` is how the calls were timed, in words."""
    groups = GPU_DENSE if rows[0].on_gpu else DENSE
    if not (panels := _panels(rows, groups)):
        return None
    norm = speed_scale([row for *_, chosen in panels for row in chosen])
    # A line of shapes is as high in all panels; title and labels take an inch.
    figure, every = two_columns([1.0 + 0.42 * len({row.hidden_size for row in chosen}) for *_, chosen in panels], 5.25)
    for axes, (title, _, chosen) in zip(every, panels, strict=False):
        image = heatmap(axes, chosen, norm, title)
    speed_bar(figure, image)
    over = ", geometric mean over the lengths measured" if rows[0].on_gpu else ""
    what = f"Speed of lstmcore.LSTM against torch.nn.LSTM{setting}{over}; framed: slower"
    figure.suptitle(f"{what}\n{where(rows[0])}", fontsize=11)
    return figure


def time_per_step(rows: Sequence[Row]) -> Figure | None:
    """Microseconds a step as the sequence grows, with the band from p20 to p80."""
    chosen = sorted((row for row in rows if row.group == "steps"), key=lambda row: row.steps)
    if not chosen:
        return None
    modes = [mode for mode in MODES if any(row.mode == mode for row in chosen)]
    figure = Figure(figsize=(5.2 * len(modes), 4.2), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False).flat, modes, strict=True):
        top = 0.0
        for provider in (PEER, OURS):
            line = [row for row in chosen if row.mode == mode]
            steps = [row.steps for row in line]
            times = np.array([_times(row, provider) for row in line], float) * 1e3 / np.array(steps)[:, None]
            low, middle, high = times.T
            axes.fill_between(steps, low, high, color=COLOURS[provider], alpha=0.2, linewidth=0)
            axes.plot(steps, middle, color=COLOURS[provider], marker=MARKERS[provider], label=LABELS[provider])
            top = max(top, *high)
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [f"{step:,}" for step in steps], rotation=40, ha="right")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, top * 1.15)
        axes.set(title=mode, xlabel="steps T", ylabel="µs per step")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    first = chosen[0]
    shape = f"I {first.input_size}, H {first.hidden_size}, B {first.batch}"
    figure.suptitle(f"Time per step as the sequence grows ({shape}; band: p20 to p80)\n{where(first)}", fontsize=11)
    return figure


def peak_share(rows: Sequence[Row]) -> Figure | None:
    """Each dense shape's share of the peak, ours joined with torch's."""
    dense = [row for row in rows if row.group == "dense"]
    if not dense:
        return None
    modes = [mode for mode in MODES if any(row.mode == mode for row in dense)]
    shapes = sorted({(row.hidden_size, row.batch) for row in dense})
    figure = Figure(figsize=(5.2 * len(modes), 1.8 + 0.27 * len(shapes)), layout="constrained")
    every = figure.subplots(1, len(modes), sharey=True, squeeze=False).flat
    for axes, mode in zip(every, modes, strict=True):
        for row in dense:
            if row.mode != mode:
                continue
            line = shapes.index((row.hidden_size, row.batch))
            shares = {PEER: row.peer_peak_share, OURS: row.peak_share}
            axes.plot(list(shares.values()), [line, line], color="#aaaaaa", linewidth=2, zorder=1)
            for provider, share in shares.items():
                axes.scatter(share, line, color=COLOURS[provider], marker=MARKERS[provider], s=36)
        for line, (shape, following) in enumerate(pairwise(shapes)):
            if shape[0] != following[0]:
                axes.axhline(line + 0.5, color="#dddddd", linewidth=1, zorder=0)
        axes.set_yticks(range(len(shapes)), [f"H {hidden}, B {batch}" for hidden, batch in shapes])
        axes.set_ylim(len(shapes) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(title=mode, xlabel="share of the peak")
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=COLOURS[provider], marker=MARKERS[provider], linestyle="", label=LABELS[provider])
        for provider in (PEER, OURS)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    peak = f"peak of float32 multiplication ({dense[0].peak_gflops:.0f} GF/s)"
    figure.suptitle(f"Share of the {peak}, I = H\n{where(dense[0])}", fontsize=11)
    return figure


def time_by_width(rows: Sequence[Row]) -> Figure | None:
    """Microseconds a step as H grows, one line for each batch, at the number of steps that has most rows."""
    dense = [row for row in rows if row.group in GPU_DENSE]
    if not dense:
        return None
    lengths = [row.steps for row in dense]
    steps = max(sorted(set(lengths)), key=lengths.count)
    dense = [row for row in dense if row.steps == steps]
    batches = sorted({row.batch for row in dense})
    panels = _panels(dense, GPU_DENSE)
    figure, every = two_columns([HEIGHT] * len(panels), 5.2)
    for axes, (title, _, chosen) in zip(every, panels, strict=False):
        for style, batch in zip(cycle(LINES), batches, strict=False):
            line = sorted((row for row in chosen if row.batch == batch), key=lambda row: row.hidden_size)
            for provider in (PEER, OURS):
                axes.plot(
                    [row.hidden_size for row in line],
                    [_times(row, provider)[1] * 1e3 / row.steps for row in line],
                    color=COLOURS[provider],
                    marker=MARKERS[provider],
                    linestyle=style,
                )
        hidden = sorted({row.hidden_size for row in chosen})
        axes.set_xscale("log", base=2)
        axes.set_xticks(hidden, [str(size) for size in hidden])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set(title=title, xlabel="hidden size H", ylabel="µs per step")
        axes.grid(axis="y", which="both", alpha=0.3)
    handles = [Line2D([], [], color=COLOURS[each], marker=MARKERS[each], label=LABELS[each]) for each in (PEER, OURS)]
    handles += [
        Line2D([], [], color="black", linestyle=style, label=f"B {batch}")
        for style, batch in zip(cycle(LINES), batches, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    text = f"Time per step by hidden size, T {steps:,}, input products included\n{where(dense[0])}"
    figure.suptitle(text, fontsize=11)
    return figure


FIGURES = {  # by device: the end of the file's name, who draws it (None: there is nothing to draw), and what it shows
    "cpu": (
        ("speed", speed_by_shape, "Speed ratio by hidden size and batch"),
        ("steps", time_per_step, "Time per step as the sequence grows"),
        ("peak", peak_share, "Share of the peak by shape"),
    ),
    "cuda": (
        ("speed", speed_by_shape, "Speed ratio by hidden size and batch"),
        ("width", time_by_width, "Time per step by hidden size"),
    ),
}


def draw_all(rows: Sequence[Row], folder: Path, name: str) -> list[tuple[Path, str]]:
    """Draws every figure that the rows of a device allow; returns the files and what each shows."""
    mains, drawn = [each.main for each in entries(rows)], []
    folder.mkdir(parents=True, exist_ok=True)
    for end, draw, caption in FIGURES["cuda" if rows[0].on_gpu else "cpu"]:
        if (figure := draw(mains)) is not None:
            drawn.append((folder / f"{name}-{end}.png", caption))
            figure.savefig(drawn[-1][0])
    return drawn
