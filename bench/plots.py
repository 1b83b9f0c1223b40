"""The figures of a CPU, from rows alone: speed by shape, time per step as T grows, and share of the FMA peak."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colors, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from bench.cases import MODES
from bench.providers import OURS, PEER
from bench.results import Row
from bench.summary import pairs
from bench.table import counted

LABELS = {OURS: "lstmcore.LSTM", PEER: "torch.nn.LSTM"}
COLOURS = {OURS: "#0b6e99", PEER: "#d1782a"}
MARKERS = {OURS: "o", PEER: "s"}
TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1 / 1.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # of the speed's colour bar
DENSE = {"dense": "I = H", "dense-i1": "I = 1"}

matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})


def _where(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"{first.device}, {counted(first)}, torch {first.torch}, float32"


def heatmap(axes: Axes, chosen: list[Row], norm: colors.Normalize, title: str) -> ScalarMappable:
    """Ratios by hidden size and batch; a frame marks every shape where ours is slower."""
    hidden = sorted({row.hidden_size for row in chosen})
    batches = sorted({row.batch for row in chosen})
    grid = np.full((len(hidden), len(batches)), np.nan)
    for row in chosen:
        grid[hidden.index(row.hidden_size), batches.index(row.batch)] = row.ratio
    image = axes.imshow(np.log2(grid), norm=norm, cmap="RdBu", aspect="auto")
    for i, j in np.argwhere(~np.isnan(grid)):
        text = axes.text(j, i, f"{grid[i, j]:.2f}×", ha="center", va="center", fontsize=10, color="black")
        text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white", alpha=0.8)])
        if grid[i, j] < 1:
            axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=2))
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_yticks(range(len(hidden)), [str(size) for size in hidden])
    axes.set(title=title, xlabel="batch B", ylabel="hidden size H")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def speed_scale(rows: Sequence[Row]) -> colors.Normalize:
    """The colours of ratios, in octaves: white is exactly 1.0, and both sides are equally long."""
    largest = max(abs(np.log2(row.ratio)) for row in rows if row.ratio is not None)
    return colors.TwoSlopeNorm(0.0, -max(largest, 1.0), max(largest, 1.0))


def speed_bar(figure: Figure, image: ScalarMappable) -> None:
    """The colour bar beside heatmaps of ratios."""
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.7, format=FuncFormatter(lambda v, _: f"{2**v:.3g}×"))
    bar.set_ticks([np.log2(ratio) for ratio in TICKS if abs(np.log2(ratio)) <= image.norm.vmax])
    bar.ax.axhline(0.0, color="black", linewidth=2)
    bar.set_label("torch's time over ours  (line: 1.0, equally fast)")


def speed_by_shape(rows: Sequence[Row], path: Path) -> bool:
    """Heatmaps of torch's time over ours, H by B; returns whether there was anything to draw."""
    ours = [row for row in rows if row.provider == OURS and row.group in DENSE and row.ratio is not None]
    panels = [
        (group, mode, chosen)
        for group in DENSE
        for mode in MODES
        if (chosen := [row for row in ours if (row.group, row.mode) == (group, mode)])
    ]
    if not panels:
        return False
    norm = speed_scale(ours)
    lines = (len(panels) + 1) // 2
    figure = Figure(figsize=(10.5, 1.0 + 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False).flat
    for axes, (group, mode, chosen) in zip(grid, panels, strict=False):
        image = heatmap(axes, chosen, norm, f"{mode}, {DENSE[group]}")
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    speed_bar(figure, image)
    figure.suptitle(f"Speed of lstmcore.LSTM against torch.nn.LSTM; framed: slower\n{_where(rows)}", fontsize=11)
    figure.savefig(path)
    return True


def time_per_step(rows: Sequence[Row], path: Path) -> bool:
    """Microseconds a step as the sequence grows, with the band from p20 to p80."""
    chosen = sorted((row for row in rows if row.group == "steps"), key=lambda row: row.steps)
    if not chosen:
        return False
    modes = [mode for mode in MODES if any(row.mode == mode for row in chosen)]
    figure = Figure(figsize=(5.2 * len(modes), 4.2), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False).flat, modes, strict=True):
        top = 0.0
        for provider in (PEER, OURS):
            line = [row for row in chosen if (row.mode, row.provider) == (mode, provider)]
            steps = [row.steps for row in line]
            low, middle, high = (
                [getattr(row, p) * 1e3 / row.steps for row in line] for p in ("p20_ms", "p50_ms", "p80_ms")
            )
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
    figure.suptitle(f"Time per step as the sequence grows ({shape}; band: p20 to p80)\n{_where(rows)}", fontsize=11)
    figure.savefig(path)
    return True


def peak_share(rows: Sequence[Row], path: Path) -> bool:
    """Each dense shape's share of the FMA peak, ours joined with torch's."""
    both = [pair for pair in pairs(rows) if pair[0].group == "dense"]
    if not both:
        return False
    modes = [mode for mode in MODES if any(ours.mode == mode for ours, _ in both)]
    shapes = sorted({(ours.hidden_size, ours.batch) for ours, _ in both})
    figure = Figure(figsize=(5.2 * len(modes), 1.8 + 0.27 * len(shapes)), layout="constrained")
    grid = figure.subplots(1, len(modes), sharey=True, squeeze=False).flat
    for axes, mode in zip(grid, modes, strict=True):
        for ours, peer in both:
            if ours.mode != mode:
                continue
            line = shapes.index((ours.hidden_size, ours.batch))
            axes.plot([peer.peak_share, ours.peak_share], [line, line], color="#aaaaaa", linewidth=2, zorder=1)
            for row in (peer, ours):
                axes.scatter(row.peak_share, line, color=COLOURS[row.provider], marker=MARKERS[row.provider], s=36)
        for line, (shape, following) in enumerate(pairwise(shapes)):
            if shape[0] != following[0]:
                axes.axhline(line + 0.5, color="#dddddd", linewidth=1, zorder=0)
        axes.set_yticks(range(len(shapes)), [f"H {hidden}, B {batch}" for hidden, batch in shapes])
        axes.set_ylim(len(shapes) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(title=mode, xlabel="share of the FMA peak")
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=COLOURS[provider], marker=MARKERS[provider], linestyle="", label=LABELS[provider])
        for provider in (PEER, OURS)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    peak = both[0][0].peak_gflops
    figure.suptitle(f"Share of the machine's FMA peak ({peak:.0f} GF/s), I = H\n{_where(rows)}", fontsize=11)
    figure.savefig(path)
    return True
