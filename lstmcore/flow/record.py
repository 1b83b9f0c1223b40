"""The data of a recording: the gradient norms and the gates of one layer, one direction, one backward pass.

T steps, B rows of the batch, H hidden units, Q quantiles.  Time runs as in the input, also for direction 1.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lstmcore.kernels.contract import GateStatistics

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GATES = ("input", "forget", "output")  # i, f, o
CLOSED, OPEN = 0.1, 0.9  # a gate below or above is saturated (the thresholds of Karpathy et al. 2015)


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of the gradient that arrives at a state, each step of each row, over the batch.

    By step, t = 0 is the first of the input.  By lag, k = 0 is the last step that a row computes in this direction
    (t = length - 1 for direction 0, t = 0 for direction 1), and k counts back from there along the row's own steps: the
    axis on which a gradient vanishes.  NaN where no row is active, infinite where a gradient is not finite.
    """

    mean: Tensor  # (T,) float64
    quantiles: Tensor  # (Q, T) float64, at QUANTILES
    mean_by_lag: Tensor  # (T,)
    quantiles_by_lag: Tensor  # (Q, T)
    rows: Tensor | None = None  # (T, B), by step, NaN beyond a row's end; if rows were requested

    @staticmethod
    def of(norms: Tensor, lengths: Tensor | None, direction: int, keep_rows: bool = False) -> list[Norms]:
        """The norms of each of S states, from those of every step and row.

        Args:
            norms: (S, T, B).
            lengths: (B,) int64, the steps of each row; None if all have T.
            direction: 0 or 1.
            keep_rows: whether to keep ``rows``.
        """
        values, by_lag = _both_ways(norms, lengths, direction)
        mean, quantiles = _over_rows(values)
        turned = (mean[:, ::-1], quantiles[:, :, ::-1]) if lengths is None and not direction else (mean, quantiles)
        if by_lag is not None:
            turned = _over_rows(by_lag)
        return [
            Norms(
                _tensor(mean[k]),
                _tensor(quantiles[k]),
                _tensor(turned[0][k]),
                _tensor(turned[1][k]),
                _tensor(values[k]) if keep_rows else None,
            )
            for k in range(len(values))
        ]


def entering_of(norms: Tensor, lengths: Tensor | None, direction: int) -> tuple[Tensor, Tensor]:
    """The means (T,), by step and by lag, of the norms (T, R) of what enters each step of R rows."""
    values, by_lag = _both_ways(norms[None], lengths, direction)
    if lengths is None:
        mean = values[0].mean(1)
        return _tensor(mean), _tensor(mean if direction else mean[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # steps without a row are NaN
        mean = np.nanmean(values[0], 1)
        return _tensor(mean), _tensor(mean if by_lag is None else np.nanmean(by_lag[0], 1))


def _both_ways(norms: Tensor, lengths: Tensor | None, direction: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Norms (S, T, B) by step, NaN beyond a row's end; and by lag, None if that is the same or its reverse."""
    # NumPy's functions stay on this thread; torch's wake threads that compete with the kernels of a training.
    values = norms.cpu().numpy()
    values = np.where(np.isfinite(values), values, math.inf)
    if lengths is None:
        return values, None
    ends, steps = lengths.numpy(), np.arange(values.shape[1])[:, None]
    values = np.where(steps < ends, values, math.nan)
    if direction:  # every row's walk ends at t = 0
        return values, None
    back = np.broadcast_to((ends - 1 - steps) % len(steps), values.shape)
    return values, np.take_along_axis(values, back, 1)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float64))


def _over_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (S, T) and quantiles (S, Q, T) of (S, T, B), of the rows that are active at each step: not NaN."""
    ordered = np.sort(values, axis=2)  # NaN comes last
    if np.isnan(ordered[:, :, -1]).any():
        active = ~np.isnan(values)
        count = active.sum(2)
        with np.errstate(invalid="ignore"):  # 0 / 0 where no row is active
            mean = np.where(active, values, 0).sum(2, dtype=np.float64) / count
        at = np.array(QUANTILES) * np.maximum(count - 1, 0)[..., None]  # (S, T, Q)
        low, high = np.floor(at).astype(np.int64), np.ceil(at).astype(np.int64)
        below, above = np.take_along_axis(ordered, low, 2), np.take_along_axis(ordered, high, 2)
    else:
        mean = np.einsum("stb->st", values) / values.shape[2]  # three times as fast as mean() over so short an axis
        at = np.array(QUANTILES) * (values.shape[2] - 1)  # (Q,)
        low = at.astype(np.int64)
        below, above = ordered[:, :, low], ordered[:, :, np.ceil(at).astype(np.int64)]
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        quantiles = np.where(below == above, below, below + (above - below) * (at - low))
    return mean, quantiles.swapaxes(1, 2)


@dataclass(frozen=True)
class Gates:
    """The activations of the input, forget and output gate over a sample of rows, and over all units."""

    mean: Tensor  # (3, T) float64; NaN where no sampled row is active
    histogram: Tensor  # (3, T, 10) float64: the share of activations in [0, 0.1), ... [0.9, 1]
    horizon: Tensor  # (H,) float64: steps until the product of a unit's forget gates, at its mean rate, is one half

    @staticmethod
    def of(statistics: GateStatistics, direction: int) -> Gates:
        """The gates of one direction, from the statistics of a backward pass."""
        sums, counts, log_forget, rows = (each.cpu().numpy() for each in statistics)
        log_forget = log_forget[direction]
        with np.errstate(divide="ignore", invalid="ignore"):  # steps without a row; gates that are one
            total = rows * len(log_forget)  # (T,)
            horizon = np.where(log_forget < 0, math.log(0.5) * rows.sum() / log_forget, math.inf)
            mean, histogram = sums[:, direction] / total, counts[:, direction] / total[:, None]
        return Gates(_tensor(mean), _tensor(histogram), _tensor(horizon))

    @property
    def closed(self) -> Tensor:
        """(3, T): the share of activations below 0.1."""
        return self.histogram[..., 0]

    @property
    def open(self) -> Tensor:
        """(3, T): the share of activations of 0.9 and above."""
        return self.histogram[..., -1]


@dataclass(frozen=True)
class Record:
    """One layer and direction in one backward pass."""

    iteration: int  # counted from 0 at the start of the recording
    module: str  # the module's name in the model that is recorded; "" for the model itself
    layer: int
    direction: int
    call: int  # index of the call of a module in one forward pass, counted from the last one; 0 if there is one call
    h: Norms  # of dL/dh_t
    c: Norms | None  # of dL/dc_t; None for a plain RNN, which has no cell
    entering: Tensor  # (T,) float64: mean norm of the gradient that h_t and c_t get from the loss or the layer above
    entering_by_lag: Tensor  # (T,)
    gates: Gates | None  # None for a plain RNN, or if they were not requested

    @property
    def steps(self) -> int:
        """T."""
        return len(self.h.mean)

    @property
    def name(self) -> str:
        """A readable name, such as ``encoder.lstm, layer 1, reverse direction``, without the parts that are 0."""
        parts = [self.module] if self.module else []
        parts.append(f"layer {self.layer}")
        if self.direction:
            parts.append("reverse direction")
        if self.call:
            parts.append(f"call {self.call}")
        return ", ".join(parts)
