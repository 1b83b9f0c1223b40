"""Which rows of a batch are active at each step, the layout of a call's tensors, and conversions between layouts.

T time, B batch, N tokens: (step, row) pairs, n active rows of one step, R some rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Rows:
    """Which rows are active at each step, and the layout of a call's tensors.

    Row r of the sorted batch is active at step t where ``r < batch_sizes[t]`` (None: every row at every step).

    * packed: tensors are ``(N, ·)``; step t holds its ``batch_sizes[t]`` rows after those of the steps before it.
      ``h_0``, ``c_0``, ``h_n``, ``c_n`` are in the sorted order.
    * padded: tensors are ``(T, B, ·)``, of any strides, in the user's order: sorted row r is row ``order[r]`` there
      (None: row r), also in ``h_0``, ``c_0``, ``h_n``, ``c_n``.  New tensors are batch-first in memory if
      ``batch_first`` is set (their shape is ``(T, B, ·)`` nevertheless).
    * padded, with ``lengths`` on the device instead of ``batch_sizes`` and ``order``: the host does not know them, and
      need not wait for them.  Only a backend of that device takes such rows; for others there is :meth:`on_host`.  The
      results of a row whose length is out of range are NaN, and a later call raises ValueError.
    """

    steps: int  # T
    batch: int  # B
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU, never increasing
    order: Tensor | None = None  # (B,) int64 on the CPU
    packed: bool = False
    batch_first: bool = False
    lengths: Tensor | None = None  # (B,) integers on the device, not checked
    roomy: bool = False  # what forward saves has room for padding too: its sizes depend on no values

    @staticmethod
    def from_packed(batch_sizes: Tensor) -> Rows:
        """The rows of a ``PackedSequence`` with these ``batch_sizes``."""
        return Rows(len(batch_sizes), int(batch_sizes[0]), batch_sizes, packed=True)

    @staticmethod
    def from_lengths(lengths: Tensor, steps: int, batch_first: bool = False, roomy: bool = False) -> Rows:
        """The rows of a padded batch with these ``lengths`` (B,): integers from 0 to ``steps`` in any order.

        They are dense if no row ends early.  Raises ValueError for lengths out of range.
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
        """These rows with their lengths known to the host, which waits for them if they are on a device."""
        if self.lengths is None:
            return self
        return Rows.from_lengths(self.lengths, self.steps, self.batch_first, self.roomy)

    def row_lengths(self) -> Tensor:
        """(B,) int64: the steps of each row, in the order of ``h_0``; on the CPU, or on the device of ``lengths``."""
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
        """N, the number of tokens; T * B if the host does not know it."""
        return self.steps * self.batch if self.batch_sizes is None else int(self.batch_sizes.sum())

    @property
    def room(self) -> int:
        """The number of tokens that what forward saves has room for."""
        return self.steps * self.batch if self.roomy and not self.packed else self.total

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a tensor of these rows, without its last dimension: ``(N,)`` packed, ``(T, B)`` padded."""
        return (self.total,) if self.packed else (self.steps, self.batch)

    def new(self, like: Tensor, width: int, dtype: torch.dtype | None = None, *, zero: bool = True) -> Tensor:
        """A new tensor of these rows, (N, width) or (T, B, width): uninitialised, but zero at padding if ``zero``."""
        make = like.new_zeros if zero and self.ragged and not self.packed else like.new_empty
        if self.batch_first and not self.packed:
            return make((self.batch, self.steps, width), dtype=dtype).transpose(0, 1)
        return make((*self.shape, width), dtype=dtype)

    def part(self, first: int, last: int) -> Rows:
        """The rows of the steps from ``first`` up to ``last``: of each row, the steps that it has among these.

        As many rows in the same order, also where some have none of these steps.
        """
        sizes, lengths = self.batch_sizes, self.lengths
        if sizes is not None:
            sizes = sizes[first:last]
        elif lengths is not None:
            lengths = (lengths.to(torch.int64) - first).clamp(0, last - first)
        return replace(self, steps=last - first, batch_sizes=sizes, lengths=lengths)

    def place(self, first: int, last: int) -> slice:
        """Where the values of those steps lie in the first dimension of a tensor of these rows."""
        return slice(*(self._starts[each] for each in (first, last))) if self.packed else slice(first, last)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """(T + 1,) of packed rows: the first token of each step, and the end."""
        assert self.batch_sizes is not None
        return [0, *self.batch_sizes.cumsum(0).tolist()]

    # Between the caller's layout and the flat one: (N, ·), step by step, the active rows of each step sorted

    @functools.cached_property
    def _places(self) -> tuple[Tensor, Tensor] | None:
        """(N,) each: the step and the caller's row of each token; None if the caller's layout is flat already."""
        if self.batch_sizes is None or self.packed:
            return None
        steps, rows = (torch.arange(self.batch, device="cpu") < self.batch_sizes[:, None]).nonzero(as_tuple=True)
        return steps, rows if self.order is None else self.order[rows]

    def flat(self, tensor: Tensor) -> Tensor:
        """(N, ·): the tokens of a tensor of these rows."""
        if self._places is not None:
            return tensor[self._places]
        return tensor.reshape(self.total, *tensor.shape[len(self.shape) :])

    def unflat(self, flat: Tensor, target: Tensor) -> None:
        """Writes (N, ·) to a tensor of these rows: the inverse of :meth:`flat`; padding stays as it is."""
        if self._places is not None:
            target[self._places] = flat
        else:
            target.copy_(flat.view(*self.shape, *flat.shape[1:]))

    def split(self, tensor: Tensor) -> list[Tensor]:
        """T tensors (n, ·): the active rows of each step, sorted; autograd differentiates it."""
        if self.packed:
            assert self.batch_sizes is not None
            return list(tensor.split(self.batch_sizes.tolist()))
        if self.batch_sizes is None:
            return list(tensor.unbind(0))
        if self.order is not None:
            tensor = tensor.index_select(1, self.order.to(tensor.device))
        return [step[:n] for step, n in zip(tensor.unbind(0), self.batch_sizes.tolist(), strict=True)]

    def join(self, steps: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`; zero at padding."""
        if self.packed:
            return torch.cat(list(steps))
        padded = [pad(step, (0, 0, 0, self.batch - step.shape[0])) for step in steps]
        tensor = torch.stack(padded, 1).transpose(0, 1) if self.batch_first else torch.stack(padded)
        if self.order is not None:
            tensor = tensor.index_select(1, torch.argsort(self.order).to(tensor.device))
        return tensor

    def users(self, rows: range, device: torch.device) -> Tensor | slice:
        """The caller's index of these rows of the sorted batch: (R,) on ``device``, or a slice."""
        return slice(rows.start, rows.stop, rows.step) if self.order is None else self.order[list(rows)].to(device)

    def of_some(self, tensor: Tensor, rows: range) -> Tensor:
        """(T, R, ·): the values of these rows of the sorted batch at each step; arbitrary where they are not active."""
        if not self.packed:
            return tensor[:, self.users(rows, tensor.device)]
        assert self.batch_sizes is not None
        starts = self.batch_sizes.cumsum(0) - self.batch_sizes
        at = (starts[:, None] + torch.tensor(list(rows), device="cpu")).clamp(max=len(tensor) - 1)
        return tensor[at.to(tensor.device)]
