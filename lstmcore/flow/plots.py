"""Figures of a recording: every function returns a matplotlib Figure, ``save`` and ``plot_all`` write files.

T steps, B rows of the batch, N iterations.  What needs more than MAX_PANELS panels says what it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lstmcore.flow.export import writing
from lstmcore.flow.measure import VANISHED, by_layer, measure
from lstmcore.flow.record import CLOSED, GATES, OPEN, QUANTILES, Gates, Norms, Record
from lstmcore.flow.summary import number, share

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter
except ImportError as error:
    raise ImportError("the pictures need matplotlib: pip install matplotlib") from error

# Okabe and Ito's colours, which colour-blind readers can distinguish, in an order that keeps similar ones apart
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, "#444444")
STATES = {"c": ("cell state c", BLUE), "h": ("hidden state h", ORANGE)}
TERMS = {
    "A": ("A: through the forget gate", ORANGE),
    "B": ("B: direct, additive path (forget gate)", BLUE),
    "C": ("C: through the input gate", GREEN),
    "E": ("E: through the candidate", PINK),
}
GREY = "#777777"
LAST, FIRST = "last recorded pass", "first recorded pass"

DECADES = 16  # below the first norm of a layer; smaller values are drawn at the lower edge
MAX_PANELS = 8
MAX_COLUMNS = 1000  # iterations of a heatmap; if there are more, evenly spaced ones are drawn
FEW = 40  # steps up to which single points and bars are distinguishable

History = TypeVar("History")
STYLE = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}
# Wraps every function that makes a figure: the settings apply to these figures only, not to others of the program.
styled = matplotlib.rc_context(STYLE)


@styled
def norms_by_step(records: Sequence[Record]) -> Figure:
    """Gradient norms over the time steps of the last recorded pass, one panel per layer; the first pass is dashed."""
    return _norms(records, by_lag=False)


@styled
def norms_by_lag(records: Sequence[Record], iteration: int | None = None) -> Figure:
    """Gradient norms over the steps back from the end, of ``iteration`` (None: the last recorded), one panel per layer.

    Raises:
        ValueError: an iteration that was not recorded.
    """
    if iteration is not None:
        present = sorted({record.iteration for record in records})
        records = [record for record in records if record.iteration == iteration]
        if present and not records:
            raise ValueError(f"iteration {iteration} was not recorded: expected one of {_listed(present)}")
    return _norms(records, by_lag=True)


@styled
def heatmap(records: Sequence[Record], by: str = "lag") -> Figure:
    """log10 of the mean gradient norm over the training: iterations across, lags or steps (``by``) upwards.

    Squares without an active row are grey, values that are not finite orange, zero and values below the scale black.

    Raises:
        ValueError: another ``by``.
    """
    if by not in ("lag", "step"):
        raise ValueError(f'expected by="lag" or by="step", got {by!r}')
    layers, left_out = _chosen(by_layer(records))
    figure, grid = _panels(len(layers), width=5.6, height=3.6)
    grids = {name: _grid(history, by) for name, history in layers.items()}
    values = np.concatenate([cells[np.isfinite(cells)] for cells, _ in grids.values()])
    flows = [measure(history[-1]) for history in layers.values()]
    firsts = [math.log10(flow.curve[flow.start]) for flow in flows if flow.start is not None]
    high = float(values.max()) if len(values) else 0.0
    low = max(float(values.min()), min([high, *firsts]) - DECADES) if len(values) else -1.0
    high = max(high, low + 1)  # a single norm would give no scale

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#dddddd", under="black", over=RED)
    smaller = larger = False
    for axes, (name, (cells, iterations)) in zip(grid, grids.items(), strict=True):
        smaller, larger = smaller or bool((cells < low).any()), larger or bool((cells > high).any())
        shown = np.ma.masked_invalid(np.clip(cells, low - 1, high + 1))  # infinities are finite now, NaN is masked
        image = axes.imshow(
            shown, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower", interpolation="nearest"
        )
        places = np.unique(np.linspace(0, len(iterations) - 1, min(5, len(iterations))).round().astype(int))
        axes.set_xticks(places, [str(iterations[place]) for place in places])
        axes.yaxis.set_major_locator(_whole(len(cells)))
        axes.set(title=name, xlabel="training iteration")
        axes.set_ylabel("lag: steps back from the end" if by == "lag" else "time step")
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    bar = figure.colorbar(image, ax=list(grid), extend=extend[smaller, larger], format=FuncFormatter(_power))
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.set_label("mean size of the gradient")
    marks = [("black: 0, or below the scale", smaller), ("orange: not finite", larger)]
    marks.append(("grey: no sequence is that long", any(np.isnan(cells).any() for cells, _ in grids.values())))
    legend = "; ".join(text for text, there in marks if there)
    figure.suptitle("\n".join(filter(None, ["Gradient size over the training", legend, left_out])), fontsize=11)
    return figure


@styled
def terms(norms_by_term: Mapping[str, Tensor]) -> Figure:
    """The four terms of the cell's Jacobian dc_t/dc_{t-1}, stacked per step: their norms, and each one's share.

    Norms of terms do not add up to the norm of their sum; the height of the stack bounds it.

    Args:
        norms_by_term: "A", "B", "C", "E" to (T,), or (T, B), of which the mean over the rows is drawn.

    Raises:
        ValueError: other names or shapes.
    """
    if not norms_by_term or not set(norms_by_term) <= set(TERMS):
        raise ValueError(
            f"expected terms named {', '.join(TERMS)}, got {', '.join(map(repr, norms_by_term)) or 'none'}"
        )
    values = {}
    for name in TERMS:
        if name in norms_by_term:
            each = torch.as_tensor(norms_by_term[name]).detach().to("cpu", torch.float64)
            if each.ndim not in (1, 2):
                raise ValueError(f"expected (T,) or (T, B) for term {name}, got {tuple(each.shape)}")
            values[name] = (each if each.ndim == 1 else each.nanmean(1)).numpy()
    lengths = {len(value) for value in values.values()}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(f"expected the same number of steps, at least one, for every term, got {sorted(lengths)}")
    stack = np.nan_to_num(np.stack(list(values.values())), posinf=np.nan)  # (terms, T); without non-finite values
    total = stack.sum(0)
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, heights in ((above, stack), (below, stack / np.where(total > 0, total, 1))):
        bottom = np.zeros(len(total))
        for name, height in zip(values, heights, strict=True):
            label, colour = TERMS[name]
            if len(total) <= FEW:
                axes.bar(range(len(total)), height, bottom=bottom, width=0.9, color=colour, label=label)
            else:
                axes.fill_between(range(len(total)), bottom, bottom + height, color=colour, label=label, linewidth=0)
            bottom = bottom + height
        _time(axes, len(total))
    above.set_ylabel("norms, stacked")
    above.set_ylim(bottom=0)
    below.set(ylabel="share of the stack", xlabel="time step t", ylim=(0, 1))
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(figure)
    figure.suptitle("What the gradient takes from c_t to c_{t-1}: the terms of the cell's Jacobian", fontsize=11)
    return figure


@styled
def gate_histograms(records: Sequence[Record]) -> Figure:
    """The distribution of the activations of the three gates: bars for the last recorded pass, a line for the first.

    Raises:
        ValueError: no record has gates.
    """
    layers, left_out = _chosen(_with_gates(records), MAX_PANELS // 2)
    figure = Figure(figsize=(10.5, 1.1 + 2.5 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), 3, squeeze=False, sharey=True, sharex=True)
    edges = np.linspace(0, 1, 11)
    for line, (name, history) in zip(grid, layers.items(), strict=True):
        for axes, gate, index in zip(line, GATES, range(3), strict=True):
            now, then = (gates.histogram[index].nanmean(0).numpy() for _, gates in (history[-1], history[0]))
            for low, high in ((0, CLOSED), (OPEN, 1)):
                axes.axvspan(low, high, color="#eeeeee", zorder=0)
            axes.bar(edges[:-1] + 0.05, now, width=0.09, color=BLUE, label=LAST)
            if len(history) > 1:
                axes.stairs(then, edges, color=ORANGE, linewidth=1.8, label=FIRST)
            title = f"{name} (iteration {history[-1][0].iteration})\n" if gate == GATES[0] else "\n"
            axes.set_title(
                f"{title}{gate} gate: {share(now[0])} closed, {share(now[-1])} open", fontsize=10, loc="left"
            )
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.1, 0.5, 0.9, 1))
            axes.set_xticklabels(("0", "0.1", "0.5", "0.9", "1"))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in grid[-1]:
        axes.set_xlabel("activation")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of activations")
    _legend(figure)
    heading = "Gates over all steps and units; shaded: closed (below 0.1) and open (0.9 and above)"
    figure.suptitle("\n".join(filter(None, [heading, left_out])), fontsize=11)
    return figure


@styled
def horizons(records: Sequence[Record]) -> Figure:
    """How long the units remember: steps until the product of a unit's forget gates is one half, in octaves.

    Raises:
        ValueError: no record has gates.
    """
    layers, left_out = _chosen(_with_gates(records))
    figure, grid = _panels(len(layers), width=5.6, height=3.2)
    for axes, (name, history) in zip(grid, layers.items(), strict=True):
        record, steps = history[-1][0], history[-1][0].steps
        top = max(4, math.ceil(math.log2(steps)) + 2)  # the last octave ends at two to four times the sequence
        columns = [_octaves(gates.horizon, top) for _, gates in (history[-1], history[0])]
        lefts = np.arange(-1, top + 1)  # of the bars: up to 1 step, 1 to 2, 2 to 4, ..., more than 2^top
        axes.bar(lefts + 0.5, columns[0], width=0.9, color=BLUE, label=LAST)
        if len(history) > 1:
            axes.stairs(columns[1], np.arange(-1, top + 2), color=ORANGE, linewidth=1.8, label=FIRST)
        axes.axvline(math.log2(steps), color="black", linestyle="--", linewidth=1.2, label="length of the sequences")
        apart = max(1, round(top / 6))
        ticks = [*range(0, top + 1 - apart // 2, apart), top + 0.5]
        axes.set_xticks(ticks, [*(str(2**tick) for tick in ticks[:-1]), f">{2**top}\nor ∞"])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.08 * max(max(column) for column in columns) or 1)
        axes.set(title=_title(name, record), xlabel="memory horizon in steps", ylabel="share of the units")
    _legend(figure)
    heading = "Steps after which the forget gates alone have left half of what a unit held"
    figure.suptitle("\n".join(filter(None, [heading, left_out])), fontsize=11)
    return figure


@styled
def compare_by_lag(curves: Mapping[str, Tensor | Sequence[Record]]) -> Figure:
    """Several models in one figure: gradient norms by lag, divided by each one's first, so that all start at 1.

    Args:
        curves: by label, a curve (T,), or records, of which the mean norms of the last pass are drawn: of the cell
            state, in a plain RNN of the hidden state, one line a layer.

    Raises:
        ValueError: there is nothing to draw.
    """
    lines: dict[str, np.ndarray] = {}
    for label, value in curves.items():
        if isinstance(value, Tensor):
            if value.ndim != 1:
                raise ValueError(f"expected a curve (T,) for {label!r}, got {tuple(value.shape)}")
            lines[label] = value.detach().to("cpu", torch.float64).numpy()
            continue
        layers = by_layer(value)
        for name, history in layers.items():
            lines[label if len(layers) == 1 else f"{label}: {name}"] = measure(history[-1]).curve.numpy()
    if not lines:
        raise ValueError("nothing to compare: expected a mapping from names to curves (T,) or to records")
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    scaled = {}
    for label, curve in lines.items():
        firsts = curve[np.isfinite(curve) & (curve > 0)]
        scaled[label] = curve / (firsts[0] if len(firsts) else 1)
    floor = _floor(list(scaled.values()), 1.0)
    for index, (label, curve) in enumerate(scaled.items()):
        style = ("-", "--", ":", "-.")[index // len(CYCLE) % 4]
        _line(axes, curve, floor, color=CYCLE[index % len(CYCLE)], linestyle=style, label=label)
    axes.axhline(VANISHED, color=GREY, linestyle=":", linewidth=1.2, label="1e-6: vanished")
    _scale(axes, list(scaled.values()), floor, VANISHED)
    _time(axes, max(len(curve) for curve in scaled.values()))
    axes.set_xlabel("lag: steps back from the end")
    axes.set_ylabel("gradient size, relative to its first")
    _legend(figure, 3 if max(map(len, scaled)) < 24 else 1)
    heading = "How much of the gradient is left (at the cell state; in a plain RNN at the hidden state)"
    figure.suptitle(heading, fontsize=11)
    return figure


def save(figure: Figure, folder: str | Path, name: str, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes ``folder/name.png`` and so on, creates the folder if it does not exist; returns the paths.

    Raises:
        ValueError: a format that matplotlib does not write.
        OSError: it cannot be written.
    """
    formats = (formats,) if isinstance(formats, str) else formats
    known = figure.canvas.get_supported_filetypes()
    for format in formats:
        if format not in known:
            raise ValueError(f"cannot write the format {format!r}: expected one of {', '.join(sorted(known))}")
    paths = [Path(folder) / f"{name}.{format}" for format in formats]
    for path, format in zip(paths, formats, strict=True):
        with writing(path):
            figure.savefig(path, format=format)
    return paths


