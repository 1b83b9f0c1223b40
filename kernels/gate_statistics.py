"""The statistics of gates: the rows that every backend samples, and the statistics in torch operations.

T steps, B rows, R sampled rows, D directions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import GateStatistics

BINS = 10  # of a histogram over [0, 1]
LEAST = 1e-6  # smaller forget gates count as this: a state times either is as good as 0, and ln 0 is not finite


def sampled_rows(starting: int, wanted: int) -> range:
    """``wanted`` of the ``starting`` rows that have a step (all, if there are fewer), evenly spread."""
    count = min(wanted, starting)
    stride = starting // count if count else 1
    return range(stride // 2, starting, stride)[:count]


def statistics(gates: Tensor, active: Tensor | None = None) -> GateStatistics:
    """The statistics of the activations i, f, o in ``gates`` (3, D, T, R, H); ``active`` (T, R): what to count."""
    _, _, steps, rows, _ = gates.shape
    if active is None:
        active = gates.new_ones((steps, rows), dtype=torch.bool)
    inactive = ~active[..., None]
    sums = gates.masked_fill(inactive, 0).sum((-2, -1), dtype=torch.float64)
    bins = torch.where(gates * BINS < BINS - 0.5, gates * BINS, BINS - 0.5).long().masked_fill(inactive, BINS)
    counts = torch.stack([(bins == b).sum((-2, -1), dtype=torch.int32) for b in range(BINS)], -1)
    log_forget = gates[1].clamp(min=LEAST).log().masked_fill(inactive, 0).sum((1, 2), dtype=torch.float64)
    return GateStatistics(sums, counts, log_forget, active.sum(1))
