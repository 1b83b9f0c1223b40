"""The figures of a recording: how the gradient of one layer grows or fades along the lags of one backward pass.

T steps.  A lag counts steps back from the last one that a layer computes.  What is measured is the gradient at the cell
state, which is the LSTM's memory, or at the hidden state of a plain RNN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lstmcore.flow.record import Record

# float32 has 24 bits, 6e-8 of a value: a term a million times smaller than the rest of a sum changes its last few
# bits, far below the noise between two batches, and no optimizer can learn from that.
VANISHED = 1e-6
# The last steps then contribute less than a thousandth of the weights' gradient, and clipping removes even that.
EXPLODED = 1e3
# If a step directly receives less than this share of its gradient, the rest comes from far away: even the thousand
# steps around it could not add up to it.
FED = 1e-3


@dataclass(frozen=True)
class Flow:
    """The figures of one record's gradient along the lags; NaN where a figure is undefined."""

    curve: Tensor  # (T,) mean norm by lag: of dL/dc, or of dL/dh without a cell
    start: int | None  # the first lag that has a gradient; None if there is no gradient
    far: int  # the last lag that a row of the batch has
    peak: int  # the lag of the largest norm
    reach: int  # the last lag that the loss, or the layer above, feeds
    vanished: int | None  # the first lag from which the norm stays below VANISHED of its largest value
    broken: int | None  # the first lag at which a norm, of h or of c, is not finite
    growth: float  # the largest norm over the first, divided by what the gradient that enters on the way explains
    rate: float  # what one step back keeps: exp of the slope of the log norms, by least squares

    def ratio(self, lag: int) -> float:
        """The norm at ``lag`` over the first one."""
        return float(self.curve[lag] / self.curve[self.start]) if self.start is not None else math.nan

    @property
    def throughout(self) -> bool:
        """Whether gradient enters at most steps, so that the norms cannot show what crosses the sequence."""
        return 2 * self.reach > self.far


def by_layer(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each layer and direction by name, in the order of their iterations.

    Raises ValueError for an empty recording.
    """
    if not records:
        raise ValueError(
            "there are no records: call loss.backward() inside `with lstmcore.record_gradient_flow(model) as flow:`, on"
            " a loss that depends on the output of an lstmcore.LSTM in the model"
        )
    layers: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.module, record.layer, record.direction, record.call)):
        layers.setdefault(record.name, []).append(record)
    for history in layers.values():
        history.sort(key=lambda record: record.iteration)
    modules = list(dict.fromkeys(record.module for record in records))  # in the order of the recording
    return dict(sorted(layers.items(), key=lambda item: modules.index(item[1][0].module)))


def measure(record: Record) -> Flow:
    """The figures of one record."""
    norms = record.h if record.c is None else record.c
    curve = norms.mean_by_lag
    lags = torch.arange(len(curve), device=curve.device)
    active = ~curve.isnan()
    far = int(lags[active].max()) if active.any() else 0
    infinite = active & ~(curve.isfinite() & record.h.mean_by_lag.isfinite())
    broken = int(lags[infinite].min()) if infinite.any() else None
    entering = record.entering_by_lag
    reach = _reach(record, far)
    usable = active & curve.isfinite() & (lags < (far + 1 if broken is None else broken))
    present = usable & (curve > 0)
    if not present.any():
        return Flow(curve, None, far, 0, reach, None, broken, math.nan, math.nan)
    start = int(lags[present].min())

    size = torch.where(usable, curve, -1.0)
    peak = int(size.argmax())
    last = int(lags[present & (curve >= VANISHED * curve[peak])].max())
    vanished = last + 1 if last < far and broken is None else None

    fed = entering.nan_to_num(0, posinf=0).cumsum(0)
    more = (fed / fed[start]).clamp(min=1) if fed[start] > 0 else torch.ones_like(fed)
    growth = float((size / (curve[start] * more)).max())

    # The rate is fitted from the last lag at which gradient enters to the lag where the norm has vanished or peaks.
    begin, end = (reach if 2 * reach <= far else peak), (far if vanished is None else vanished)
    if growth > EXPLODED:
        begin, end = start, peak
    fitted = present & (lags >= max(begin, start)) & (lags <= end)
    return Flow(curve, start, far, peak, reach, vanished, broken, growth, _rate(lags[fitted], curve[fitted]))


def ragged(record: Record) -> bool:
    """Whether the rows end at different steps, so that a lag has no step of its own."""
    norms = record.h
    turned = norms.mean if record.direction else norms.mean.flip(0)
    same = (turned == norms.mean_by_lag) | (turned.isnan() & norms.mean_by_lag.isnan())
    return not bool(same.all())


def _reach(record: Record, far: int) -> int:
    """The last lag at which gradient enters from outside the layer."""
    lags = (record.entering_by_lag > FED * record.h.mean_by_lag).nonzero()  # False for NaN
    return min(int(lags.max()), far) if len(lags) else 0


def _rate(lags: Tensor, norms: Tensor) -> float:
    """The factor per step of norms that fall or rise geometrically."""
    if len(lags) < 2:
        return math.nan
    x, y = lags.double(), norms.log()
    x = x - x.mean()
    return math.exp(float((x * (y - y.mean())).sum() / (x * x).sum()))
