"""What every backend tells of the gates: which rows are looked at, and the statistics in torch operations.

T steps, B rows, R sampled rows, D directions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import GateStatistics

BINS = 10  # of a histogram over [0, 1]
LEAST = 1e-6  # a forget gate below this counts as this: its product with anything is nothing, and ln 0 is not finite


def sampled_rows(starting: int, wanted: int) -> range:
    """``wanted`` of the ``starting`` rows that have a step (or all, where there are fewer), evenly spread."""
    count = min(wanted, starting)
    stride = starting // count if count else 1
    return range(stride // 2, starting, stride)[:count]


def statistics(gates: Tensor, active: Tensor | None = None) -> GateStatistics:
    """Of the activations i, f, o in ``gates`` (3, D, T, R, H); ``active`` (T, R): which of the rows to count."""
    _, _, steps, rows, _ = gates.shape
    if active is None:
        active = gates.new_ones((steps, rows), dtype=torch.bool)
    dead = ~active[..., None]
    sums = gates.masked_fill(dead, 0).sum((-2, -1), dtype=torch.float64)
    bins = torch.where(gates * BINS < BINS - 0.5, gates * BINS, BINS - 0.5).long().masked_fill(dead, BINS)
    counts = torch.stack([(bins == b).sum((-2, -1), dtype=torch.int32) for b in range(BINS)], -1)
    log_forget = gates[1].clamp(min=LEAST).log().masked_fill(dead, 0).sum((1, 2), dtype=torch.float64)
    return GateStatistics(sums, counts, log_forget, active.sum(1))
