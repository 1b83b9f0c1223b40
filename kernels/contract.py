"""The types that a caller and a backend exchange; see the package's docstring for what they mean together.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state and of every accumulation for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Weights(NamedTuple):
    """The parameters of one direction of one layer."""

    weight_ih: Tensor  # (4H, I)
    weight_hh: Tensor  # (4H, P)
    bias_ih: Tensor | None = None  # (4H,)
    bias_hh: Tensor | None = None  # (4H,)
    weight_hr: Tensor | None = None  # (P, H)


def directions_of(params: Sequence[Tensor], directions: int) -> tuple[Weights, ...]:
    """The parameters of one layer, in the order of :class:`Weights` without those that are not there, by direction.

    How many there are says which: two, with ``weight_hr`` three, with the biases four, with both five.
    """
    fields = len(params) // directions
    result = []
    for at in range(0, len(params), fields):
        weight_ih, weight_hh, *rest = params[at : at + fields]
        no_biases = (None, None) if fields == 3 else ()
        result.append(Weights(weight_ih, weight_hh, *no_biases, *rest))
    return tuple(result)


class WeightGradients(NamedTuple):
    """The gradients of :class:`Weights`, field by field; None where not asked for, or where there is no such weight."""

    weight_ih: Tensor | None = None
    weight_hh: Tensor | None = None
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Which rows are alive at each step, and how the tensors of a call lie.

    Row r of the sorted batch is alive at step t where ``r < batch_sizes[t]`` (None: every row at every step).

    * packed: tensors are ``(N, ·)``; step t holds its ``batch_sizes[t]`` rows after those of the steps before it.
      ``h_0``, ``c_0``, ``h_n``, ``c_n`` are in the sorted order.
    * padded: tensors are ``(T, B, ·)``, of any strides, in the user's order: sorted row r is row ``order[r]`` there
      (None: row r), also in ``h_0``, ``c_0``, ``h_n``, ``c_n``.  New tensors are laid out batch-first in memory when
      ``batch_first`` is set (their shape is ``(T, B, ·)`` all the same).
    * padded, with ``lengths`` on the device instead of ``batch_sizes`` and ``order``: the host does not know them, and
      need not wait for them.  Only a backend of that device takes such rows; :meth:`on_host` is for the others.  All
      that it returns of a row whose length is out of range is NaN, and a later call raises ValueError.
    """

    steps: int  # T
    batch: int  # B
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU, never increasing
    order: Tensor | None = None  # (B,) int64 on the CPU
    packed: bool = False
    batch_first: bool = False
    lengths: Tensor | None = None  # (B,) integers on the device, not checked
    roomy: bool = False  # what forward saves has room for padded steps too: its sizes depend on no values

    @staticmethod
    def from_packed(batch_sizes: Tensor) -> Rows:
        """The rows of a ``PackedSequence`` with these ``batch_sizes``."""
        return Rows(len(batch_sizes), int(batch_sizes[0]), batch_sizes, packed=True)

    @staticmethod
    def from_lengths(lengths: Tensor, steps: int, batch_first: bool = False, roomy: bool = False) -> Rows:
        """The rows of a padded batch with these ``lengths`` (B,): integers from 0 to ``steps`` in any order.

        Dense ones where none ends early.  Raises ValueError for others.
        """
        # NumPy's operations take a tenth of torch's time on a few numbers; through a list, because a transform of
        # torch.func may have wrapped the tensor
        each = np.array(lengths.tolist(), np.int64)
        least, most = (int(each.min()), int(each.max())) if len(each) else (steps, steps)
        if not 0 <= least <= most <= steps:
            raise ValueError(f"lengths should be from 0 to {steps} (the steps of input), got {each.tolist()}")
        if least == steps:
            return Rows(steps, len(each), batch_first=batch_first)
        order = torch.from_numpy(np.argsort(-each, kind="stable"))
        sizes = torch.from_numpy(len(each) - np.cumsum(np.bincount(each, minlength=steps + 1))[:steps])
        return Rows(steps, len(each), sizes, order, batch_first=batch_first, roomy=roomy)

    def on_host(self) -> Rows:
        """These rows with their lengths known to the host, which waits for them where they are on a device."""
        if self.lengths is None:
            return self
        return Rows.from_lengths(self.lengths, self.steps, self.batch_first, self.roomy)

    def row_lengths(self) -> Tensor:
        """(B,) int64: how many steps each row has, in the order of ``h_0``; on the CPU, or where ``lengths`` are."""
        if self.lengths is not None:
            return self.lengths
        if self.batch_sizes is None:
            return torch.full((self.batch,), self.steps, device="cpu")
        lengths = (self.batch_sizes[:, None] > torch.arange(self.batch, device="cpu")).sum(0)
        return lengths if self.order is None else torch.empty_like(lengths).index_copy_(0, self.order, lengths)

    @property
    def ragged(self) -> bool:
        """Whether rows may end at different steps."""
        return self.batch_sizes is not None or self.lengths is not None

    @functools.cached_property
    def total(self) -> int:
        """N, the number of (step, row) pairs that are computed; T * B where the host does not know it."""
        return self.steps * self.batch if self.batch_sizes is None else int(self.batch_sizes.sum())

    @property
    def room(self) -> int:
        """How many rows what forward saves has room for."""
        return self.steps * self.batch if self.roomy and not self.packed else self.total

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a tensor of these rows, without its last dimension: ``(N,)`` packed, ``(T, B)`` padded."""
        return (self.total,) if self.packed else (self.steps, self.batch)

    def new(self, like: Tensor, width: int, dtype: torch.dtype | None = None, *, zero: bool = True) -> Tensor:
        """An uninitialised tensor of these rows, where padded zero (or to be cleared); (N, width) or (T, B, width)."""
        make = like.new_zeros if zero and self.ragged and not self.packed else like.new_empty
        if self.batch_first and not self.packed:
            return make((self.batch, self.steps, width), dtype=dtype).transpose(0, 1)
        return make((*self.shape, width), dtype=dtype)


@dataclass(frozen=True)
class Layer:
    """What has to be known to choose a backend and its kernels: no tensor, no pointer."""

    device: torch.device
    dtype: torch.dtype
    steps: int  # T
    batch: int  # B
    input_size: int  # I
    hidden_size: int  # H
    proj_size: int = 0  # 0: none
    directions: int = 1
    bias: bool = True
    ragged: bool = False
    training: bool = False  # something will ask for gradients


class Needs(NamedTuple):
    """Which gradients a backward has to produce."""

    input: bool = True
    h_0: bool = True
    c_0: bool = True
    weights: bool = True


class Forward(NamedTuple):
    """What forward returns."""

    output: Tensor  # rows.shape + (D * P,)
    h_n: Tensor  # (D, B, P)
    c_n: Tensor  # (D, B, H)
    cells: Tensor | None  # rows.shape + (D * H,), state dtype; when asked for
    saved: tuple[Tensor, ...]  # for backward; empty without save


class GateStatistics(NamedTuple):
    """The activations of the gates i, f, o over a sample of rows and all units."""

    sums: Tensor  # (3, D, T) float64
    counts: Tensor  # (3, D, T, 10) int32: how many in [0, 0.1), [0.1, 0.2), ... [0.9, 1]
    log_forget: Tensor  # (D, H) float64: sum of ln f of each unit
    rows: Tensor  # (T,) int64: sampled rows alive at each step


class Gradients(NamedTuple):
    """What backward returns: None for what was not asked for."""

    input: Tensor | None
    h_0: Tensor | None  # (D, B, P)
    c_0: Tensor | None  # (D, B, H)
    weights: tuple[WeightGradients, ...]  # one a direction
    norms: Tensor | None  # (2, D, T, B), state dtype
    gates: GateStatistics | None = None

    def of(self, weights: Sequence[Weights]) -> list[Tensor | None]:
        """The gradients of ``weights``, one for each that is there, as :func:`directions_of` takes them."""
        pairs = zip(self.weights, weights, strict=True)
        return [grad for grads, each in pairs for grad, weight in zip(grads, each, strict=True) if weight is not None]
