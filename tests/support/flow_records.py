"""Synthetic records: a gradient that falls or rises geometrically, and gates of a given kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lstmcore.flow.record import Gates, Norms, Record, entering_of


def gates(
    steps: int,
    units: int = 8,
    *,
    input: float = 0.5,
    forget: float | Sequence[float] = 0.5,
    output: float = 0.5,
    spread: float = 0.0,
) -> Gates:
    """Gates that stand at one value each, ``forget`` by unit where it is a sequence; ``spread`` smears the histograms.

    A horizon is ln(1/2) / ln f of its unit.
    """
    rates = (
        torch.tensor(forget, dtype=torch.float64).expand(units) if isinstance(forget, float) else torch.tensor(forget)
    )
    rates = rates.double()
    values = [torch.tensor([input]), rates, torch.tensor([output])]
    histogram = torch.zeros(3, steps, 10, dtype=torch.float64)
    for gate, value in enumerate(values):
        for each in value.tolist():
            histogram[gate, :, min(int(each * 10), 9)] += 1 / len(value)
    histogram = (1 - spread) * histogram + spread / 10
    mean = torch.stack([value.double().mean() for value in values])[:, None].expand(3, steps).clone()
    return Gates(mean, histogram, math.log(2) / rates.log().abs())


def norms_of(curve: Tensor, rows: int = 5, direction: int = 0, lengths: Tensor | None = None, keep=False) -> Norms:
    """From a curve by lag (T,), which every row follows from its own end on, scaled by 0.5 to 1.5."""
    steps = len(curve)
    scale = torch.linspace(0.5, 1.5, rows, dtype=torch.float64) if rows > 1 else torch.ones(1, dtype=torch.float64)
    ends = torch.full((rows,), steps) if lengths is None else lengths
    t = torch.arange(steps)[:, None]
    lags = t.expand(steps, rows) if direction else (ends - 1 - t) % steps
    return Norms.of((curve.double()[lags] * scale)[None], lengths, direction, keep)[0]


def geometric(steps: int, rate: float, first: float = 1.0) -> Tensor:
    """(T,) by lag: first * rate^lag, no smaller than float32 can hold."""
    curve = first * torch.tensor(rate, dtype=torch.float64) ** torch.arange(steps)
    return curve.float().double()


def record(
    rate: float = 0.5,
    steps: int = 200,
    *,
    iteration: int = 0,
    module: str = "lstm",
    layer: int = 0,
    direction: int = 0,
    call: int = 0,
    loss: str = "last",
    plain: bool = False,
    curve: Tensor | None = None,
    kind: Gates | None = None,
    lengths: Tensor | None = None,
    keep: bool = False,
) -> Record:
    """One record whose gradient keeps ``rate`` a step; ``loss`` is "last", "all" or "none"."""
    curve = geometric(steps, rate) if curve is None else curve
    steps = len(curve)
    if loss == "all" and lengths is None:  # what entered up to a lag, added up
        curve = curve.cumsum(0)
    rows = 5 if lengths is None else len(lengths)
    entering = torch.zeros(steps, rows, dtype=torch.float64)
    if loss == "all":
        entering += curve[0]
    elif loss == "last":  # each row's, where its walk ends
        ends = torch.zeros(rows, dtype=torch.int64) if direction else torch.full((rows,), steps - 1)
        if lengths is not None and not direction:
            ends = lengths - 1
        entering[ends, torch.arange(rows)] = curve[0] if curve[0].isfinite() else 1.0
    h = norms_of(curve if plain else 0.3 * curve, rows, direction, lengths, keep)
    c = None if plain else norms_of(curve, rows, direction, lengths, keep)
    if plain:
        kind = None
    return Record(iteration, module, layer, direction, call, h, c, *entering_of(entering, lengths, direction), kind)


def fed(record: Record, entering: Tensor) -> Record:
    """The same record, with ``entering`` (T,) by step."""
    entering = entering.double()
    return replace(record, entering=entering, entering_by_lag=entering if record.direction else entering.flip(0))