def plot_all(records: Sequence[Record], folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes all figures for which there are records; returns the paths."""
    figures = {"norms_by_step": norms_by_step, "norms_by_lag": norms_by_lag}
    if len({record.iteration for record in records}) > 1:
        figures["heatmap"] = heatmap
    if any(record.gates is not None for record in records):
        figures |= {"gates": gate_histograms, "horizons": horizons}
    return [path for name, draw in figures.items() for path in save(draw(records), folder, name, formats)]


# --------------------------------------------------------------------------------------------------------- lines


def _norms(records: Sequence[Record], by_lag: bool) -> Figure:
    """The panels of ``norms_by_step`` and ``norms_by_lag``."""
    layers, left_out = _chosen(by_layer(records))
    figure, grid = _panels(len(layers), width=5.6, height=3.4)
    for axes, (name, history) in zip(grid, layers.items(), strict=True):
        record, flow = history[-1], measure(history[-1])
        first = float(flow.curve[flow.start]) if flow.start is not None else 1.0
        states = {"c": record.c, "h": record.h} if record.c is not None else {"h": record.h}
        seen = [curve for norms in states.values() for curve in _along(norms, by_lag)]
        before = history[0].h if history[0].c is None else history[0].c
        if len(history) > 1:
            seen.append(_along(before, by_lag)[0])
        floor = _floor(seen, first)
        threshold = VANISHED * float(flow.curve[flow.peak]) if flow.start is not None else None
        for state, norms in states.items():
            label, colour = STATES[state]
            middle, low, high = _along(norms, by_lag)
            x = np.arange(len(middle))
            band = np.isfinite(low) & np.isfinite(high)
            axes.fill_between(
                x, np.maximum(low, floor), np.maximum(high, floor), where=band, color=colour, alpha=0.2, linewidth=0
            )
            _line(axes, middle, floor, color=colour, label=label, linewidth=1.6)
        if len(history) > 1:
            label, colour = STATES["h" if record.c is None else "c"]
            _line(axes, seen[-1], floor, color="black", linestyle="--", linewidth=1, label=f"{label}, {FIRST}")
        if threshold:
            axes.axhline(threshold, color=GREY, linestyle=":", linewidth=1.2, label="1e-6 of the largest: vanished")
        _scale(axes, seen, floor, threshold)
        _time(axes, max(map(len, seen)))
        axes.set(title=_title(name, record), ylabel="gradient size (norm)")
        axes.set_xlabel("lag: steps back from the end" if by_lag else "time step")
    _legend(figure)
    what = "by the steps that it has travelled back" if by_lag else "at each time step"
    band = f"from {100 * QUANTILES[0]:g} to {100 * QUANTILES[-1]:g}% of them"
    heading = f"Gradient {what}\nline: median of the rows, band: {band}"
    figure.suptitle("\n".join(filter(None, [heading, left_out])), fontsize=11)
    return figure


def _along(norms: Norms, by_lag: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The median (T,) and the outermost quantiles."""
    quantiles = (norms.quantiles_by_lag if by_lag else norms.quantiles).numpy()
    return quantiles[QUANTILES.index(0.5)], quantiles[0], quantiles[-1]


def _line(axes: Axes, curve: np.ndarray, floor: float, **style: Any) -> None:
    """A curve, raised to ``floor``, with a gap for NaN and a cross on the upper edge for values that are not finite."""
    x = np.arange(len(curve))
    finite = np.where(np.isfinite(curve), np.maximum(curve, floor), np.nan)
    marker = {"marker": "o", "markersize": 3} if np.isfinite(curve).sum() <= FEW else {}
    axes.plot(x, finite, **marker, **style)
    infinite = np.flatnonzero(np.isinf(curve))
    if len(infinite):
        every = infinite[:: max(1, len(infinite) // 20)]
        edge = axes.get_xaxis_transform()
        axes.plot(every, np.full(len(every), 0.97), "x", color=RED, markersize=5, transform=edge, label="not finite")


def _floor(curves: Sequence[np.ndarray], first: float) -> float:
    """Where zero and too small values are drawn: ``DECADES`` below the first norm, or a decade below all others."""
    values = np.concatenate([curve[np.isfinite(curve) & (curve > 0)] for curve in curves])
    lowest = float(values.min()) if len(values) else 1.0
    zero = any((curve == 0).any() for curve in curves)
    return max(lowest / 10 if zero else lowest, first * 10.0**-DECADES, np.finfo(np.float64).tiny)


def _scale(axes: Axes, curves: Sequence[np.ndarray], floor: float, threshold: float | None) -> None:
    """A logarithmic axis around curves, floor and threshold; says so if values are at the floor."""
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    values = values[values > floor]
    high = max([floor, *([float(values.max())] if len(values) else []), *([threshold] if threshold else [])])
    low = min([floor, *([threshold] if threshold else [])])
    low = min(low, high / 100)
    margin = (high / low) ** 0.06 * 1.5
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    if any((curve < floor).any() for curve in curves):
        axes.axhline(floor, color="#bbbbbb", linewidth=1, zorder=0)
        tiny = any(((curve > 0) & (curve < floor)).any() for curve in curves)
        text = f"on this line: below {number(floor)}" if tiny else "on this line: exactly 0"
        below = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "left", "va": "top"}
        axes.annotate(text, (0, floor), (3, -4), color="#555555", fontsize=8, **below)
        axes.set_ylim(bottom=low / margin / (high / low) ** 0.05)
    axes.grid(axis="y", alpha=0.3)


def _time(axes: Axes, steps: int) -> None:
    """An axis of steps 0 to ``steps`` - 1, at whole numbers."""
    around = 0.5 if steps <= FEW else 0.01 * steps
    axes.set_xlim(-around, steps - 1 + around)
    axes.xaxis.set_major_locator(_whole(steps))


def _whole(steps: int) -> Any:
    """Ticks at whole numbers, also where there is only 0."""
    return FixedLocator([0]) if steps == 1 else MaxNLocator(integer=True)


# -------------------------------------------------------------------------------------------------------- panels


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, two per row."""
    columns = min(2, count)
    lines = -(-count // columns)
    size = (max(7.0, width * columns), 1.2 + height * lines)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _legend(figure: Figure, columns: int = 2) -> None:
    """One legend below all panels, with every label once."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _chosen(layers: dict[str, History], limit: int = MAX_PANELS) -> tuple[dict[str, History], str]:
    """The first layers, as many as fit, and a line about the others."""
    chosen = dict(list(layers.items())[:limit])
    left = len(layers) - len(chosen)
    return chosen, f"{left} more layers are not shown" if left else ""


def _title(name: str, record: Record) -> str:
    return f"{name}\n(iteration {record.iteration}, {record.steps} step{'s' if record.steps > 1 else ''})"


def _with_gates(records: Sequence[Record]) -> dict[str, list[tuple[Record, Gates]]]:
    """The records that have gates, and these, by layer."""
    layers = {
        name: having
        for name, history in by_layer(records).items()
        if (having := [(record, record.gates) for record in history if record.gates is not None])
    }
    if not layers:
        raise ValueError("no record has gates: record an LSTM (a plain RNN has none), and its gates too")
    return layers


def _grid(history: list[Record], by: str) -> tuple[np.ndarray, list[int]]:
    """log10 of the mean norms (T, N), NaN beyond the steps of an iteration, and the iterations."""
    if len(history) > MAX_COLUMNS:
        history = [history[place] for place in np.linspace(0, len(history) - 1, MAX_COLUMNS).round().astype(int)]
    cells = np.full((max(record.steps for record in history), len(history)), np.nan)
    for column, record in enumerate(history):
        norms = record.h if record.c is None else record.c
        curve = (norms.mean_by_lag if by == "lag" else norms.mean).numpy()
        with np.errstate(divide="ignore"):
            cells[: len(curve), column] = np.log10(curve)
    return cells, [record.iteration for record in history]


def _octaves(horizon: Tensor, top: int) -> np.ndarray:
    """The share of units that hold for up to 1 step, 1 to 2, 2 to 4, ..., and for more than 2^``top``."""
    values = horizon[~horizon.isnan()].numpy()
    edges = [0.0, *(2.0**power for power in range(top + 1)), np.inf]
    return np.histogram(np.where(np.isinf(values), np.finfo(np.float64).max, values), edges)[0] / max(1, len(values))


def _power(value: float, _: int) -> str:
    """A tick at log10 ``value``."""
    return f"1e{value:.0f}" if value and value == round(value) else number(10.0**value)


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return f"{shown}, ... {numbers[-1]}" if len(numbers) > 10 else shown
