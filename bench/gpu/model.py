"""The tiling's model of a step (``kernels/gpu/tiling.py``) beside what was measured.

Its constants fitted again to measured steps, and what each shape is bounded by: the model says what a step is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import Design

from bench.cases import DTYPES
from bench.rows import Row

# What makes a design, as a row tells it.
SHARES = tuple(each.name for each in fields(Design) if each.name not in ("directions", "step_time"))
USUAL = {each.name: each.default for each in fields(Design)}
SHORT = ("kind", "units", "tile", "rows", "groups", "tiles", "slices", "warps", "chunk", "chunks", "stream")
RATES = ("read", "stream", "shared", "wide_read")  # of the costs those of a kilobyte
PULL = 0.01  # how much a constant is held where it is: enough to decide what the rows do not tell apart
# What a part of a step stands for; one that is not here stands for itself.
BOUNDS = {
    "handoff": "hand-off",
    "read": "bytes from L2",
    "shared": "shared memory",
    "stream": "weights streamed",
    "stream_chunk": "weights streamed",
    "wide_forward": "latency, hand-off",
    "wide_backward": "latency, hand-off",
    "wide_pass": "latency",
    "wide_read": "bytes from L2",
} | dict.fromkeys(("latency", "pass", "chunk", "resident_forward", "resident_backward"), "latency")
TENSOR_CORES, LAUNCH = "tensor cores", "launch by the host"
# Operations that the tensor cores of an SM do in a microsecond at most, dense, 16-bit: 989.4 TFLOP/s over the 132 of an
# H100 SXM or H200 (NVIDIA's data sheets).
SM_FLOPS = 989.4e6 / 132


@dataclass(frozen=True)
class Step:
    """A measured step: its time, and what it is made of."""

    us: float
    parts: Mapping[str, float]  # how often each of the costs


def design_of(row: Row) -> Design:
    """The design that a row tells of."""
    known = {each.name for each in fields(Design)}
    read: dict[str, Any] = {"kind": str, "stream": lambda text: text == "True"}
    given = {name: read.get(name, int)(text) for name, text in row.details.items() if name in known}
    return Design(**given, directions=row.directions)


def shares_of(design: Design) -> dict[str, str]:
    """A design as a row tells it."""
    return {name: str(getattr(design, name)) for name in SHARES}


def name_of(shares: dict[str, str]) -> str:
    """A design in short: what all have, then what is not as most have it."""
    name = "{kind} U{units} BT{tile} W{warps} {slices}x{groups}x{tiles}x{rows}".format(**shares)
    if shares["chunk"] != "0":
        name += f" K{shares['chunk']}x{shares['chunks']}{' streamed' if shares['stream'] == 'True' else ''}"
    own = (each for each in shares if each not in SHORT and shares[each] != str(USUAL[each]))
    return name + "".join(f" {each} {shares[each]}" for each in own)


def step_of(row: Row) -> Step:
    """The step that a row of ``designs`` tells of."""
    precision = tiling.precision_of(DTYPES[row.dtype], row.precision == "tf32")
    parts = tiling.terms_of(design_of(row), row.hidden_size, row.mode == "backward", precision, row.threads)
    return Step(row.p50_ms * 1e3, parts)


def fit(steps: Sequence[Step], costs: Mapping[str, float] = tiling.COSTS) -> dict[str, float]:
    """The costs that come nearest to what was measured, by the squares of relative errors.

    None is below zero, and one that no step has, or that the steps do not tell from another, stays near what it was.
    """
    names = [name for name in costs if any(step.parts.get(name) for step in steps)]
    result = dict(costs)
    while names:
        rows = [[step.parts.get(name, 0.0) / step.us for name in names] for step in steps]
        wanted = [1.0] * len(steps)
        for index, name in enumerate(names):
            scale = PULL / max(costs[name], 1e-6)
            rows.append([scale if other == index else 0.0 for other in range(len(names))])
            wanted.append(scale * costs[name])
        left, right = (torch.tensor(each, dtype=torch.float64) for each in (rows, wanted))
        found = torch.linalg.lstsq(left, right[:, None]).solution[:, 0].tolist()
        result |= {name: max(value, 0.0) for name, value in zip(names, found, strict=True)}
        if min(found) >= 0:
            break
        names = [name for name, value in zip(names, found, strict=True) if value >= 0]
    return result


def errors(steps: Sequence[Step], costs: Mapping[str, float]) -> tuple[float, float]:
    """How far the model is off: on average and at most, relative to what was measured."""
    off = [abs(tiling.time_of(step.parts, costs) / step.us - 1) for step in steps]
    return sum(off) / len(off), max(off)


def fitted_lines(steps: Sequence[Step], costs: Mapping[str, float] = tiling.COSTS) -> Iterator[str]:
    """The costs as they are beside those that fit these steps, and how far the model is off with both."""
    if not steps:
        yield "no step was measured, so nothing was fitted"
        return
    new = fit(steps, costs)
    yield f"{'µs of a step, for each':<24} {'now':>8} {'fitted':>8}"
    for name, value in costs.items():
        if any(step.parts.get(name) for step in steps):
            as_rate = [f"{1 / each:.0f}" if each else "∞" for each in (value, new[name])]
            rate = f"   kB/µs: {as_rate[0]}, {as_rate[1]}" if name in RATES else ""
            yield f"{name:<24} {value:8.4f} {new[name]:8.4f}{rate}"
    for title, each in (("now", costs), ("fitted", new)):
        mean, worst = errors(steps, each)
        yield f"{title}: {mean:.1%} off on average, {worst:.0%} at most, {len(steps)} steps"


@dataclass(frozen=True)
class Bound:
    """What a step of a shape takes, and what of it."""

    shape: str
    mode: str
    us: float
    model: float
    shares: Mapping[str, float]  # of the measured time, the largest first
    host: float | None = None  # microseconds a step for which the host is busy with a call, where that was measured

    @property
    def launched(self) -> bool:
        """Whether the host takes longer to launch the call than the device to run it."""
        return self.host is not None and self.host > self.us

    def ranking(self) -> list[tuple[str, float]]:
        """What bounds it, then what comes next, each with its share."""
        ranked = [(name, share) for name, share in self.shares.items() if name != TENSOR_CORES or share > 0.5]
        return [(LAUNCH, 1.0), *ranked] if self.launched else ranked


def bound_of(row: Row, host: float | None = None) -> Bound:
    """What bounds the design of a row of ``designs``: the share of each part by the model, of the time measured.

    The tensor cores' share is that of their peak; they work while the rest does, so shares add up to more than one.
    """
    step, design = step_of(row), design_of(row)
    shares: dict[str, float] = {}
    for name, count in step.parts.items():
        what = BOUNDS.get(name, name)
        shares[what] = shares.get(what, 0.0) + count * tiling.COSTS[name] / step.us
    flops = 2 * 4 * row.hidden_size**2 * row.batch
    shares[TENSOR_CORES] = flops / min(design.programs, row.threads) / SM_FLOPS / step.us
    ranked = dict(sorted(shares.items(), key=lambda each: -each[1]))
    shape = f"H{row.hidden_size} B{row.batch}"
    return Bound(shape, row.mode, step.us, tiling.time_of(step.parts), ranked, host)


def bounds(rows: Iterable[Row]) -> list[Bound]:
    """What bounds each shape that was measured, by the tiling's own design."""
    rows = list(rows)
    host = {
        (row.hidden_size, row.batch, row.mode): float(row.details["host_us"]) / row.steps
        for row in rows
        if row.experiment == "steps" and "host_us" in row.details
    }
    chosen = [row for row in rows if row.experiment == "designs" and row.details["chosen"] == "True"]
    chosen.sort(key=lambda row: (row.batch, row.hidden_size))
    return [bound_of(row, host.get((row.hidden_size, row.batch, row.mode))) for row in chosen]


def bound_lines(found: Sequence[Bound]) -> Iterator[str]:
    """A line for each shape and pass, within 100 columns."""
    if not found:
        yield "no step of a shape was timed, so nothing is said of what bounds it"
        return
    yield (
        f"{'shape':<11} {'pass':<8} {'µs/step':>7} {'model':>7} {'host':>6}  "
        f"{'bound by':<24} {'then':<20} {'tensor':>7}"
    )
    for each in found:
        first, second = ([f"{name} {share:.0%}" for name, share in each.ranking()] + ["", ""])[:2]
        host = "" if each.host is None else f"{each.host:.2f}"
        yield (
            f"{each.shape:<11} {each.mode:<8} {each.us:7.2f} {each.model:7.2f} {host:>6}  "
            f"{first:<24} {second:<20} {each.shares[TENSOR_CORES]:7.0%}"
        )
